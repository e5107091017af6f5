"""Which hosts a job has: those that it was told, or those that a scheduler gave it, and which of them is this machine.

python -m hvd_eurosat.cluster.hosts --hosts node1:8,node2:8     what launch/*.sh read: lines of NAME=value

Told is the list of --hosts or the file --hostfile (cluster/hostlist.py says what may stand there). Else they are those
of Slurm, PBS, LSF or Grid Engine, by the variables that these set in a job; else this machine, with --np ranks.

Sources: the manual pages sbatch(1), srun(1) and sge_pe(5); qsub of PBS Professional; LSF's environment variables.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_eurosat.cluster.hostlist import BETWEEN, Host, expand, parse
from hvd_eurosat.errors import UserError

SCHEDULERS = {  # by the variable that names a file of theirs, in which a host stands once for each rank
    "PBS_NODEFILE": "PBS gave no more: ask for mpiprocs=N in each chunk, or say --hosts",
    "LSB_DJOB_HOSTFILE": "LSF gave no more: ask for bsub -n N, or say --hosts",
    "PE_HOSTFILE": "Grid Engine gave no more: ask for qsub -pe NAME N, or say --hosts",
}
MCPU = "LSB_MCPU_HOSTS"  # LSF's: host, slots, host, slots, …
TASKS = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_GPU")
INTERACTIVE_STEP = "4294967290"  # salloc's own shell, which is a step of one task, and not the job's (slurm.h)
ASK_SLURM = "Slurm gave no more: ask for --ntasks-per-node=N, or say --hosts"


@dataclass(frozen=True)
class Allocation:
    """What a job was told or given. cure: what to do where that is too little."""

    hosts: list[Host]
    cure: str = ""


@functools.cache
def is_here(name: str) -> bool:
    """Whether a name or an address is this machine's: localhost, its own names, addresses, or what resolves to them."""
    own = socket.gethostname()
    return name.lower() in ("localhost", own.lower(), _label(own)) or any(map(_is_own, addresses(name)))


@functools.cache
def addresses(name: str) -> frozenset[str]:
    """Those that a name resolves to; none where it does not."""
    try:
        return frozenset(str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM))
    except (OSError, UnicodeError):
        return frozenset()


def _is_own(address: str) -> bool:
    """Whether the kernel would reach an address from that same address. Nothing is sent."""
    ip = ipaddress.ip_address(address)
    if ip.is_loopback or ip.is_unspecified:
        return ip.is_loopback
    with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == ip
        except OSError:
            return False


def find(hosts: str | None, hostfile: str | None, ranks: int | None, environment: Mapping[str, str]) -> Allocation:
    """The hosts of a job. Raises UserError, which names the option, the variable or the file and its line."""
    if hosts is not None and hostfile is not None:
        raise UserError("--hosts and --hostfile: give one of them")
    if hosts is not None:
        return Allocation(parse(hosts, "--hosts", is_here))
    if hostfile is not None:
        return Allocation(parse(_read(Path(hostfile), f"--hostfile {hostfile}"), f"--hostfile {hostfile}", is_here))
    if environment.get("SLURM_JOB_ID"):
        return Allocation(of_slurm(environment, ranks), ASK_SLURM)
    for variable, cure in SCHEDULERS.items():
        if path := environment.get(variable):
            where = f"{variable} {path}"
            return Allocation(parse(_read(Path(path), where), where, is_here), cure)
    if listed := environment.get(MCPU):
        return Allocation(parse(listed, MCPU, is_here), SCHEDULERS["LSB_DJOB_HOSTFILE"])
    if ranks is None:
        raise UserError("how many ranks, and where? --np N here, or --hosts name:slots,…")
    return Allocation([Host("localhost", ranks, here=True)])


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text in UTF-8: save it as such") from None


