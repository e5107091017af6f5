"""Find what keeps training from working well on these machines, and say how to mend it.

.venv/bin/python -m hvd_eurosat.doctor                    this machine
.venv/bin/mpirun -np 8 … python -m hvd_eurosat.doctor     a job: any launcher, any number of hosts

It ends with 0, or with 1 when something must be mended. Its output belongs in every bug report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_eurosat.cluster import environment
from hvd_eurosat.config.command import Parser
from hvd_eurosat.diagnosis.checks import Finding, across_ranks, installation, machine
from hvd_eurosat.diagnosis.facts import Facts, Mpirun, collect

if TYPE_CHECKING:
    from hvd_eurosat.cluster.world import World

JOIN_SECONDS = 30
PROBE_SECONDS = 120
REPORT_SECONDS = 10
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Examine this rank alone, then, if it can join, the job; rank 0 reports. Collective."""
    parser = Parser(prog="python -m hvd_eurosat.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    as_json = parser.parse_args(argv).json
    facts = collect()
    obstacles = list(installation(facts))
    rank, launched = environment.launched()
    if obstacles:
        if rank == 0:
            report([facts], [*obstacles, *machine(facts)], {}, "", as_json)
        else:
            print(f"error: rank {rank}: {obstacles[0].what}: {obstacles[0].cure}", file=sys.stderr, flush=True)
            time.sleep(REPORT_SECONDS)  # the launcher ends all ranks when the first leaves: rank 0 reports before
        sys.exit(1)
    from hvd_eurosat.cluster import backend, job
    from hvd_eurosat.diagnosis.probes import probe

    world, gpu, trouble = job.on_gpus(join(facts, rank, launched))
    ranks = world.gather(dataclasses.replace(facts, gpu=gpu, cuda_trouble=facts.cuda_trouble or trouble))
    findings = [finding for host in {f.host: f for f in ranks}.values() for finding in machine(host)]
    findings += across_ranks(ranks, launched)
    hang = f"an allreduce did not end within {PROBE_SECONDS} s; NCCL_DEBUG=INFO shows where NCCL waits."
    with patience(PROBE_SECONDS, f"rank {rank} of {launched} ({facts.host}): {hang} {_network(facts)}"):
        times = probe(world)
    if world.is_main and rank == 0:
        report(ranks, findings, times, backend.thread_level(), as_json)
    job.leave_together(int(any(finding.level == "mend" for finding in findings)))


def join(facts: Facts, rank: int, launched: int) -> World:
    """The job, or an end with a word after half a minute. Collective."""
    late = f"rank {rank} of {launched} ({facts.host}) could not join within {JOIN_SECONDS} s. {_network(facts)}"
    with patience(JOIN_SECONDS, late):
        from hvd_eurosat.cluster import job

        world = job.join()
        world.gather(rank)  # joining is lazy: only now must they reach each other
    return world


@contextlib.contextmanager
def patience(seconds: float, message: str) -> Iterator[None]:
    """What is not done within so many seconds ends this rank, with a word."""

    def give_up() -> None:
        sys.stderr.write(f"error: {message}\n")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def _network(facts: Facts) -> str:
    return (
        f"It has {_interfaces(facts)}: name the one that all hosts share, by launch/mpirun.sh --interface "
        f"(OMPI_MCA_btl_tcp_if_include, NCCL_SOCKET_IFNAME)"
    )


def report(
    ranks: Sequence[Facts], findings: Sequence[Finding], times: Mapping[str, float], level: str, as_json: bool
) -> None:
    """Everything on standard output."""
    healthy = not any(finding.level == "mend" for finding in findings)
    if as_json:
        everything = {
            "healthy": healthy,
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "milliseconds": dict(times),
            "thread_level": level,
            "ranks": [dataclasses.asdict(facts) for facts in ranks],
        }
        print(json.dumps(everything, indent=2), flush=True)
        return
    console = Console(force_terminal=False, width=120)
    tables = _facts(ranks[0], times, level).items()
    console.print(*(_table(title, rows) for title, rows in tables if rows), _ranks(ranks))
    for finding in findings:
        print(f"{finding.level}: {finding.where}: {finding.what}\n      cure: {finding.cure}")
    count = sum(finding.level == "mend" for finding in findings)
    print(f"to be mended: {count or 'nothing'}", flush=True)


def _facts(facts: Facts, times: Mapping[str, float], level: str) -> dict[str, dict[str, str]]:
    """Rank 0's facts, as titled tables of names and values."""
    built = facts.libraries.get("horovod_built", {})
    return {
        "versions": facts.versions,
        "libraries": {
            "Horovod": ", ".join(name for name, is_in in built.items() if is_in) or facts.libraries.get("error", ""),
            "MPI": f"{facts.libraries.get('mpi', '')}, threads {level or 'unknown'}",
            "of mpi4py": ", ".join(facts.libraries.get("mpi4py_mpi", [])),
            "of Horovod": ", ".join(facts.libraries.get("horovod_mpi", [])),
            "mpirun": _mpirun(facts.own_mpirun),
            "on PATH": _mpirun(facts.mpirun),
        },
        f"host {facts.host}": {
            "system": facts.system,
            "cores": f"{facts.cores_given} given, bound to {_numbers(facts.cores)}",
            "GPUs": (", ".join(facts.gpus) or f"none ({facts.nvidia_devices} devices)")
            + (f", driver {facts.driver}" if facts.driver else ""),
            "memory": f"{facts.memory / GIB:.1f} GiB, {facts.memory_available / GIB:.1f} GiB free",
            "/dev/shm": f"{facts.shared_memory / GIB:.2f} GiB",
            "limits": f"{facts.open_files} open files, locked memory {_limit(facts.locked_memory)}",
            "interfaces": _interfaces(facts),
        },
        "settings": facts.settings,
        "trials": {name: f"{milliseconds:.2f} ms" for name, milliseconds in times.items()},
    }


def _mpirun(found: Mpirun) -> str:
    return f"{found.path}, {found.version}" if found.path else "none"


def _interfaces(facts: Facts) -> str:
    return ", ".join(f"{name} {' '.join(of)}" for name, of in facts.interfaces.items())


def _limit(size: int) -> str:
    return "unlimited" if size < 0 else f"{size // 1024} KiB"


def _numbers(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores)) if len(cores) < 9 else f"{len(cores)} of them, {cores[0]} to {cores[-1]}"


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ranks(ranks: Sequence[Facts]) -> Table:
    table = Table("rank", "host", "cores", "GPU", "free memory", title="ranks", title_justify="left", box=box.SIMPLE)
    for rank, facts in enumerate(ranks):
        free = f"{facts.memory_available / GIB:.1f} GiB"
        table.add_row(str(rank), facts.host, _numbers(facts.cores), facts.gpu or "none", free)
    return table


if __name__ == "__main__":
    main()
