"""The nodes of a Slurm job and how many ranks each takes, by the variables that Slurm sets in it.

Sources: sbatch(1), salloc(1) and srun(1) of Slurm 22.05; src/common/env.c, which sets them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hvd_eurosat.cluster.hostlist import BETWEEN, expand
from hvd_eurosat.errors import UserError

CURE = "Slurm gave no more: ask for --ntasks-per-node=N, or say --hosts"
TASKS = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_GPU")
SALLOC_STEP = "4294967290"  # salloc's own shell: a step of one task, in which the job's variables are whole (slurm.h)
REPEATED = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")  # 8(x2)


def nodes_and_tasks(environment: Mapping[str, str], ranks: int | None) -> list[tuple[str, int]]:
    """The nodes of this job, or of its step that this is a shell of, and the ranks that each takes.

    They are the tasks that were asked for; else one for each GPU of a node; else as many as Slurm counts. A shell's
    step has one task of its own, which nobody asked for. ranks: how many there are to be, if that was said. Raises
    UserError where Slurm does not say, or where GPUs would idle that nobody left out.
    """
    job = environment["SLURM_JOB_ID"]
    if environment.get("SLURM_HET_SIZE", "1") != "1":
        raise UserError(f"Slurm job {job} has several parts (a heterogeneous job): say --hosts name:slots,…")
    nodes, counted, asked = _layout(environment)
    if not nodes:
        raise UserError(f"Slurm job {job} does not name its nodes (SLURM_JOB_NODELIST): say --hosts name:slots,…")
    gpus = _gpus_on_node(environment)
    tasks = [gpus] * len(nodes) if gpus and not asked else counted or [1] * len(nodes)
    if len(tasks) != len(nodes):
        raise UserError(
            f"Slurm job {job} has {len(nodes)} nodes, and tasks for {len(tasks)} (SLURM_JOB_NODELIST, "
            f"SLURM_TASKS_PER_NODE): say --hosts name:slots,…"
        )
    if ranks is None and gpus > min(tasks):
        few = f"{gpus} GPUs on a node, and tasks for {min(tasks)} of them"
        raise UserError(f"{few}: ask for --ntasks-per-node={gpus}, or say --np N")
    return list(zip(nodes, tasks, strict=True))


def job_nodes(environment: Mapping[str, str]) -> list[str]:
    """All nodes of this job, also those that its step here lacks. Raises UserError."""
    return _names(environment, "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def _layout(environment: Mapping[str, str]) -> tuple[list[str], list[int], bool]:
    """The nodes, the tasks of each (none: not said), and whether these were asked for."""
    if environment.get("SLURM_STEP_ID", "") in ("", SALLOC_STEP) or not environment.get("SLURM_STEP_NODELIST"):
        asked = any(environment.get(variable) for variable in TASKS)
        return job_nodes(environment), _counts(environment, "SLURM_TASKS_PER_NODE"), asked
    tasks = _counts(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    return _names(environment, "SLURM_STEP_NODELIST"), tasks, sum(tasks) > len(tasks)


def _names(environment: Mapping[str, str], *variables: str) -> list[str]:
    variable, text = _first(environment, *variables)
    try:
        return [name for word in BETWEEN.split(text) if word for name in expand(word)]
    except ValueError:
        raise UserError(f"{variable} is {text}: these are no names of nodes") from None


def _counts(environment: Mapping[str, str], *variables: str) -> list[int]:
    """8(x2),4 as 8, 8 and 4."""
    variable, text = _first(environment, *variables)
    found = [REPEATED.fullmatch(one) for one in text.split(",")] if text else []
    counts = [int(one[1]) for one in found if one for _ in range(int(one[2] or 1))]
    if not all(found) or not all(counts):
        raise UserError(f"{variable} is {text}: these are no numbers of tasks")
    return counts


def _first(environment: Mapping[str, str], *variables: str) -> tuple[str, str]:
    """The first of the variables that says something, or the first, and what it says."""
    return next(((one, environment[one]) for one in variables if environment.get(one)), (variables[0], ""))


def _gpus_on_node(environment: Mapping[str, str]) -> int:
    """Those of each node: what Slurm says of this one, else what was asked for. Raises UserError where they differ."""
    here = environment.get("SLURM_GPUS_ON_NODE", "")
    gpus = int(here) if here.isdecimal() else _sum(environment.get("SLURM_GPUS_PER_NODE", ""))
    total, nodes = _sum(environment.get("SLURM_GPUS", "")), len(job_nodes(environment))
    if gpus and total and total != gpus * nodes:
        raise UserError(f"{total} GPUs are not as many on each of {nodes} nodes: ask for --gpus-per-node=N")
    return gpus


def _sum(gpus: str) -> int:
    """8 of 8, of a100:8 and of a100:4,h100:4."""
    return sum(map(int, re.findall(r"([0-9]+)(?:,|$)", gpus)))
