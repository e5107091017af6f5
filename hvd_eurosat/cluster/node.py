"""What the ranks of a node share: its GPUs, cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_eurosat.cluster import device as devices
from hvd_eurosat.cluster.environment import is_parallel, omp_threads, tasks_of_srun, under_mpi
from hvd_eurosat.errors import UserError

GPU_CORES = 4  # of a rank: it launches kernels; autograd, Horovod and NCCL have threads of their own
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its host, the cores it may use, its GPU, and the card of which that may be a MIG instance."""

    host: str
    cores: frozenset[int]
    gpu: str | None = None
    card: str | None = None

    @staticmethod
    def of(device: torch.device) -> Place:
        """This process's, with its device."""
        host, cores = socket.gethostname(), frozenset(os.sched_getaffinity(0))
        if device.type == "cpu":
            return Place(host, cores)
        gpu: Any = torch.cuda.get_device_properties(device)
        card = [getattr(gpu, f"pci_{part}_id", gpu.uuid) for part in ("domain", "bus", "device")]
        return Place(host, cores, str(gpu.uuid), ":".join(map(str, card)))


def ranks_here() -> int:
    """How many ranks this machine is for: one per GPU that torch can use, or two that share its cores."""
    return devices.visible()[0] or 2


def check(places: list[Place], ranks: int) -> None:
    """Raise UserError where the ranks of this node share a GPU, or those of the job do not see each other."""
    gpus, cards = ({getattr(place, what) for place in places} for what in ("gpu", "card"))
    if None not in gpus and len(cards) < len(places):
        shared = "1 GPU" if len(cards) == 1 else f"{len(cards)} GPUs"
        mig = ", of which MIG instances cannot train together" if len(gpus) == len(places) else ""
        raise UserError(
            f"{len(places)} ranks share {shared} of {places[0].host}{mig}: start one rank per GPU, "
            f"or set CUDA_VISIBLE_DEVICES= to train on its cores"
        )
    if ranks == 1 and tasks_of_srun() > 1 and not is_parallel():
        raise UserError(
            f"srun started {tasks_of_srun()} tasks that do not see each other: use srun --mpi=pmix, or mpirun"
        )


def alike(places: list[Place]) -> str | None:
    """What is wrong where some ranks of the job have GPUs, and others do not."""
    without = [(rank, place.host) for rank, place in enumerate(places) if place.gpu is None]
    if len(without) in (0, len(places)):
        return None
    rank, host = without[0]
    more = f" and {len(without) - 1} others" if len(without) > 1 else ""
    return (
        f"rank {rank} ({host}){more} of {len(places)} ha{'ve' if more else 's'} no GPU, which the others have: leave "
        f"such hosts out, or train all on cores: --train.device cpu"
    )


def warnings(places: list[Place]) -> Iterator[str]:
    """What makes the ranks of this node slow."""
    used, there = len(frozenset().union(*(p.cores for p in places))), len(os.sched_getaffinity(os.getppid()))
    if under_mpi() and used < there:
        yield f"mpirun bound this node's {len(places)} ranks to {used} of {there} cores: give it --bind-to none"
    elif places[0].gpu and used < GPU_CORES * len(places):
        yield f"{len(places)} ranks with GPUs have {used} cores; {GPU_CORES} each are wanted: sbatch --cpus-per-task=8"


def threads(places: list[Place]) -> int:
    """This rank's: OMP_NUM_THREADS, or its share of the cores that it may use. Raises UserError."""
    own = frozenset(os.sched_getaffinity(0))
    sharing = sum(1 for place in places if place.cores & own)
    return omp_threads() or max(1, len(own) // sharing)


def memory_limit() -> int | None:
    """A container's or a Slurm job's, in bytes, where there is one."""
    return min((limit for limit, _ in _limits()), default=None)


def available_memory() -> int:
    """Bytes that this node's processes may still take: no more than the limit of a container or a Slurm job leaves."""
    import psutil

    left = (limit - taken for limit, taken in _limits())
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def _limits() -> Iterator[tuple[int, int]]:
    """Of each control group that this process is in, one in another: how many bytes it may have, and how many it has.

    Cached files do not count, for they make way.
    """
    for folder in _control_groups():
        for limit, usage, total in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                bound, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                counts = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                yield bound, used - sum(int(counts[f"{total}{kind}_file"]) for kind in ("active", "inactive"))


def _control_groups() -> Iterator[Path]:
    """Their folders, of version 2 or 1, which counts memory by itself."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, counted, name = line.split(":", 2)
        if counted in ("", "memory"):
            own = CGROUPS / counted / name.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUPS / counted))


def keep_freed_memory() -> None:
    """Stop glibc from returning every large activation to the system, only to fault its pages in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # glibc before 2.35 takes less
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
