"""What the numbers in a set's images are is written down with it, and goes with every checkpoint."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from hvd_eurosat.config.schema import Model
from hvd_eurosat.data.inputs import EUROSAT, EUROSAT_CLASSES, PICTURES
from hvd_eurosat.data.sample import generate
from hvd_eurosat.data.tree import open_tree, read_manifest
from hvd_eurosat.model.resnet import build
from hvd_eurosat.prepare import main
from hvd_eurosat.training import checkpoint
from tests.unit.conftest import Grow, saved_checkpoint

UNMEASURED = {"mean": None, "std": None, "quantiles": None}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample."""
    out = tmp_path_factory.mktemp("sample") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_eurosat.data.sources.generate", lambda seed: generate(4, seed))
        assert main(["--source", "sample", "--out", str(out)]) == 0
    return out


@pytest.fixture
def sample(prepared: Path, tmp_path: Path) -> Path:
    """The small sample, to change."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def test_the_manifest_says_what_the_numbers_are(prepared: Path, tmp_path: Path, grow: Grow) -> None:
    assert open_tree(prepared).inputs == read_manifest(prepared).inputs
    assert open_tree(prepared).inputs.model_copy(update=UNMEASURED) == EUROSAT.model_copy(update=UNMEASURED)
    photos = grow("photos", {"Cat": 4, "Dog": 4})
    assert main(["--source", str(photos), "--out", str(tmp_path / "out")]) == 0
    assert open_tree(tmp_path / "out").inputs.model_copy(update=UNMEASURED) == PICTURES


def test_older_folders_and_unprepared_ones_are_known_by_their_classes(sample: Path) -> None:
    path = sample / "manifest.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("inputs", "extras")}
    path.write_text(json.dumps(older))
    assert open_tree(sample).inputs == EUROSAT
    path.unlink()
    assert open_tree(sample).inputs == EUROSAT


def test_the_samples_scene_is_verified_with_it(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(sample / "scene.tif") as scene, Image.open(sample / "scene_truth.tif") as truth:
        assert (scene.size, scene.mode, truth.size, truth.mode) == ((1024, 768), "RGB", (16, 12), "L")
    assert main(["--verify", str(sample)]) == 0
    (sample / "scene.tif").write_bytes(b"x")
    (sample / "scene_truth.tif").unlink()
    assert main(["--verify", str(sample)]) == 1
    said = capsys.readouterr().err
    assert "scene.tif: changed" in said
    assert "scene_truth.tif: missing" in said


def test_older_checkpoints_are_known_by_their_classes(tmp_path: Path) -> None:
    settings = Model(arch="resnet18", trainable="head")
    for classes, wants in ((list(EUROSAT_CLASSES), EUROSAT), (["Cat", "Dog"], PICTURES)):
        model = build("resnet18", len(classes), "head", seed=0)
        path = saved_checkpoint(tmp_path / "epoch-0003.pt", model, classes, settings)
        assert checkpoint.load(path).wants == wants
        content = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        del content["inputs"]
        assert checkpoint.Checkpoint(**content).wants == wants
