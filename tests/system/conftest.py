"""Real hosts, a real Slurm, a real image. What is missing is a failure that names its package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parallel.conftest import data as data
from tests.system.hosts import Host, Job, network
from tests.system.image import ROOT, Image

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "chromium": "chromium",
}
Launch = Callable[..., Job]


def need(*tools: str) -> None:
    """Fail, naming the packages, unless the tools are here and we are root."""
    if os.geteuid() != 0:
        pytest.fail("tests/system make network namespaces and users: run them as root")
    missing = [PACKAGES[tool] for tool in tools if not shutil.which(tool)]
    if missing:
        pytest.fail(f"apt-get install --no-install-recommends {' '.join(missing)}")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    """Three hosts a, b and c, which no other worker of pytest-xdist sees."""
    need("sshd", "ssh", "ip", "nsenter")
    with network("abc", tmp_path_factory.mktemp("hosts")) as started:
        yield started


@pytest.fixture
def launch(hosts: dict[str, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """launch(script, *arguments): launch/<script>.sh on host a, one thread a rank. Leaves no process behind."""
    folder = next(Path(tmp_path_factory.getbasetemp()).glob("hosts*"))
    path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def start(script: str, *arguments: object, timeout: float = 240, **environment: str) -> Job:
        words = [str(ROOT / "launch" / f"{script}.sh"), *map(str, arguments)]
        variables = {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        return hosts["a"].run(words, timeout, **variables)

    yield start
    left = {name: host.processes() for name, host in hosts.items()}
    assert not any(left.values()), left


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """It is built: minutes."""
    need("buildah", "mmdebstrap")
    folder = tmp_path_factory.mktemp("image")
    try:
        made = Image(folder)
        yield made
        made.remove()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
