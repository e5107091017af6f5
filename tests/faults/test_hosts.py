"""Ranks on several hosts (network namespaces), whose links are cut, slow, or come back."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import EPOCHS, STEP, STEPS, environment, events, flags
from tests.parallel.conftest import BIN, summary
from tests.system.conftest import hosts as hosts
from tests.system.hosts import Host

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
    variables = environment(FAULT=fault)
    forwarded = [word for name in ("FAULT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PATH") for word in ("-x", name)]
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
    """The ranks on both sides end, not only those that mpirun still reaches. (mpirun itself may wait for its daemon.)"""
    arguments = flags(data, tmp_path / "run", run__watchdog_seconds=WATCHDOG)
    job = start(links, tmp_path, f"1 {STEPS + 2} {STEP} cut", *arguments)
    while not (tmp_path / "fault").exists():
        assert job.poll() is None
        time.sleep(0.1)
    while ranks(links):
        time.sleep(0.1)
    late = time.time() - float((tmp_path / "fault").read_text())
    print(f"a link is cut: ranks on both sides gone after {late:.1f} s")
    assert late < WATCHDOG + 10
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


def test_a_host_is_lost_and_comes_back(links: dict[str, Host], data: Path, tmp_path: Path) -> None:
    """Elastic: training goes on with the ranks that are left, and with the host again when it is back."""
    ssh = next(tmp_path.parent.glob("hosts*/bin"))
    discovery = tmp_path / "hosts.sh"
    discovery.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts.txt\n")
    discovery.chmod(0o755)
    (tmp_path / "hosts.txt").write_text("a:1\nb:1\nc:1\n")
    variables = environment(HOROVOD_GLOO_TIMEOUT_SECONDS="10")
    job = [str(BIN / "horovodrun"), "--gloo", "-np", "3", "--min-np", "2", "--max-np", "3"]
    job += ["--host-discovery-script", str(discovery), "--network-interfaces", "eth0"]
    job += ["--blacklist-cooldown-range", "5", "10", sys.executable, "-m", "hvd_eurosat.train"]
    epochs = 40
    arguments = flags(data, tmp_path / "run", train__epochs=epochs, run__watchdog_seconds=WATCHDOG)
    results: list[subprocess.CompletedProcess[str]] = []

    def start() -> None:
        path = f"{ssh}:{variables['PATH']}"
        results.append(links["a"].run([*job, *arguments], 280, **{**variables, "PATH": path}))

    thread = threading.Thread(target=start)
    thread.start()

    def wait_for(epoch: int) -> None:
        while thread.is_alive() and len(events(tmp_path / "run", "train")) < epoch:
            time.sleep(0.2)

    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.5)
        assert thread.is_alive()
    wait_for(2)
    (tmp_path / "hosts.txt").write_text("a:1\nb:1\n")
    links["c"].run(["ip", "link", "set", "eth0", "down"])
    wait_for(10)
    links["c"].run(["ip", "link", "set", "eth0", "up"])
    (tmp_path / "hosts.txt").write_text("a:1\nb:1\nc:1\n")
    thread.join()
    assert results[0].returncode == 0, results[0].stderr
    assert [event["epoch"] for event in events(tmp_path / "run", "train")] == list(range(1, epochs + 1))
    assert EPOCHS