def of_slurm(environment: Mapping[str, str], ranks: int | None) -> list[Host]:
    """The nodes of this Slurm job, or of its step that this is a shell of, and how many ranks each takes.

    They are the tasks that were asked for; else one for each GPU of a node; else as many as Slurm counts (of a shell's
    step, its own single task is no one's wish). Raises UserError where Slurm does not say, or where GPUs would idle and
    nobody said how many ranks there are to be.
    """
    job = environment["SLURM_JOB_ID"]
    if environment.get("SLURM_HET_SIZE", "1") != "1":
        raise UserError(f"Slurm job {job} has several parts (a heterogeneous job): say --hosts name:slots,…")
    nodes, counted, asked = _layout(environment)
    if not nodes:
        raise UserError(f"Slurm job {job} does not name its nodes (SLURM_JOB_NODELIST): say --hosts name:slots,…")
    gpus, all_gpus = _gpus_on_node(environment), _count(environment.get("SLURM_GPUS", ""))
    if gpus and all_gpus and all_gpus != gpus * len(nodes):
        raise UserError(f"{all_gpus} GPUs are not as many on each of {len(nodes)} nodes: ask for --gpus-per-node=N")
    tasks = [gpus] * len(nodes) if gpus and not asked else counted or [1] * len(nodes)
    if len(tasks) != len(nodes):
        raise UserError(
            f"Slurm job {job} has {len(nodes)} nodes, and tasks for {len(tasks)} (SLURM_JOB_NODELIST, "
            f"SLURM_TASKS_PER_NODE): say --hosts name:slots,…"
        )
    if ranks is None and gpus > min(tasks):
        few = f"{gpus} GPUs on a node, for which {min(tasks)} tasks are too few"
        raise UserError(f"{few}: ask for --ntasks-per-node={gpus}, or say --np N")
    with ThreadPoolExecutor(32) as pool:
        here = pool.map(is_here, nodes)
        return [Host(name, count, own) for name, count, own in zip(nodes, tasks, here, strict=True)]


