"""Jobs with real faults in them, and what is true of them afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_eurosat.training import checkpoint
from tests.parallel.conftest import BIN, checkpoint_file, make_data, small, survivors, under, unlabelled
from tests.parallel.conftest import warm as warm
from tests.waiting import Moment

STEP = "hvd_eurosat.training.step:Step.__call__"
SAVE = "hvd_eurosat.training.checkpoint_folder:CheckpointFolder.add"
EPOCHS, STEPS = 3, 4
COLD = ("kill-launcher", "at-the-very-end")


@dataclass(frozen=True)
class Ended:
    """A job that has ended, `late` seconds after its last fault, in `unhindered` of which cores were not short.

    finished: whether its last run is.
    """

    returncode: int
    output: str
    finished: bool
    late: float
    unhindered: float

    @property
    def errors(self) -> list[str]:
        """The error lines, without the launcher's own words."""
        lines = [line.strip() for line in self.output.splitlines()]
        return [line for line in lines if line.startswith("error: ")]


Inject = Callable[..., Ended]


def fingerprint(run_dir: Path) -> str:
    """Of all that a run's newest checkpoint holds, times apart."""
    saved = checkpoint.load(checkpoint_file(run_dir))
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value.keys() - {"seconds", "images_per_second", "stragglers"}, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    # Temperatures are the best checkpoint's, which need not be the newest where one could not be saved.
    add({key: value for key, value in vars(saved).items() if key not in ("config", "temperatures")})
    return digest.hexdigest()


def launched(launcher: str, ranks: int, module: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """A module as `ranks` ranks under a launcher."""
    return under(launcher, ranks, python, "-m", module, *arguments)


def environment(**more: str) -> dict[str, str]:
    """For a job of one thread a rank."""
    allow_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **allow_root, **more}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training, 20 validation and 20 test images of the synthetic sample."""
    return make_data(tmp_path_factory.mktemp("data"), seed=0)


def flags(data: Path, run_dir: Path, **keys: object) -> list[str]:
    """Of a run of EPOCHS epochs of STEPS steps on 2 ranks."""
    keys = {"train__epochs": EPOCHS, "data__image_size": 32, "run__watchdog_seconds": 60, **keys}
    return small(data, run_dir, **keys)


@pytest.fixture(scope="session")
def inject(data: Path, warm: str) -> Inject:
    """inject(faults, launcher, ranks, **keys): the job of those runs, each with its fault (inject.py), ended.

    Its ranks are warm, but for faults that meet a rank's own start and end.
    """

    def start(faults: Mapping[Path, str], launcher: str = "mpirun", ranks: int = 2, **keys: object) -> Ended:
        first = next(iter(faults))
        python = sys.executable if any(fault.endswith(COLD) for fault in faults.values()) else warm
        job = launched(launcher, ranks, "tests.faults.inject", *flags(data, first, **keys), python=python)
        variables = environment(FAULTS=json.dumps({str(run_dir): fault for run_dir, fault in faults.items()}))
        done = subprocess.run(job, env=variables, capture_output=True, text=True, timeout=300, check=False)
        deadline = time.monotonic() + 60
        while survivors(first) and time.monotonic() < deadline:
            time.sleep(0.1)
        late = unhindered = 0.0
        for run_dir, fault in faults.items():
            if fault:
                happened = run_dir.with_suffix(".fault")
                assert happened.exists(), done.stdout + done.stderr
                moment = Moment(*json.loads(happened.read_text()))
                late, unhindered = moment.passed(), moment.unhindered()
                happened.unlink()
            print(f"{launcher}, {fault or 'no fault'}: ended {late:.1f} s later with {done.returncode}")
        assert not survivors(first)
        output, finished = unlabelled(done.stdout + done.stderr), (run_dir / "summary.json").exists()
        return Ended(done.returncode, output, finished, late, unhindered)

    return start


@pytest.fixture(scope="session")
def done(inject: Inject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, str]:
    """A job that was asked to stop when all was done, and its run's fingerprint."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    job = inject({run_dir: f"1 1 {STEP} usr1-at-the-very-end"})
    return job, fingerprint(run_dir)


@pytest.fixture(scope="session")
def undisturbed(done: tuple[Ended, str]) -> str:
    """The fingerprint of the run to which nothing happened before all was done."""
    job, found = done
    assert job.returncode == 0, job.output
    return found


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in metrics.jsonl."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]
