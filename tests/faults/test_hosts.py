"""Ranks on several hosts (network namespaces), whose links are cut or slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import STEP, STEPS, environment, flags
from tests.parallel.conftest import BIN, summary
from tests.system.conftest import hosts as hosts
from tests.system.hosts import Host
from tests.waiting import Moment

pytestmark = pytest.mark.slow
WATCHDOG = 15


@pytest.fixture
def links(hosts: dict[str, Host]) -> Iterator[dict[str, Host]]:
    """The hosts; their links are as they were afterwards, and nothing runs on them."""
    yield hosts
    for host in hosts.values():
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
        host.run(["ip", "link", "set", "eth0", "up"])
    deadline = time.monotonic() + 60
    while any(host.processes() for host in hosts.values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [line for host in hosts.values() for line in host.processes()]


def start(hosts: dict[str, Host], folder: Path, fault: str, *arguments: str) -> subprocess.Popen[str]:
    """The job on hosts a and b, started by mpirun on a."""
    ssh = next(folder.parent.glob("hosts*/bin"))
    variables = environment(FAULTS=json.dumps({str(folder / "run"): fault}))
    forwarded = [
        word for name in ("FAULTS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PATH") for word in ("-x", name)
    ]
    job = [str(BIN / "mpirun"), "-np", "2", "-H", "a:1,b:1", "--bind-to", "none", "--prefix", str(BIN.parent)]
    job += [*forwarded, "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]
    return subprocess.Popen(
        hosts["a"].command([*job, sys.executable, "-m", "tests.faults.inject", *arguments]),
        env={**variables, "PATH": f"{ssh}:{variables['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(hosts: dict[str, Host]) -> list[str]:
    """What runs of the job itself, without its launcher and daemons."""
    lines = [line for host in hosts.values() for line in host.processes()]
    return [line for line in lines if "tests.faults.inject" in line and "mpirun" not in line and "orted" not in line]


def test_a_link_is_cut(links: dict[str, Host], data: Path, tmp_path: Path) -> None:
    """The ranks on both sides end, not only those that mpirun still reaches. (mpirun itself may stay.)"""
    arguments = flags(data, tmp_path / "run", run__watchdog_seconds=WATCHDOG)
    job = start(links, tmp_path, f"1 {STEPS + 2} {STEP} cut", *arguments)
    while not (tmp_path / "run.fault").exists():
        assert job.poll() is None
        time.sleep(0.1)
    while ranks(links):
        time.sleep(0.1)
    cut = Moment(*json.loads((tmp_path / "run.fault").read_text()))
    print(f"a link is cut: ranks on both sides gone after {cut.passed():.1f} s")
    assert cut.unhindered() < WATCHDOG + 10
    for process in psutil.Process(job.pid).children(recursive=True):
        process.kill()
    _, said = job.communicate()
    assert "waited for the other ranks" in said


def test_a_slow_link_is_not_a_dead_one(links: dict[str, Host], data: Path, tmp_path: Path) -> None:
    """1 Mbit/s from the second step on."""
    arguments = flags(data, tmp_path / "run", run__watchdog_seconds=WATCHDOG)
    job = start(links, tmp_path, f"1 2 {STEP} slow-link", *arguments)
    _, said = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert summary(tmp_path / "run")["world_size"] == 2
