"""Which hosts a job has: those that it was told, or those that a scheduler gave it, and which of them is this machine.

python -m hvd_eurosat.cluster.hosts --hosts node1:8,node2:8     what launch/*.sh read: lines of NAME=value

Told is the list of --hosts or the file --hostfile (cluster/hostlist.py says what may stand there). Else they are those
of Slurm, PBS, LSF, Grid Engine or OAR, by the variables that these set in a job; else this machine, with --np ranks
or as many as it is for.

Sources: sge_pe(5) of Grid Engine, qsub of PBS Professional, the environment variables of LSF, oarsub(1) of OAR.
"""

from __future__ import annotations

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

from hvd_eurosat.cluster import slurm
from hvd_eurosat.cluster.hostlist import Host, parse
from hvd_eurosat.config.command import Parser
from hvd_eurosat.errors import UserError

OAR = "OAR gave no more: ask for oarsub -l nodes=N/core=N, or say --hosts"
SCHEDULERS = {  # by the variable that names a file of theirs, in which a host stands once for each rank
    "PBS_NODEFILE": "PBS gave no more: ask for mpiprocs=N in each chunk, or say --hosts",
    "LSB_DJOB_HOSTFILE": "LSF gave no more: ask for bsub -n N, or say --hosts",
    "PE_HOSTFILE": "Grid Engine gave no more: ask for qsub -pe NAME N, or say --hosts",
    "OAR_NODEFILE": OAR,
    "OAR_NODE_FILE": OAR,
}
MCPU = "LSB_MCPU_HOSTS"  # LSF's: host, slots, host, slots, …


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
        return Allocation(_of_slurm(environment, ranks), slurm.CURE)
    for variable, cure in SCHEDULERS.items():
        if path := environment.get(variable):
            where = f"{variable} {path}"
            return Allocation(parse(_read(Path(path), where), where, is_here), cure)
    if listed := environment.get(MCPU):
        return Allocation(parse(listed, MCPU, is_here), SCHEDULERS["LSB_DJOB_HOSTFILE"])
    if not ranks:
        from hvd_eurosat.cluster import node  # which takes seconds, for torch

        ranks = node.ranks_here()
    return Allocation([Host("localhost", ranks, here=True)])


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text in UTF-8: save it as such") from None


def _of_slurm(environment: Mapping[str, str], ranks: int | None) -> list[Host]:
    nodes = slurm.nodes_and_tasks(environment, ranks)
    with ThreadPoolExecutor(32) as pool:
        here = pool.map(is_here, (name for name, _ in nodes))
        return [Host(name, tasks, own) for (name, tasks), own in zip(nodes, here, strict=True)]


def among_nodes(hosts: list[Host], environment: Mapping[str, str]) -> list[Host]:
    """The hosts by the names that this Slurm job has for them. Raises UserError for one that is no node of it."""
    nodes = slurm.job_nodes(environment)
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
    parser = Parser(prog="python -m hvd_eurosat.cluster.hosts")
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
    nodes = slurm.job_nodes(os.environ) if by_slurm else []
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
