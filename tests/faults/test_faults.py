"""Loses nothing and never hangs: every fault is injected for real into a running job (see docs/reliability.md)."""

from __future__ import annotations

import html
import json
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from hvd_eurosat.errors import STOPPED
from hvd_eurosat.run.status import read_status
from tests.faults.conftest import (
    EPOCHS,
    SAVE,
    STEP,
    STEPS,
    Ended,
    Inject,
    environment,
    events,
    fingerprint,
    flags,
    launched,
)
from tests.parallel.conftest import summary, wait_for
from tests.waiting import side_by_side

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


class Case(NamedTuple):
    """A fault in a job of 2 ranks, which saves every so many steps (0: every epoch)."""

    fault: str
    launcher: str = "mpirun"
    checkpoint_steps: int = 0


KILLED = {
    "quick": {"killed": Case(f"1 {STEPS + 3} {STEP} kill", checkpoint_steps=1)},
    "slow": {
        "killed-horovodrun": Case(f"1 {STEPS + 3} {STEP} kill", "horovodrun", 1),
        # mpirun without our launchers gives its ranks a second, in which nothing can be saved here
        "mpirun-kills": Case(f"0 {STEPS + 3} {STEP} term-launcher-and-sleep", checkpoint_steps=1),
    },
}
STOPPED_BY_REQUEST = {
    "quick": {
        "usr1-mpirun": Case(f"0 {STEPS + 2} {STEP} usr1-launcher"),
        "term-one": Case(f"1 {STEPS + 3} {STEP} term"),
        "term-all": Case(f"1 {STEPS + 3} {STEP} work-slowly-and-term-all"),
        "usr1-early": Case("1 1 hvd_eurosat.run.journal:Journal.find_start usr1"),
    },
    "slow": {
        "usr1-one": Case(f"1 {STEPS + 2} {STEP} usr1", "horovodrun"),
        "usr1-horovodrun": Case(f"0 {STEPS + 2} {STEP} usr1-launcher", "horovodrun"),
        "usr1-gloo": Case(f"1 {STEPS + 2} {STEP} usr1", "gloo"),
        "usr1-elastic": Case(f"1 {STEPS + 2} {STEP} usr1", "elastic"),
        "usr1-validation": Case(f"0 2 {EVALUATE} usr1"),
        "usr1-test": Case(f"0 {EPOCHS + 1} {EVALUATE} usr1"),
    },
}
STOPPED_WHILE_SAVING = {
    "step": Case(f"0 1 {SAVE} term-all-and-write-slowly", checkpoint_steps=1),
    "epoch": Case(f"0 1 {SAVE} term-all-later-and-write-slowly", checkpoint_steps=STEPS),  # the next save is due
}


class Found(NamedTuple):
    """Jobs that have ended, and the directories of their runs."""

    jobs: dict[str, Ended]
    folder: Path


@pytest.fixture(scope="module", params=["quick", pytest.param("slow", marks=slow)])
def speed(request: pytest.FixtureRequest) -> str:
    """Which of the cases."""
    return str(request.param)


@pytest.fixture(scope="module")
def ended(inject: Inject, tmp_path_factory: pytest.TempPathFactory, speed: str) -> Found:
    """Jobs that are killed, or asked to stop."""
    folder = tmp_path_factory.mktemp("ended")
    cases = KILLED[speed] | STOPPED_BY_REQUEST[speed] | (STOPPED_WHILE_SAVING if speed == "quick" else {})
    jobs = [
        partial(inject, {folder / name: case.fault}, case.launcher, run__checkpoint_steps=case.checkpoint_steps)
        for name, case in cases.items()
    ]
    return Found(dict(zip(cases, side_by_side(jobs, at_once=2), strict=True)), folder)


def test_a_rank_is_killed(ended: Found, speed: str) -> None:
    for name in KILLED[speed]:
        job = ended.jobs[name]
        assert job.returncode != 0, name
        assert job.unhindered < 5, name


