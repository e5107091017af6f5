"""What the launcher of this process (mpirun, srun, horovodrun) says of it in its environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from hvd_eurosat.errors import UserError

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
LAUNCHER_VARIABLES = re.compile(
    "(OMPI|PMIX|PMI|ORTE)_|SLURM_(PROCID|STEP_)|"
    "HOROVOD_(RANK|SIZE|LOCAL_|CROSS_|HOSTNAME|GLOO_|CONTROLLER|CPU_OPERATIONS|ELASTIC)"
)


def under_mpi() -> bool:
    """Whether the ranks meet by MPI; else they do by Gloo, or there is one alone."""
    return "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ and any(v in os.environ for v in RANK_VARIABLES)


def is_parallel() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "HOROVOD_SIZE" in os.environ or any(v in os.environ for v in RANK_VARIABLES)


def launched() -> tuple[int, int]:
    """(rank, ranks) by the launcher's word, before the job is joined; srun's counts where no MPI's is there."""
    ranks = ("HOROVOD_RANK", *RANK_VARIABLES, "SLURM_PROCID")
    sizes = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return _first(ranks, 0), _first(sizes, tasks_of_srun())


def tasks_of_srun() -> int:
    """How many like this one srun started; what is typed into a shell of srun's (--pty) is one alone."""
    return 1 if "SLURM_PTY_PORT" in os.environ else _first(["SLURM_STEP_NUM_TASKS"], 1)


def _first(variables: Iterable[str], default: int) -> int:
    return next((int(os.environ[v]) for v in variables if v in os.environ), default)


def omp_threads() -> int | None:
    """OMP_NUM_THREADS, of the outermost level, where it is set. Raises UserError."""
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if value and not re.fullmatch("[1-9][0-9]*", value):
        raise UserError(f"OMP_NUM_THREADS is {value}: it must be a number of threads")
    return int(value) if value else None


def forget_launcher() -> None:
    """This process, and those that it starts, are no ranks of a job that it was launched in, nor bound as such."""
    if not is_parallel():
        return
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    for variable in filter(LAUNCHER_VARIABLES.match, list(os.environ)):
        del os.environ[variable]
