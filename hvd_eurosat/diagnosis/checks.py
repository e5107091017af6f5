"""The known traps: each check looks at facts and, where one is sprung, says what is wrong and its cure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hvd_eurosat.diagnosis.facts import Facts

GIB = 2**30
MIN_SHARED_MEMORY = GIB // 4  # Docker gives 64 MB; NCCL and Open MPI want some 40 MB of it for each rank
MIN_OPEN_FILES = 1024
MIN_MEMORY = 2 * GIB
ROOT_VARIABLES = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
INTERFACE_SETTINGS = (
    "HOROVOD_GLOO_IFACE",
    "NCCL_SOCKET_IFNAME",
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_oob_tcp_if_include",
)


@dataclass(frozen=True)
class Finding:
    """Something that must be mended, or that one should know; `where` names a host or ranks."""

    level: Literal["mend", "warn"]
    where: str
    what: str
    cure: str


def installation(facts: Facts) -> Iterator[Finding]:
    """What would keep this rank from joining a job."""

    def mend(what: str, cure: str) -> Finding:
        return Finding("mend", facts.host, what, cure)

    found = facts.libraries
    if "error" in found:
        yield mend(f"Horovod or mpi4py cannot be imported: {found['error']}", found["cure"])
        return
    built = found["horovod_built"]
    if not built["MPI"]:
        yield mend("Horovod was built without MPI", "HOROVOD_WITH_MPI=1 when it is built: launch/install.sh does it")
    if not built["Gloo"]:
        yield mend("Horovod was built without Gloo", "HOROVOD_WITH_GLOO=1 when it is built: launch/install.sh does it")
    if facts.gpus and not built["NCCL"]:
        cure = "HOROVOD_GPU_OPERATIONS=NCCL when it is built: launch/install.sh does it where torch is a CUDA build"
        yield mend("Horovod was built without NCCL: gradients of GPUs would go through the host", cure)
    if built["MPI"] and found["mpi4py_mpi"] != found["horovod_mpi"]:
        cure = "unset MPI4PY_LIBMPI and MPI4PY_MPIABI; or build both for one MPI: SETUP_MPI=system launch/install.sh"
        mine, theirs = (", ".join(found[key]) for key in ("mpi4py_mpi", "horovod_mpi"))
        yield mend(f"mpi4py is of another MPI ({mine}) than Horovod ({theirs})", cure)


def _mpiruns(facts: Facts) -> Iterator[Finding]:
    mpirun = facts.own_mpirun if facts.own_mpirun.path else facts.mpirun
    if not mpirun.path:
        yield Finding("mend", facts.host, "there is no mpirun", "make setup, or module load openmpi/4.1")
    elif mpirun.major is None and "mpi4py_mpi" in facts.libraries and "Open MPI" in facts.libraries["mpi"]:
        cure = "put Open MPI 4.1's folder first on PATH: each rank of this one would be alone"
        yield Finding("mend", facts.host, f"{mpirun.path} is not Open MPI's ({mpirun.version})", cure)
    elif (mpirun.major or 0) >= 5:
        cure = "load Open MPI 4.1, or start by launch/mpirun.sh, which knows both"
        yield Finding("mend", facts.host, f"{mpirun.path} is Open MPI {mpirun.major}, which breaks horovodrun", cure)
    if facts.mpirun.path and facts.mpirun.version != mpirun.version:
        cure = f"type {mpirun.path}, or put its folder first on PATH"
        what = f"another MPI comes first on PATH: {facts.mpirun.path} ({facts.mpirun.version})"
        yield Finding("mend", facts.host, what, cure)


def machine(facts: Facts) -> Iterator[Finding]:
    """What is wrong with this host and the settings on it."""
    yield from _mpiruns(facts)
    yield from _graphics(facts)
    yield from _limits(facts)
    yield from _settings(facts)


def _graphics(facts: Facts) -> Iterator[Finding]:
    wanted, source = facts.nvidia_devices, "NVIDIA devices here"
    chosen = facts.settings.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:  # by a person, or by Slurm: what it hides is hidden on purpose
        named = list(itertools.takewhile(lambda one: one not in ("", "-1"), map(str.strip, chosen.split(","))))
        wanted, source = min(wanted, len(named)), f"NVIDIA devices in CUDA_VISIBLE_DEVICES={chosen}"
    hidden = wanted - len(facts.gpus)
    if hidden <= 0:
        if facts.gpus and facts.cuda_trouble:
            yield Finding("mend", facts.host, f"its GPU cannot be used: {facts.cuda_trouble}", "look at nvidia-smi")
        return
    seen = f"{wanted} {source}, of which torch sees {len(facts.gpus)}"
    if facts.versions["CUDA of torch"] == "None":
        yield Finding(
            "mend", facts.host, f"{seen}: this torch is a CPU build", "launch/install.sh brings the CUDA build"
        )
    else:
        cure = "look at nvidia-smi; a container needs docker run --gpus all, torch a driver for its CUDA"
        why = facts.cuda_trouble or "driver or container hides the others"
        yield Finding("mend", facts.host, f"{seen} (driver {facts.driver or 'unknown'}): {why}", cure)


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.root and not all(facts.settings.get(name) == "1" for name in ROOT_VARIABLES):
        cure = "export " + " ".join(f"{name}=1" for name in ROOT_VARIABLES)
        yield Finding("mend", facts.host, "Open MPI does not start for root", cure)
    if facts.shared_memory < MIN_SHARED_MEMORY:
        cure = "docker run --shm-size=1g (or --ipc=host); elsewhere mount -o remount,size=1g /dev/shm"
        yield Finding("mend", facts.host, f"/dev/shm has only {facts.shared_memory / 2**20:.0f} MiB", cure)
    if 0 <= facts.open_files < MIN_OPEN_FILES:
        cure = f"ulimit -n {MIN_OPEN_FILES * 64} before the launcher, or in limits.conf on every host"
        yield Finding("mend", facts.host, f"only {facts.open_files} files can be open", cure)
    if facts.infiniband and facts.gpus and not facts.infiniband_usable:
        cure = "apt-get install libibverbs1 ibverbs-providers; docker run --device /dev/infiniband --ulimit memlock=-1"
        what = "InfiniBand that NCCL cannot use (no libibverbs.so.1, or no /dev/infiniband): it takes TCP instead"
        yield Finding("warn", facts.host, what, cure)
    if facts.infiniband and facts.locked_memory >= 0:
        cure = "ulimit -l unlimited (limits.conf; slurmd and sshd must be restarted to pass it on)"
        what = f"InfiniBand, but only {facts.locked_memory // 1024} KiB of memory can be locked"
        yield Finding("mend", facts.host, what, cure)
    if not facts.temporary_writable:
        cure = "set TMPDIR to a writable folder on this host's own disk"
        yield Finding("mend", facts.host, f"TMPDIR {facts.temporary} cannot be written, and Open MPI needs it", cure)


def _settings(facts: Facts) -> Iterator[Finding]:
    def number(name: str) -> float | None:
        try:
            return float(facts.settings[name])
        except (KeyError, ValueError):
            return None

    hurts = {
        "HOROVOD_AUTOTUNE": (number("HOROVOD_AUTOTUNE") == 1, "tries settings during the run: slow, never repeatable"),
        "HOROVOD_CACHE_CAPACITY": (number("HOROVOD_CACHE_CAPACITY") == 0, "every step negotiates each tensor anew"),
        "HOROVOD_CYCLE_TIME": ((number("HOROVOD_CYCLE_TIME") or 0) > 20, "every allreduce waits that many ms"),
        "HOROVOD_FUSION_THRESHOLD": (
            (number("HOROVOD_FUSION_THRESHOLD") or 0) > 0,
            "sums depend on timing: runs do not repeat",
        ),
        "HOROVOD_STALL_CHECK_DISABLE": (
            number("HOROVOD_STALL_CHECK_DISABLE") == 1,
            "a stalled rank is not warned of",
        ),
        "HOROVOD_LOG_LEVEL": (
            facts.settings.get("HOROVOD_LOG_LEVEL", "").lower() in {"trace", "debug"},
            "every tensor is written about",
        ),
    }
    for name, (is_set, effect) in hurts.items():
        if is_set:
            yield Finding("mend", facts.host, f"{name}={facts.settings[name]}: {effect}", f"unset {name}")
    for name in INTERFACE_SETTINGS:
        for wanted in facts.settings.get(name, "").split(","):
            if wanted.strip("=") and not _is_there(wanted, facts.interfaces):
                cure = f"{name} is one of {', '.join(facts.interfaces)}"
                yield Finding("mend", facts.host, f"{name} names {wanted}, and no such interface is up", cure)


def _is_there(wanted: str, interfaces: dict[str, list[str]]) -> bool:
    """Open MPI also takes networks (10.0.0.0/8); NCCL a beginning, =name and ^not."""
    if "/" in wanted or wanted.startswith("^"):
        return True
    return any(name == wanted.lstrip("=") or name.startswith(wanted) for name in interfaces)


def across_ranks(ranks: Sequence[Facts], launched: int) -> Iterator[Finding]:
    """What is wrong between the ranks, in their order; `launched` is their number by the launcher's word."""
    if launched > len(ranks):
        cure = "use .venv/bin/mpirun or launch/mpirun.sh; srun needs --mpi=pmix"
        what = f"the launcher started {launched} ranks, which do not see each other"
        yield Finding("mend", ranks[0].host, what, cure)
    if launched == 1 and not ranks[0].ssh:
        what = "there is no ssh, by which mpirun reaches other hosts and without which a cluster's own does not start"
        yield Finding("warn", ranks[0].host, what, "apt-get install openssh-client")
    yield from _differences(ranks)
    for host, count in Counter(facts.host for facts in ranks).items():
        yield from _shared_host([facts for facts in ranks if facts.host == host], count)


