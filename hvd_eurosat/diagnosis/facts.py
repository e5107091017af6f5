"""What one rank sees of its host, its software and its settings; nothing here joins a job or can hang."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("hvd_eurosat", "torch", "torchvision", "horovod", "mpi4py", "numpy")
SETTINGS = re.compile(r"HOROVOD_|HVD_EUROSAT_|OMPI_MCA_|OMPI_ALLOW|NCCL_|UCX_|OMP_|CUDA_VISIBLE|MPI4PY_")
OF_THE_LAUNCHER = re.compile(
    r"HOROVOD_(RANK|SIZE|LOCAL_|CROSS_|HOSTNAME|GLOO_RENDEZVOUS)|OMPI_MCA_(ess|orte|initial|pmix|hwloc|rmaps)"
)
LIBRARIES_SECONDS = 60
REINSTALL = "make setup, or launch/install.sh again"


@dataclass(frozen=True)
class Mpirun:
    """A mpirun: its path and what it calls itself ("" where there is none)."""

    path: str
    version: str

    @property
    def major(self) -> int | None:
        """Of Open MPI; None for any other MPI."""
        found = re.search(r"\(Open MPI\) (\d+)", self.version)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Facts:
    """One rank's view. Sizes are in bytes; `libraries` is what backend.libraries says, or {"error": …, "cure": …}.

    nvidia_devices: GPUs that this process may open; driver: NVIDIA's; cuda_trouble: why torch sees none, or cannot use
    this rank's.
    """

    host: str
    system: str
    root: bool
    versions: dict[str, str]
    libraries: dict[str, Any]
    mpirun: Mpirun
    own_mpirun: Mpirun
    ssh: bool
    nvidia_devices: int
    driver: str
    cuda_trouble: str
    gpus: list[str]
    gpu: str | None
    cores: list[int]
    cores_given: int
    memory: int
    memory_available: int
    open_files: int
    locked_memory: int
    infiniband: bool
    infiniband_usable: bool
    shared_memory: int
    temporary: str
    temporary_writable: bool
    interfaces: dict[str, list[str]]
    settings: dict[str, str]


def collect() -> Facts:
    """This rank's facts, in some seconds."""
    import torch  # seconds, which doctor --help does not take

    from hvd_eurosat.cluster import device, node

    memory = psutil.virtual_memory()
    temporary = os.environ.get("TMPDIR", "/tmp")
    return Facts(
        host=socket.gethostname(),
        system=platform.platform(),
        root=os.geteuid() == 0,
        versions=_versions(),
        libraries=_libraries(),
        mpirun=_mpirun(shutil.which("mpirun")),
        own_mpirun=_mpirun(shutil.which("mpirun", path=str(Path(sys.executable).parent))),
        ssh=shutil.which("ssh") is not None,
        nvidia_devices=device.granted(),
        driver=device.driver(),
        cuda_trouble=device.visible()[1],
        gpus=[torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        gpu=None,
        cores=sorted(os.sched_getaffinity(0)),
        cores_given=len(os.sched_getaffinity(os.getppid())),
        memory=min(memory.total, node.memory_limit() or memory.total),
        memory_available=memory.available,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=Path("/sys/class/infiniband").is_dir(),
        infiniband_usable=Path("/dev/infiniband").is_dir() and _loads("libibverbs.so.1"),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        temporary=temporary,
        temporary_writable=os.access(temporary, os.W_OK),
        interfaces=_interfaces(),
        settings={k: v for k, v in sorted(os.environ.items()) if SETTINGS.match(k) and not OF_THE_LAUNCHER.match(k)},
    )


def _versions() -> dict[str, str]:
    import torch

    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    versions["CUDA of torch"] = str(torch.version.cuda)
    if torch.version.cuda:
        versions["cuDNN"] = str(torch.backends.cudnn.version())
        versions["NCCL of torch"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _libraries() -> dict[str, Any]:
    """In a process of its own: libraries that do not fit together crash the one that loads them."""
    script = "import json; from hvd_eurosat.cluster import backend; print(json.dumps(backend.libraries()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=LIBRARIES_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        cure = "look whether this machine, or the disk that .venv is on, is busy, and try again; else " + REINSTALL
        return {"error": f"importing them takes more than {LIBRARIES_SECONDS} s", "cure": cure}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
    return {"error": last, "cure": REINSTALL}


def _mpirun(path: str | None) -> Mpirun:
    if path is None:
        return Mpirun("", "")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Mpirun(path, f"does not run ({error})")
    lines = (done.stdout or done.stderr).strip().splitlines() or ["says nothing"]
    return Mpirun(path, " ".join(line.strip() for line in lines[:2] if line))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _interfaces() -> dict[str, list[str]]:
    """IPv4 addresses of the interfaces that are up; a container engine's bridge has the same on every host."""
    states = psutil.net_if_stats()
    found = {}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        if name in states and states[name].isup:
            bridge = ["(bridge)"] if Path("/sys/class/net", name, "bridge").is_dir() else []
            found[name] = [a.address for a in addresses if a.family == socket.AF_INET] + bridge
    return found
