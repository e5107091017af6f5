"""What the ranks of a node share: its GPUs, cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from dataclasses import dataclass

import torch

from hvd_eurosat.cluster.environment import is_parallel, omp_threads, tasks_of_srun, under_mpi
from hvd_eurosat.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its host, the cores it may use, its GPU."""

    host: str
    cores: frozenset[int]
    gpu: str | None

    @staticmethod
    def of(device: torch.device) -> Place:
        """This process's, with its device."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        return Place(socket.gethostname(), frozenset(os.sched_getaffinity(0)), gpu)


def ranks_here() -> int:
    """How many ranks this machine is for: one per GPU that torch can use, or two that share its cores."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def check(places: list[Place], ranks: int) -> None:
    """Raise UserError where the ranks of this node share a GPU, or those of the job do not see each other."""
    gpus = {place.gpu for place in places}
    if None not in gpus and len(gpus) < len(places):
        raise UserError(
            f"{len(places)} ranks on the {len(gpus)} GPUs of {places[0].host}: start one rank per GPU, "
            f"or set CUDA_VISIBLE_DEVICES= to train on its cores"
        )
    if ranks == 1 and tasks_of_srun() > 1 and not is_parallel():
        raise UserError(
            f"srun started {tasks_of_srun()} tasks that do not see each other: use srun --mpi=pmix, or mpirun"
        )


def idle_cores(places: list[Place]) -> str | None:
    """A warning where mpirun leaves cores of this node idle."""
    used, there = len(frozenset().union(*(p.cores for p in places))), len(os.sched_getaffinity(os.getppid()))
    if not under_mpi() or used >= there:
        return None
    return f"mpirun bound this node's {len(places)} ranks to {used} of {there} cores: give it --bind-to none"


def threads(places: list[Place]) -> int:
    """This rank's: OMP_NUM_THREADS, or its share of the cores that it may use. Raises UserError."""
    own = frozenset(os.sched_getaffinity(0))
    sharing = sum(1 for place in places if place.cores & own)
    return omp_threads() or max(1, len(own) // sharing)


def keep_freed_memory() -> None:
    """Stop glibc from returning every large activation to the system, only to fault its pages in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # glibc before 2.35 takes less
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
