"""Loses nothing and never hangs: every fault is injected for real into a running job (see docs/reliability.md)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hvd_eurosat.errors import STOPPED
from tests.faults.conftest import EPOCHS, SAVE, STEP, STEPS, Inject, environment, events, fingerprint, flags, launched
from tests.parallel.conftest import summary

WATCHDOG = 10
EVALUATE = "hvd_eurosat.training.metrics:_evaluate"
PHASES = {
    "packing": "1 hvd_eurosat.data.packed:_write",
    "first step": f"1 {STEP}",
    "mid-epoch": f"{STEPS + 2} {STEP}",
    "validation": f"2 {EVALUATE}",
    "test": f"{EPOCHS + 1} {EVALUATE}",
}
slow = pytest.mark.slow


def resumed(inject: Inject, run_dir: Path, undisturbed: str) -> None:
    """Started again, the run ends as if nothing had happened."""
    job = inject(run_dir)
    assert job.returncode == 0, job.output
    assert fingerprint(run_dir) == undisturbed


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=slow)])
def test_a_rank_is_killed(inject: Inject, tmp_path: Path, undisturbed: str, launcher: str) -> None:
    job = inject(tmp_path / "run", f"1 {STEPS + 3} {STEP} kill", launcher, run__checkpoint_steps=1)
    assert job.returncode != 0
    assert job.late < 5
    resumed(inject, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("gloo", marks=slow)])
@pytest.mark.parametrize("action", ["stop", pytest.param("sleep", marks=slow), "gil"])
def test_a_rank_hangs(inject: Inject, tmp_path: Path, launcher: str, action: str) -> None:
    fault = f"1 {STEPS + 2} {STEP} {action}"
    job = inject(tmp_path / "run", fault, launcher, run__watchdog_seconds=WATCHDOG)
    assert job.returncode != 0
    assert WATCHDOG - 1 < job.late < WATCHDOG + 5
    named = [error for error in job.errors if "rank 1 of 2" in error]
    assert "made no progress for" in named[0]
    assert f"in epoch 2, step {STEPS + 2}; its threads:" in named[0]
    assert "line" in job.output
    assert "inject.py" in job.output


@slow
@pytest.mark.parametrize("action", ["stop", "sleep"])
@pytest.mark.parametrize("phase", ["validation", "test"])
def test_rank_0_hangs_while_the_others_wait(inject: Inject, tmp_path: Path, phase: str, action: str) -> None:
    job = inject(tmp_path / "run", f"0 {PHASES[phase]} {action}", run__watchdog_seconds=WATCHDOG)
    assert job.returncode != 0
    assert WATCHDOG - 1 < job.late < WATCHDOG + 5
    assert any("rank 0 of 2" in error and phase in error for error in job.errors)


def test_a_rank_of_an_elastic_job_hangs(inject: Inject, tmp_path: Path) -> None:
    """Its watchdog ends it, and the others go on."""
    patience = 2 * WATCHDOG  # the others' meeting again is not to be taken for hanging
    job = inject(tmp_path / "run", f"1 {STEPS + 2} {STEP} stop", "elastic", 3, run__watchdog_seconds=patience)
    assert job.returncode == 0, job.output
    (named,) = job.errors
    assert "rank 1 of 3" in named
    assert f"made no progress for {patience}" in named
    assert summary(tmp_path / "run")["world_size"] == 2
    assert [event["epoch"] for event in events(tmp_path / "run", "train")] == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("action", ["fail", pytest.param("exit", marks=slow)])
@pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in ("mid-epoch", "test") else slow) for p in PHASES])
def test_one_rank_fails(inject: Inject, tmp_path: Path, data: Path, phase: str, action: str) -> None:
    cache = {"data__cache_dir": tmp_path / "cache"}
    rank = 1 if phase in ("first step", "mid-epoch") else 0
    job = inject(tmp_path / "run", f"{rank} {PHASES[phase]} {action}", **cache)
    assert job.returncode == 1
    assert job.late < 5
    assert len(job.errors) == 1, job.output
    assert job.errors[0].startswith(f"error: the run failed (rank {rank} on ")
    assert ("planted" in job.output) == (action == "fail")


def test_rank_0_fails_while_it_saves(inject: Inject, tmp_path: Path) -> None:
    job = inject(tmp_path / "run", f"0 2 {SAVE} fail")
    assert job.returncode == 1
    assert "planted" in job.output
    assert job.errors == [error for error in job.errors if "(rank 0 on" in error]


@pytest.mark.parametrize(
    ("launcher", "fault", "status"),
    [
        ("mpirun", f"0 {STEPS + 2} {STEP} usr1-launcher", 75),
        ("mpirun", f"1 {STEPS + 3} {STEP} term", 75),
        ("mpirun", f"1 {STEPS + 3} {STEP} work-slowly-and-term-all", 75),
        ("mpirun", "1 1 hvd_eurosat.run.journal:Journal.find_start usr1", 75),
        pytest.param("horovodrun", f"1 {STEPS + 2} {STEP} usr1", 75, marks=slow),
        pytest.param("horovodrun", f"0 {STEPS + 2} {STEP} usr1-launcher", 75, marks=slow),
        pytest.param("gloo", f"1 {STEPS + 2} {STEP} usr1", 1, marks=slow),
        pytest.param("elastic", f"1 {STEPS + 2} {STEP} usr1", 1, marks=slow),
        pytest.param("python", f"0 {STEPS + 2} {STEP} term", 75, marks=slow),
        pytest.param("mpirun", f"0 2 {EVALUATE} usr1", 75, marks=slow),
        pytest.param("mpirun", f"0 {EPOCHS + 1} {EVALUATE} usr1", 75, marks=slow),
    ],
)
def test_asked_to_stop(
    inject: Inject, tmp_path: Path, undisturbed: str, launcher: str, fault: str, status: int
) -> None:
    ranks = 1 if launcher == "python" else 2
    job = inject(tmp_path / "run", fault, launcher, ranks)
    assert job.returncode == status, job.output
    assert job.late < 10
    assert "stopped on request at step" in job.output
    assert not (tmp_path / "run" / "summary.json").exists()
    if ranks == 2:
        resumed(inject, tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("steps", "when"), [(1, "term-all"), (STEPS, "term-all-later")])
def test_asked_to_stop_while_a_save_takes_long(
    inject: Inject, tmp_path: Path, undisturbed: str, steps: int, when: str
) -> None:
    """Within an epoch, and at its end, where the next save is due."""
    fault = f"0 1 {SAVE} {when}-and-write-slowly"
    job = inject(tmp_path / "run", fault, run__checkpoint_steps=steps)
    assert job.returncode == STOPPED, job.output
    assert "stopped on request at step" in job.output
    resumed(inject, tmp_path / "run", undisturbed)


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("gloo", marks=slow)])
def test_asked_to_stop_when_all_is_done(inject: Inject, tmp_path: Path, undisturbed: str, launcher: str) -> None:
    job = inject(tmp_path / "run", f"1 1 {STEP} usr1-at-the-very-end", launcher)
    assert job.returncode == 0, job.output
    assert "at the very end" in job.output
    assert fingerprint(tmp_path / "run") == undisturbed


@slow
def test_mpirun_kills_its_ranks(inject: Inject, tmp_path: Path, undisturbed: str) -> None:
    """Told to end, mpirun without our launchers gives them a second, in which nothing can be saved here."""
    fault = f"0 {STEPS + 3} {STEP} term-launcher-and-sleep"
    job = inject(tmp_path / "run", fault, run__checkpoint_steps=1)
    assert job.returncode != 0
    assert job.late < 5
    resumed(inject, tmp_path / "run", undisturbed)


@slow
def test_other_ranks_go_on_with_the_epoch(inject: Inject, tmp_path: Path) -> None:
    """4, 2 and 3 ranks train each sample once."""
    for ranks, fault in ((4, f"0 1 {STEP} usr1"), (2, f"0 1 {STEP} usr1"), (3, "0 0 os:getpid exit")):
        keys = {"train__epochs": 1, "train__batch_size": 5, "run__outfile": tmp_path / "log.txt"}
        job = inject(tmp_path / "run", fault, "mpirun", ranks, **keys)
        assert job.returncode == (0 if ranks == 3 else STOPPED), job.output
    samples = (tmp_path / "samples").read_text().split()
    assert sorted(map(int, samples)) == list(range(80))
    steps = (tmp_path / "log_train.txt").read_text().splitlines()[1:]
    assert [line.split()[2] for line in steps] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_stop_and_resume_at_every_step(data: Path, tmp_path: Path, ranks: int) -> None:
    arguments = flags(data, tmp_path / "runs", train__epochs=1, data__max_shift=2)
    job = launched("mpirun", ranks, "tests.faults.every_step", *arguments)
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    prints = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fingerprint")]
    assert len(prints) == 1 + -(-80 // (10 * ranks))
    assert len(set(prints)) == 1


def test_a_loss_is_not_a_number_on_one_rank(inject: Inject, tmp_path: Path) -> None:
    """The step is skipped on both: its samples do not count, and training goes on."""
    job = inject(tmp_path / "run", f"1 {STEPS + 2} {STEP} nan", run__verify_interval=1)
    assert job.returncode == 0, job.output
    assert summary(tmp_path / "run")["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("flip", "error"),
    [
        ("flip", "the weights of ranks 0 and 1 differ at"),
        ("flip-frozen", "weights that do not train changed on rank 0, found at"),
    ],
)
def test_a_bit_flips_on_one_rank(inject: Inject, tmp_path: Path, flip: str, error: str) -> None:
    job = inject(tmp_path / "run", f"0 {STEPS + 2} {STEP} {flip}", run__verify_interval=1)
    assert job.returncode == 1
    assert job.errors == [f"error: {error} step {STEPS + 2}"]


def test_the_launcher_dies(inject: Inject, tmp_path: Path) -> None:
    job = inject(tmp_path / "run", f"1 {STEPS + 2} {STEP} kill-launcher")
    assert job.returncode != 0
    assert job.late < 5


WATCHED = """
import os, time
from hvd_eurosat.cluster.watchdog import Watchdog
Watchdog(patient=False).start(600, "rank", launched=True)
print(os.getpid(), flush=True)
time.sleep(600)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], stderr=subprocess.PIPE)"


def test_the_launcher_dies_and_nobody_reads_what_its_rank_says() -> None:
    words = [sys.executable, "-c", LAUNCHER, WATCHED]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        rank = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        rank.wait(10)


def test_a_run_directory_is_used_by_one_job_at_a_time(inject: Inject, data: Path, tmp_path: Path) -> None:
    first = launched("python", 1, "tests.faults.inject", *flags(data, tmp_path / "run"))
    fault = f"0 2 {STEP} sleep"
    with subprocess.Popen(first, env=environment(FAULT=fault)) as running:
        while not (tmp_path / "fault").exists():
            assert running.poll() is None
            time.sleep(0.1)
        second = launched("python", 1, "hvd_eurosat.train", *flags(data, tmp_path / "run"))
        refused = subprocess.run(second, env=environment(), capture_output=True, text=True, timeout=120, check=False)
        running.kill()
    assert refused.returncode == 2
    assert f"is in use by another job (process {running.pid} on " in refused.stderr
    assert subprocess.run(second, env=environment(), capture_output=True, timeout=120, check=False).returncode == 0
