"""Horovod and MPI themselves: how they are set and started, and what they are built with."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from hvd_eurosat.cluster import rendezvous
from hvd_eurosat.cluster.device import visible
from hvd_eurosat.cluster.environment import is_parallel, under_mpi

DEFAULTS = {
    # The ranks wait minutes for rank 0's validation or for a node's packing: not a stall to warn of after 60 s.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "1800",
    # Fusion depends on timing, and so would the order of a sum: the buckets are ours (training/gradients.py).
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Horovod's thread asks the other ranks every so many ms, and MPI waits for their answer spinning.
    "HOROVOD_CYCLE_TIME": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
GLOO_DEFAULTS = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
# Of GPUs: a sum is done for the host once NCCL's kernel is queued, and the default stream waits for it on the device.
# That is right as long as all that reads a sum is on the default stream, or behind it (training/capture.py).
GPU_DEFAULTS = {"HOROVOD_ENABLE_ASYNC_COMPLETION": "1", "HOROVOD_CYCLE_TIME": "0.2"}
NICE = 12  # of Horovod's thread over MPI on CPUs: what trains on its core goes first, 15 to 1


def horovod() -> Any:
    """Horovod for torch, imported when it is first used."""
    import horovod.torch as hvd

    return hvd


def start() -> None:
    """Join Horovod and, under an MPI launcher, MPI. Collective."""
    gpus, _ = visible()
    for variable, value in defaults(gpus > 0).items():
        os.environ.setdefault(variable, value)
    if under_mpi():
        from mpi4py import MPI  # before Horovod, which would otherwise finalise MPI when the first rank leaves

        hvd, others = horovod(), _threads()
        hvd.init(comm=MPI.COMM_WORLD)
        if not gpus:
            for thread in _threads() - others:
                with contextlib.suppress(ProcessLookupError):  # one that has ended since
                    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.nice(0) + NICE))
    else:
        hvd = horovod()
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            del os.environ["HOROVOD_CYCLE_TIME"]  # with this and the threshold given, a second init would crash
            rendezvous.meet(again=False)
        hvd.init()


def defaults(on_gpus: bool) -> dict[str, str]:
    """The settings of this rank's Horovod and Open MPI that the environment does not make."""
    chosen = DEFAULTS if under_mpi() else DEFAULTS | GLOO_DEFAULTS
    if on_gpus and is_parallel() and os.environ.get("HOROVOD_ELASTIC") != "1":  # else who waits hears of lost ranks
        return chosen | GPU_DEFAULTS
    if not on_gpus and not under_mpi():
        return chosen | {"HOROVOD_CYCLE_TIME": "5"}  # 1 takes 3 % more of a training core
    return chosen


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def libraries() -> dict[str, Any]:
    """What Horovod and mpi4py are built with and load, without joining a job."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    of_mpi4py = _loaded_mpi()
    hvd = horovod()
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built(), "CUDA": hvd.cuda_built()}
    return {
        "horovod_built": {name: int(value) for name, value in built.items()},
        "horovod_mpi": sorted(_loaded_mpi() - of_mpi4py or of_mpi4py),
        "mpi4py_mpi": sorted(of_mpi4py),
        "mpi": MPI.Get_library_version().split(", package")[0].splitlines()[0].strip("\0 "),
    }


def thread_level() -> str:
    """Which calls from several threads MPI allows in this job."""
    if not under_mpi():
        return "none (no MPI in this job)"
    from mpi4py import MPI

    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(name.lower() for name in names if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def _loaded_mpi() -> set[str]:
    """Paths of the MPI libraries in this process."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in paths if re.search(r"/libmpi(ch)?\.so", path)}