def test_asked_to_stop(ended: Found, speed: str) -> None:
    for name, case in STOPPED_BY_REQUEST[speed].items():
        job = ended.jobs[name]
        assert job.returncode == (1 if case.launcher in ("gloo", "elastic") else STOPPED), f"{name}: {job.output}"
        assert job.unhindered < 10, name
        assert "stopped on request at step" in job.output, name
        assert not job.finished, name


@pytest.mark.parametrize("speed", ["quick"], indirect=True)
def test_asked_to_stop_while_a_save_takes_long(ended: Found) -> None:
    """Within an epoch, and at its end."""
    for name in STOPPED_WHILE_SAVING:
        job = ended.jobs[name]
        assert job.returncode == STOPPED, f"{name}: {job.output}"
        assert "stopped on request at step" in job.output, name


def test_killed_or_stopped_and_resumed(inject: Inject, ended: Found, undisturbed: str) -> None:
    """Started again, every run ends as if nothing had happened."""
    run_dirs = [ended.folder / name for name in ended.jobs]
    job = inject(dict.fromkeys(run_dirs, ""))
    assert job.returncode == 0, job.output
    assert {run_dir.name: fingerprint(run_dir) for run_dir in run_dirs} == dict.fromkeys(ended.jobs, undisturbed)


@slow
def test_one_process_is_asked_to_stop(inject: Inject, tmp_path: Path) -> None:
    job = inject({tmp_path / "run": f"0 {STEPS + 2} {STEP} term"}, "python", 1)
    assert job.returncode == STOPPED, job.output
    assert job.unhindered < 10
    assert "stopped on request at step" in job.output
    assert not job.finished


def test_asked_to_stop_when_all_is_done(done: tuple[Ended, str]) -> None:
    """That its bits are those of an undisturbed run, the resumed runs show."""
    job, _ = done
    assert job.returncode == 0, job.output
    assert "at the very end" in job.output


@slow
def test_asked_to_stop_when_all_is_done_over_gloo(inject: Inject, tmp_path: Path, undisturbed: str) -> None:
    job = inject({tmp_path / "run": f"1 1 {STEP} usr1-at-the-very-end"}, "gloo")
    assert job.returncode == 0, job.output
    assert "at the very end" in job.output
    assert fingerprint(tmp_path / "run") == undisturbed


HANGS = {
    "quick": {"stop": "mpirun", "gil": "mpirun", "elastic-stop": "elastic"},
    "slow": {"sleep": "mpirun", "gloo-stop": "gloo", "gloo-sleep": "gloo", "gloo-gil": "gloo"},
}


@pytest.fixture(scope="module")
def hung(inject: Inject, tmp_path_factory: pytest.TempPathFactory, speed: str) -> Found:
    """Jobs in which rank 1 hangs."""
    folder = tmp_path_factory.mktemp("hung")
    jobs = []
    for name, launcher in HANGS[speed].items():
        fault = f"1 {STEPS + 2} {STEP} {name.rpartition('-')[2]}"
        # The others' meeting again is not to be taken for hanging.
        ranks, patience = (3, 2 * WATCHDOG) if launcher == "elastic" else (2, WATCHDOG)
        jobs.append(partial(inject, {folder / name: fault}, launcher, ranks, run__watchdog_seconds=patience))
    return Found(dict(zip(HANGS[speed], side_by_side(jobs, at_once=3), strict=True)), folder)


def patience(error: str) -> int:
    """For how many seconds a rank was idle that was ended."""
    found = re.search(r"made no progress for (\d+) s", error)
    assert found, error
    return int(found[1])


