"""The benchmark over two hosts, one of them behind a slow link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvd_eurosat.benchmarks.settings import MODES
from tests.parallel.conftest import SMALL
from tests.system.conftest import Launch
from tests.system.hosts import Host
from tests.system.links import limit

TINY = (*SMALL, "--data.image_size", 32, "--train.batch_size", 10, "--steps", 1)


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_step_over_a_slow_link(
    launch: Launch, hosts: dict[str, Host], data: Path, tmp_path: Path, controller: str
) -> None:
    flags = [*TINY, "--data.root", data, "--run.dir", tmp_path]
    limit(hosts["b"], 0.3)
    try:
        words = ("benchmark", "step", "--hosts", "a:1,b:1", "--interface", "eth0", *flags)
        job = launch("horovodrun", "--hosts", "a:1", *words, timeout=540, HOROVOD_CONTROLLER=controller)
    finally:
        limit(hosts["b"], 0)
    assert job.returncode == 0, job.stderr
    step = json.loads((tmp_path / "benchmark.json").read_text())["step"]
    assert (step["all"]["ranks"], step["all"]["controller"]) == (2, controller)
    assert step["all"]["share"]["communication"] > step["bn+head"]["share"]["communication"]


def test_scaling_and_projection_over_hosts(launch: Launch, hosts: dict[str, Host], data: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data.root", data, "--run.dir", tmp_path]
    for what in ("scaling", "project"):
        words = ("benchmark", what, "--hosts", "a:1,b:1", "--interface", "eth0", *flags)
        job = launch("horovodrun", "--hosts", "a:1", *words, timeout=540, HOROVOD_CONTROLLER="gloo")
        assert job.returncode == 0, job.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    for mode in MODES:
        one, two = (found["scaling"][mode][ranks] for ranks in ("1", "2"))
        assert one["efficiency"] == 1
        assert 0 < two["min"] <= two["efficiency"] <= two["max"]
        assert 0 < two["lockstep"] <= 1
        (point,) = found["project"][mode]["points"]
        assert 0 < point["communication_ms"] < point["measured_ms"]
        assert point["predicted_ms"] > 0
        assert all(0 < each["efficiency"] <= 1 for each in found["project"][mode]["projection"])
