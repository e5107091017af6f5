"""Jobs with real faults in them, and what is true of them afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_eurosat.training import checkpoint
from tests.parallel.conftest import BIN, LAUNCHERS, checkpoint_file, make_data, small, survivors, unlabelled

STEP = "hvd_eurosat.training.step:Step.__call__"
SAVE = "hvd_eurosat.training.checkpoint:CheckpointFolder.add"
EPOCHS, STEPS = 3, 4


@dataclass(frozen=True)
class Ended:
    """A job that has ended, `late` seconds after its fault."""

    returncode: int
    output: str
    late: float

    @property
    def errors(self) -> list[str]:
        """The error lines, without the launcher's own words."""
        lines = [line.strip() for line in unlabelled(self.output).splitlines()]
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

    add({key: value for key, value in vars(saved).items() if key != "config"})
    return digest.hexdigest()


def launched(launcher: str, ranks: int, module: str, *arguments: object) -> list[str]:
    """A module as `ranks` ranks under a launcher."""
    count = [str(ranks)] if LAUNCHERS[launcher] else []
    return [*LAUNCHERS[launcher], *count, sys.executable, "-m", module, *map(str, arguments)]


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
    return small(data, run_dir, **{"train__epochs": EPOCHS, "run__watchdog_seconds": 60, **keys})


@pytest.fixture(scope="session")
def inject(data: Path) -> Inject:
    """inject(run_dir, fault, launcher, ranks, **keys): the job with that fault, once it has ended."""

    def start(
        run_dir: Path, fault: str = "0 0 os:getpid exit", launcher: str = "mpirun", ranks: int = 2, **keys: object
    ) -> Ended:
        job = launched(launcher, ranks, "tests.faults.inject", *flags(data, run_dir, **keys))
        done = subprocess.run(
            job, env=environment(FAULT=fault), capture_output=True, text=True, timeout=300, check=False
        )
        deadline = time.monotonic() + 10
        while survivors(run_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
        ended = time.time()
        happened = run_dir.parent / "fault"
        assert "0 0" in fault or happened.exists(), done.stderr
        late = ended - float(happened.read_text()) if happened.exists() else 0.0
        happened.unlink(missing_ok=True)
        print(f"{launcher}, rank call function action: {fault}: ended after {late:.1f} s with {done.returncode}")
        assert not survivors(run_dir)
        return Ended(done.returncode, done.stdout + done.stderr, late)

    return start


@pytest.fixture(scope="session")
def undisturbed(inject: Inject, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    job = inject(run_dir)
    assert job.returncode == 0, job.output
    return fingerprint(run_dir)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in metrics.jsonl."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]