def test_a_rank_hangs(hung: Found, speed: str) -> None:
    for name, launcher in HANGS[speed].items():
        if launcher == "elastic":
            continue
        job = hung.jobs[name]
        assert job.returncode != 0, name
        assert job.late > WATCHDOG - 1, name
        assert job.unhindered < WATCHDOG + 5, name
        named = [error for error in job.errors if "rank 1 of 2" in error]
        assert patience(named[0]) >= WATCHDOG, name
        assert f"in epoch 2, step {STEPS + 2}; its threads:" in named[0]
        assert read_status(hung.folder / name)["state"] == "failed"
        assert "rank 1 of 2" in read_status(hung.folder / name)["error"], "its watchdog left word for the page"
        assert "line" in job.output, name
        assert "inject.py" in job.output, name


@pytest.mark.parametrize("speed", ["quick"], indirect=True)
def test_a_rank_of_an_elastic_job_hangs(hung: Found) -> None:
    """Its watchdog ends it, and the others go on."""
    job, run_dir = hung.jobs["elastic-stop"], hung.folder / "elastic-stop"
    assert job.returncode == 0, job.output
    (named,) = job.errors
    assert "rank 1 of 3" in named
    assert patience(named) >= 2 * WATCHDOG
    assert summary(run_dir)["world_size"] == 2
    assert read_status(run_dir)["state"] == "done"
    assert [event["epoch"] for event in events(run_dir, "train")] == list(range(1, EPOCHS + 1))


@slow
@pytest.mark.parametrize("phase", ["validation", "test"])
def test_rank_0_hangs_while_the_others_wait(inject: Inject, tmp_path: Path, phase: str) -> None:
    jobs = [
        partial(inject, {tmp_path / action: f"0 {PHASES[phase]} {action}"}, run__watchdog_seconds=WATCHDOG)
        for action in ("stop", "sleep")
    ]
    for job in side_by_side(jobs, at_once=2):
        assert job.returncode != 0
        assert job.late > WATCHDOG - 1
        assert job.unhindered < WATCHDOG + 5
        assert any("rank 0 of 2" in error and phase in error for error in job.errors)


@pytest.mark.parametrize("action", ["fail", pytest.param("exit", marks=slow)])
@pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in ("mid-epoch", "test") else slow) for p in PHASES])
def test_one_rank_fails(inject: Inject, tmp_path: Path, phase: str, action: str) -> None:
    cache = {"data__cache_dir": tmp_path / "cache"}
    rank = 1 if phase in ("first step", "mid-epoch") else 0
    job = inject({tmp_path / "run": f"{rank} {PHASES[phase]} {action}"}, **cache)
    assert job.returncode == 1
    assert job.unhindered < 5
    assert len(job.errors) == 1, job.output
    assert job.errors[0].startswith(f"error: the run failed (rank {rank} on ")
    assert ("planted" in job.output) == (action == "fail")
    if phase != "packing":  # before which the run has no folder
        status = read_status(tmp_path / "run")
        assert status["state"] == "failed"
        assert status["error"].endswith(f"(rank {rank} on {socket.gethostname()})")
        assert ("planted" in status["error"]) == (action == "fail")
        assert status["error"] in html.unescape((tmp_path / "run" / "index.html").read_text())


def test_rank_0_fails_while_it_saves(inject: Inject, tmp_path: Path) -> None:
    job = inject({tmp_path / "run": f"0 2 {SAVE} fail"})
    assert job.returncode == 1
    assert "planted" in job.output
    assert job.errors == [error for error in job.errors if "(rank 0 on" in error]


