"""The benchmark starts its jobs, and its subcommands write into one file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hvd_eurosat.benchmarks import launcher
from hvd_eurosat.benchmarks.settings import GpuSettings
from tests.parallel.conftest import HANGS, SMALL, command, run, survivors, variables, wait_for

JOB = "hvd_eurosat.benchmarks.job"


def flags(data: Path, folder: Path, steps: int) -> list[str]:
    """For the smallest jobs."""
    words = [
        *SMALL,
        "--data.root",
        data,
        "--data.image_size",
        32,
        "--train.batch_size",
        10,
        "--run.dir",
        folder,
        "--steps",
        steps,
    ]
    return list(map(str, words))


@pytest.mark.long
def test_step_memory_and_data(warm: str, data: Path, tmp_path: Path) -> None:
    words = command("mpirun", 2, "benchmark", "step", *flags(data, tmp_path, 1), python=warm)
    job = run(words, HVD_EUROSAT_TRAIN__BATCH_SIZE="999")  # flags win
    assert job.returncode == 0, job.stderr
    for what in ("memory", "data"):
        job = run(command("python", 1, "benchmark", what, *flags(data, tmp_path, 1), python=warm))
        assert job.returncode == 0, job.stderr
    assert (tmp_path / "benchmark.png").exists()
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert sorted(found) == ["data", "memory", "step"]
    for mode in ("bn+head", "all"):
        of = found["step"][mode]
        assert of["ranks"] == 2
        for name in ("ours", "baseline", "strong"):
            assert 0 < of[name]["min"] <= of[name]["median"] <= of[name]["max"]
        assert of["ratio"] == of["ours"]["median"] / of["baseline"]["median"]
        assert all(0 <= share < 1 for share in of["share"].values())
    one, four = (found["memory"][ranks] for ranks in ("1", "4"))
    assert four["images_mb"] < 1.2 * one["images_mb"]
    assert four["peak_pss_mb"] > 50
    read = found["data"]["bn+head"]
    assert read["cached"]["memory"] == 1
    assert all(read["beside"][place]["kept"] > 0 for place in ("none", "memory", "disk"))


def test_a_rank_of_a_job_is_killed(warm: str, data: Path, tmp_path: Path) -> None:
    """In the second job: what the first found is kept."""
    words = command("python", 1, "benchmark", "memory", *flags(data, tmp_path, 20), python=warm)
    with subprocess.Popen(words, env=variables(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.glob(".job-*/*.begin.3")))
        rank = next(
            p
            for p in map(psutil.Process, survivors(tmp_path))
            if p.cmdline()[0] == sys.executable and JOB in p.cmdline()
        )
        rank.kill()
        _, errors = process.communicate()
    log = tmp_path / "benchmark.log"
    assert process.returncode == 1
    assert errors.splitlines()[-1] == f"error: job, np 4: it ended with status 137; what it said is in {log}"
    assert "signal 9" in log.read_text()
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["memory"]) == ["1"]
    assert (tmp_path / "benchmark.png").exists()


def test_ended_it_ends_its_job(warm: str, data: Path, tmp_path: Path) -> None:
    words = command("python", 1, "benchmark", "memory", *flags(data, tmp_path, 10_000), python=warm)
    process = subprocess.Popen(words, env=variables(), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob(".job-*/*.begin.0")))
    process.terminate()
    assert process.wait(HANGS) == 143
    wait_for(lambda: not survivors(tmp_path))
    assert not list(tmp_path.glob(".job-*"))


def test_it_does_not_measure_uncompiled_what_is_to_be_compiled(warm: str, data: Path, tmp_path: Path) -> None:
    words = [*flags(data, tmp_path, 1), "--train.compile", "true"]
    job = run(
        command("python", 1, "benchmark", "memory", *words, python=warm),
        CXX="/nowhere/g++",
    )
    assert job.returncode == 2
    assert job.stderr.splitlines()[-1].endswith(" has no working /nowhere/g++")


def test_a_whole_run_by_its_own_records(monkeypatch: pytest.MonkeyPatch, warm: str, data: Path, tmp_path: Path) -> None:
    """That of `benchmark gpu`, which would download no weights; on cores."""
    monkeypatch.setattr(sys, "executable", warm)
    settings = GpuSettings(
        model={"arch": "resnet18"}, data={"root": data, "image_size": 32}, run={"dir": tmp_path}, train={"epochs": 9}
    )
    began = time.perf_counter()
    took = launcher.Launcher.of(settings).trained({"model.trainable": "head", "train.epochs": 2})
    assert 0 < took["training"] + took["validation"] < took["all"] < time.perf_counter() - began
    assert took["start_up"] > 0
    assert not list(tmp_path.glob(".job-*"))
