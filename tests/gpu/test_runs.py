"""Whole runs by the commands that people give: to the end, stopped and resumed, on cores and back, and hanging."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_eurosat.training.checkpoint import load
from tests.gpu.commands import needs_horovod, python
from tests.gpu.conftest import Note
from tests.gpu.loop import SIDE, Scale

pytestmark = needs_horovod
COUNTS = {"train": 40, "valid": 8, "test": 8}  # of each of ten classes
EPOCHS = 3
ON_CORES = {"CUDA_VISIBLE_DEVICES": ""}


def grow(root: Path) -> Path:
    """Noise whose brightness is its class."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(10 * count):
            label, pixels = number % 10, random.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels + np.uint8(15 * label)).save(folder / f"{number}.png")
    return root


class Runs:
    """Training on one tree; each run has a folder by its name."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.data = folder, grow(folder / "data")
        keys = {
            "data.root": self.data,
            "model.arch": scale.arch,
            "model.weights": "none",
            "optim.lr": 1e-3,
            "train.batch_size": 2 * scale.batch,
            "train.precision": "fp32",
            "train.deterministic": "true",
            "run.keep": 1,
        }
        self.words = [word for key, value in keys.items() for word in (f"--{key}", value)]

    def train(self, name: str, epochs: int, fault: str = "", *words: object, **variables: str) -> tuple[int, str]:
        """Status and output; with a fault of faulty.py."""
        module = "tests.gpu.faulty" if fault else "hvd_eurosat.train"
        where = ["--run.dir", self.folder / name, "--train.epochs", epochs]
        done = python("-m", module, *self.words, *where, *words, FAULT=fault, **variables)
        return done.returncode, done.stdout + done.stderr

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of a run's last checkpoint."""
        return load(self.folder / name / "checkpoints" / "last.json").model

    def correct(self, name: str, **variables: str) -> int:
        """Test images that `evaluate` finds to be classed right."""
        checkpoint = self.folder / name / "checkpoints" / "last.json"
        words = ["--checkpoint", checkpoint, "--data.root", self.data]
        done = python("-m", "hvd_eurosat.evaluate", *words, **variables)
        assert done.returncode == 0, done.stderr
        found = re.search(r"\((\d+)/80\)$", done.stdout.strip())
        assert found, done.stdout
        return int(found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(folder: Path, scale: Scale) -> Runs:
    """With one that has ended, "whole"."""
    runs = Runs(folder, scale)
    if not (folder / "whole").exists():
        status, said = runs.train("whole", EPOCHS)
        assert status == 0, said
        (folder / "said").write_text(said)
    return runs


@pytest.mark.timeout(60)
def test_a_run_ends(runs: Runs, scale: Scale, note: Note) -> None:
    said = (runs.folder / "said").read_text()
    found = re.search(r"test accuracy: .*\((\d+)/80\)", said)
    assert found, said
    note("a run of three epochs: right of 80", int(found[1]))
    assert ("steps as CUDA graphs" in said) == (scale.device.type == "cuda")
    assert "no CUDA graph" not in said


@pytest.mark.timeout(60)
def test_a_stopped_run_goes_on_to_the_same_bits(runs: Runs) -> None:
    status, said = runs.train("stopped", EPOCHS, "stop")
    assert status == 75, said
    status, said = runs.train("stopped", EPOCHS)
    assert status == 0, said
    found, wanted = runs.weights("stopped"), runs.weights("whole")
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.timeout(90)
def test_a_checkpoint_goes_to_cores_and_back(runs: Runs, note: Note) -> None:
    assert runs.correct("whole", **ON_CORES) == pytest.approx(runs.correct("whole"), abs=1)
    shutil.copytree(runs.folder / "whole", runs.folder / "there and back")
    for epochs, variables in ((EPOCHS + 1, ON_CORES), (EPOCHS + 2, {})):
        status, said = runs.train("there and back", epochs, **variables)
        assert status == 0, said
    note("a run that was on the cores for an epoch: right of 80", runs.correct("there and back"))


@pytest.mark.timeout(60)
def test_a_gpu_that_does_not_answer_ends_the_run(runs: Runs) -> None:
    status, said = runs.train("hanging", EPOCHS, "hang", "--run.watchdog_seconds", 10)
    assert status == -signal.SIGKILL, said
    assert re.search(r"error: rank 0 of 1 .* for \d+ s in epoch 1, step [5-9]", said), said