@slow
def test_other_ranks_go_on_with_the_epoch(inject: Inject, tmp_path: Path) -> None:
    """4, 2 and 3 ranks train each sample once."""
    keys = {"train__epochs": 1, "train__batch_size": 5, "run__outfile": tmp_path / "log.txt"}
    for ranks, fault in ((4, f"0 1 {STEP} usr1"), (2, f"0 1 {STEP} usr1"), (3, "")):
        job = inject({tmp_path / "run": fault}, "mpirun", ranks, **keys)
        assert job.returncode == (0 if ranks == 3 else STOPPED), job.output
    samples = (tmp_path / "run.samples").read_text().split()
    assert sorted(map(int, samples)) == list(range(80))
    steps = (tmp_path / "log_train.txt").read_text().splitlines()[1:]
    assert [line.split()[2] for line in steps] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_stop_and_resume_at_every_step(warm: str, data: Path, tmp_path: Path, ranks: int) -> None:
    """With all that is drawn, mixed and averaged."""
    augmented = {
        "data__max_shift": 2,
        "data__random_gain": 0.1,
        "data__random_contrast": 0.2,
        "data__random_erase": 0.5,
    }
    mixed = {"train__mixup": 0.4, "train__cutmix": 1.0, "train__ema": 0.9, "train__start_size": 32}
    others = {"data__input_size": 48, "optim__layer_decay": 0.7, "valid__views": 8}
    arguments = flags(data, tmp_path / "runs", train__epochs=1, **augmented, **mixed, **others)
    job = launched("mpirun", ranks, "tests.faults.every_step", *arguments, python=warm)
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    prints = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fingerprint")]
    assert len(prints) == 1 + -(-80 // (10 * ranks))
    assert len(set(prints)) == 1


@pytest.fixture(scope="module")
def wrong(inject: Inject, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Jobs whose numbers go wrong on one rank, the first of two runs."""
    folder = tmp_path_factory.mktemp("wrong")
    at = f"{STEPS + 2} {STEP}"
    both = {folder / "nan": f"1 {at} nan", folder / "flip": f"0 {at} flip"}
    jobs = {
        "flip": inject(both, run__verify_interval=1),
        "flip-frozen": inject({folder / "flip-frozen": f"0 {at} flip-frozen"}, run__verify_interval=1),
    }
    return Found(jobs, folder)


def test_a_loss_is_not_a_number_on_one_rank(wrong: Found) -> None:
    """The step is skipped on both: its samples do not count, and training goes on."""
    assert summary(wrong.folder / "nan")["skipped_steps"] == 1, wrong.jobs["flip"].output


@pytest.mark.parametrize(
    ("flip", "error"),
    [
        ("flip", "the weights of ranks 0 and 1 differ at"),
        ("flip-frozen", "weights that do not train changed on rank 0, found at"),
    ],
)
def test_a_bit_flips_on_one_rank(wrong: Found, flip: str, error: str) -> None:
    job = wrong.jobs[flip]
    assert job.returncode == 1
    assert job.errors == [f"error: {error} step {STEPS + 2}"]


def test_the_launcher_dies(inject: Inject, tmp_path: Path) -> None:
    job = inject({tmp_path / "run": f"1 {STEPS + 2} {STEP} kill-launcher"})
    assert job.returncode != 0
    assert job.unhindered < 5


WATCHED = """
import os, time
from hvd_eurosat.cluster.watchdog import Watchdog
Watchdog().start(600, "rank", launched=True, patient=False)
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
        rank.wait(60)


def test_a_run_directory_is_used_by_one_job_at_a_time(warm: str, data: Path, tmp_path: Path) -> None:
    arguments = flags(data, tmp_path / "run", train__epochs=1)
    faults = json.dumps({str(tmp_path / "run"): f"0 2 {STEP} sleep"})
    first = launched("python", 1, "tests.faults.inject", *arguments, python=warm)
    second = launched("python", 1, "hvd_eurosat.train", *arguments, python=warm)
    with subprocess.Popen(first, env=environment(FAULTS=faults)) as running:
        wait_for(lambda: (tmp_path / "run.fault").exists() or running.poll() is not None)
        refused = subprocess.run(second, env=environment(), capture_output=True, text=True, timeout=240, check=False)
        named = re.search(r"is in use by another job \(process (\d+) on ", refused.stderr)
        assert named, refused.stderr
        assert psutil.pid_exists(int(named[1]))
        running.kill()
    assert refused.returncode == 2
    wait_for(lambda: not psutil.pid_exists(int(named[1])))  # for it is a process of that job
    assert subprocess.run(second, env=environment(), capture_output=True, timeout=240, check=False).returncode == 0