def _differences(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Versions, builds and settings that are not rank 0's, said once for all ranks that share them."""

    def comparable(facts: Facts) -> dict[str, object]:
        versions = {f"version of {name}": version for name, version in facts.versions.items()}
        own = {"MPI": facts.libraries.get("mpi"), "mpirun": facts.own_mpirun.version or facts.mpirun.version}
        built = {"Horovod's build": str(facts.libraries.get("horovod_built")), "GPUs": ", ".join(facts.gpus)}
        settings = {f"setting {k}": v for k, v in facts.settings.items() if not k.startswith("OMPI_")}  # mpirun's care
        return {**versions, **own, **built, **settings}

    first = comparable(ranks[0])
    for key in sorted(set().union(*(comparable(facts) for facts in ranks))):
        others: dict[object, list[int]] = {}
        for rank, facts in enumerate(ranks):
            others.setdefault(comparable(facts).get(key), []).append(rank)
        for value, where in others.items():
            if value != first.get(key):
                hosts = ", ".join(sorted({ranks[rank].host for rank in where}))
                level: Literal["mend", "warn"] = "warn" if key.startswith("setting") else "mend"
                what = f"{key} is {value} here, {first.get(key)} on rank 0 ({ranks[0].host})"
                yield Finding(
                    level, f"ranks {_spans(where)} ({hosts})", what, "make the hosts alike: one .venv on a shared disk"
                )


def _spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _shared_host(ranks: Sequence[Facts], count: int) -> Iterator[Finding]:
    """What the ranks of one host share: cores, memory, GPUs."""
    host, cores = ranks[0].host, set().union(*(facts.cores for facts in ranks))
    if len(cores) < count:
        level: Literal["mend", "warn"] = "mend" if len(cores) < ranks[0].cores_given else "warn"
        cure = "mpirun --bind-to none, and no more ranks than cores"
        yield Finding(level, host, f"{count} ranks share {len(cores)} of {ranks[0].cores_given} cores", cure)
    elif len(cores) < ranks[0].cores_given:
        what = f"its ranks are bound to {len(cores)} of {ranks[0].cores_given} cores"
        yield Finding("warn", host, what, "mpirun --bind-to none: our ranks share out the cores")
    threads = ranks[0].settings.get("OMP_NUM_THREADS", "").split(",")[0]
    if threads.isdigit() and int(threads) * count > max(len(cores), count):
        what = f"OMP_NUM_THREADS={threads} for each of {count} ranks is more than its {len(cores)} cores"
        yield Finding("warn", host, what, "unset OMP_NUM_THREADS: our ranks share out the cores")
    if ranks[0].memory_available < MIN_MEMORY * count:
        what = f"{ranks[0].memory_available / GIB:.1f} GiB of memory are free for {count} ranks"
        yield Finding("warn", host, what, "2 GiB for each: fewer ranks, or a smaller train.batch_size")
    gpus = [facts.gpu for facts in ranks if facts.gpu]
    if len(set(gpus)) < len(gpus):
        cure = "one rank per GPU, or CUDA_VISIBLE_DEVICES= to train on the cores"
        yield Finding("mend", host, f"{count} ranks share {len(set(gpus))} GPUs", cure)