def _layout(environment: Mapping[str, str]) -> tuple[list[str], list[int], bool]:
    """The nodes, the tasks of each (none: not said), and whether these were asked for."""
    step = environment.get("SLURM_STEP_ID", INTERACTIVE_STEP) != INTERACTIVE_STEP
    names = ("SLURM_STEP_NODELIST",) if step else ()
    counts = ("SLURM_STEP_TASKS_PER_NODE",) if step else ()
    listed = _first(environment, *names, "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    told = _first(environment, *counts, "SLURM_TASKS_PER_NODE")
    try:
        nodes = [name for word in BETWEEN.split(listed) if word for name in expand(word)]
        tasks = [int(one[1]) for one in map(_TASKS.fullmatch, told.split(",")) if one for _ in range(int(one[2] or 1))]
    except ValueError:
        raise UserError(f"SLURM_JOB_NODELIST is {listed}: these are no names of nodes") from None
    if step:
        return nodes, tasks, sum(tasks) > len(tasks)
    return nodes, tasks, any(environment.get(variable) for variable in TASKS)


_TASKS = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")  # 8(x2)


def _first(environment: Mapping[str, str], *variables: str) -> str:
    return next(filter(None, map(environment.get, variables)), "")


def _gpus_on_node(environment: Mapping[str, str]) -> int:
    """Those that Slurm gave this job on this node; where it does not say, those that were asked for on each."""
    if environment.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        return int(environment["SLURM_GPUS_ON_NODE"])
    return _count(environment.get("SLURM_GPUS_PER_NODE", ""))


def _count(gpus: str) -> int:
    """8 of 8, of a100:8 and of a100:4,h100:4."""
    return sum(map(int, re.findall(r"([0-9]+)(?:,|$)", gpus)))


def job_nodes(environment: Mapping[str, str]) -> list[str]:
    """All nodes of this Slurm job, also those that its step here lacks."""
    nodes, _, _ = _layout({**environment, "SLURM_STEP_ID": INTERACTIVE_STEP})
    return nodes


def among_nodes(hosts: list[Host], environment: Mapping[str, str]) -> list[Host]:
    """The hosts by the names that this Slurm job has for them. Raises UserError for one that is no node of it."""
    nodes = job_nodes(environment)
    found = []
    for host in hosts:
        same = [node for node in nodes if node.lower() == host.name.lower() or (host.here and is_here(node))]
        same = same or [node for node in nodes if _label(node) == _label(host.name)]
        if len(same) != 1:
            job = f"Slurm job {environment['SLURM_JOB_ID']}, which has {', '.join(nodes)}"
            raise UserError(f"host {host.name} is no node of {job}: name those, or leave --hosts out")
        found.append(replace(host, name=same[0]))
    return found


def cut_alike(hosts: Sequence[Host]) -> bool:
    """Whether names differ behind their first dot alone, at which Open MPI cuts them if it is not told otherwise.

    Raises UserError for two such names of one machine.
    """
    alike: dict[str, list[str]] = {}
    for host in hosts:
        if not re.fullmatch("[0-9.]+", host.name):
            alike.setdefault(_label(host.name), []).append(host.name)
    several = [names for names in alike.values() if len(names) > 1]
    for first, *others in several:
        for other in others:
            if addresses(first) & addresses(other):
                raise UserError(f"hosts {first} and {other} have one address: name it once, with all its slots")
    return bool(several)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the launchers go by, or one line of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hvd_eurosat.cluster.hosts", allow_abbrev=False)
    parser.add_argument("--hosts")
    parser.add_argument("--hostfile")
    parser.add_argument("--np")
    parser.add_argument("--by-slurm", action="store_true", help="Slurm starts the ranks, on nodes of its job alone")
    told = parser.parse_args(argv)
    try:
        if told.np is not None and not re.fullmatch("[1-9][0-9]{0,8}", told.np):
            raise UserError(f"--np {told.np} is no number of ranks")
        ranks = int(told.np) if told.np else None
        for facts in _facts(told.hosts, told.hostfile, ranks, told.by_slurm):
            print(facts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _facts(hosts: str | None, hostfile: str | None, ranks: int | None, by_slurm: bool) -> list[str]:
    found = find(hosts, hostfile, ranks, os.environ)
    if found.cure and ranks and len(found.hosts) == 1 and found.hosts[0].here:
        found = Allocation([replace(found.hosts[0], slots=ranks)])  # a scheduler's count of tasks here is no limit
    named = among_nodes(found.hosts, os.environ) if by_slurm else [_reachable(host) for host in found.hosts]
    listed = ",".join(f"{host.name}:{host.slots}" for host in named)
    total = sum(host.slots for host in named)
    if ranks and ranks > total:
        cure = f" ({found.cure})" if found.cure else ""
        raise UserError(f"--np {ranks} is more than the {total} slots of {listed}{cure}")
    same = len({host.slots for host in named}) == 1
    slots = {host.name: host.slots for host in named}
    nodes = job_nodes(os.environ) if by_slurm else []
    return [
        f"HOSTS={listed}",
        f"NAMES={','.join(host.name for host in named)}",
        f"NODES={','.join(nodes)}",
        f"NODE_SLOTS={','.join(str(slots.get(node, 1)) for node in nodes)}",
        f"EACH={named[0].slots if same else ''}",
        f"RANKS={ranks or total}",
        f"HERE={next((host.name for host in named if host.here), '')}",
        f"FULL_NAMES={'yes' if cut_alike(named) else ''}",
    ]


def _reachable(host: Host) -> Host:
    """This machine by a name that every launcher takes for it; Open MPI 5 knows it by few of its addresses."""
    named = _label(host.name) == _label(socket.gethostname()) and addresses(host.name)
    return replace(host, name="localhost") if host.here and not named else host


def _label(name: str) -> str:
    """What stands before the first dot."""
    return name.lower().partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
