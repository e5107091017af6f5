"""The benchmark starts its jobs, and its subcommands write into one file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import psutil

from tests.parallel.conftest import SMALL, Launch, command, survivors, wait_for


def test_step_and_memory(launch: Launch, data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data.root", data, "--train.batch_size", 10, "--run.dir", tmp_path, "--steps", 1]
    job = launch("mpirun", 2, "benchmark", "step", *flags, HVD_EUROSAT_TRAIN__BATCH_SIZE="999")  # flags win
    assert job.returncode == 0, job.stderr
    job = launch("python", 1, "benchmark", "memory", *flags)
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "benchmark.png").exists()
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert sorted(found) == ["memory", "step"]
    for mode in ("bn+head", "all"):
        of = found["step"][mode]
        assert of["ranks"] == 2
        for name in ("ours", "baseline", "strong"):
            assert 0 < of[name]["min"] <= of[name]["median"] <= of[name]["max"]
        assert of["ratio"] == of["ours"]["median"] / of["baseline"]["median"]
        assert all(0 <= share < 1 for share in of["share"].values())
    one, four = (found["memory"][ranks] for ranks in ("1", "4"))
    assert four["images_mb"] < 1.2 * one["images_mb"]
    assert four["peak_pss_mb"] > 100


def test_a_rank_of_a_job_is_killed(data: Path, tmp_path: Path) -> None:
    """In the second job: what the first found is kept."""
    flags = [*SMALL, "--data.root", data, "--train.batch_size", 10, "--run.dir", tmp_path, "--steps", 20]
    words = command("python", 1, "benchmark", "memory", *flags)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as benchmark:
        wait_for(lambda: list(tmp_path.glob(".job-*/*.begin.3")))
        job = "hvd_eurosat.benchmarks.job"
        ranks = [p for p in map(psutil.Process, survivors(tmp_path)) if p.cmdline()[1:3] == ["-m", job]]
        ranks[0].kill()
        _, errors = benchmark.communicate(timeout=60)
    log = tmp_path / "benchmark.log"
    assert benchmark.returncode == 1
    assert errors.splitlines()[-1] == f"error: job, np 4: it ended with status 137; what it said is in {log}"
    assert "signal 9" in log.read_text()
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["memory"]) == ["1"]
    assert (tmp_path / "benchmark.png").exists()


def test_ended_it_ends_its_job(data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data.root", data, "--train.batch_size", 10, "--run.dir", tmp_path, "--steps", 10_000]
    benchmark = subprocess.Popen(command("python", 1, "benchmark", "memory", *flags), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob(".job-*/*.begin.0")))
    benchmark.terminate()
    assert benchmark.wait(30) == 143
    wait_for(lambda: not survivors(tmp_path))
    assert not list(tmp_path.glob(".job-*"))


def test_it_does_not_measure_uncompiled_what_is_to_be_compiled(launch: Launch, data: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data.root", data, "--run.dir", tmp_path, "--train.compile", "true", "--steps", 1]
    job = launch("python", 1, "benchmark", "memory", *flags, CXX="/nowhere/g++")
    assert job.returncode == 2
    assert job.stderr.splitlines()[-1].endswith(" has no working /nowhere/g++")
