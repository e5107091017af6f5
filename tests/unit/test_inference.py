"""predict and evaluate in this process: what the network is shown, and in which precision it answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hvd_eurosat import evaluate, predict
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.augment import normalise, turn_and_flip
from hvd_eurosat.data.images import resize
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import LandCoverResNet, build
from tests.unit.conftest import saved_checkpoint

CLASSES = ["Forest", "River"]
Answer = Callable[..., "np.ndarray"]


def scene(seed: int) -> Image.Image:
    """Noise at 128x128, so that each part of it looks another way."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8))


def tree(root: Path, side: int) -> Path:
    """Two scenes of each class in each split, as files of this side."""
    for number, (split, label) in enumerate((split, label) for split in SPLITS for label in CLASSES):
        (root / split / label).mkdir(parents=True)
        for n in range(2):
            resize(scene(2 * number + n), side).save(root / split / label / f"{n}.png")
    return root


@pytest.fixture
def answers(tmp_path: Path) -> Answer:
    """answers(verb, *arguments): the log-probabilities [N, 2] that predict or evaluate writes."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)

    def asked(verb: str, *arguments: object) -> np.ndarray:
        words = [*map(str, arguments), "--out", str(tmp_path / "out")]
        if verb == "predict":
            predict.main(world, verbs.predict(words))
        else:
            evaluate.main(world, verbs.evaluate(words))
        values: list[np.ndarray] = []
        with h5py.File(tmp_path / "out" / "output_1.h5") as file:
            file.visititems(lambda _, item: values.append(item[()]) if isinstance(item, h5py.Dataset) else None)
        return np.stack(values)

    return asked


@pytest.mark.usefixtures("narrow")
def test_files_of_any_size_show_the_same_part_of_a_scene(tmp_path: Path, answers: Answer) -> None:
    """A network that was shown the middle of 64x64 files sees as much in 128x128 ones."""
    cut = Data(image_size=32, center_crop=32)
    model, settings = build("resnet18", 2, "all", seed=0), Model(arch="resnet18", trainable="all")
    saved = saved_checkpoint(tmp_path / "epoch-0003.pt", model, CLASSES, settings, cut, image_side=64)
    small, large = (tree(tmp_path / str(side), side) for side in (64, 128))
    expected = answers("predict", "--checkpoint", saved, "--input", small / "test")
    for verb, flag, below in (
        ("predict", "--input", "test"),
        ("evaluate", "--input", "test"),
        ("evaluate", "--data.root", ""),
    ):
        for root in (small, large):
            assert np.array_equal(answers(verb, "--checkpoint", saved, flag, root / below), expected)
    assert [path.name for path in (small / ".packed").glob("*-32-0-32.npy")]  # which training left there is used


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_precision(tmp_path: Path, answers: Answer, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """As in training unless fp32 is asked for, which is what an exported network answers; either is named."""
    from torchvision.models import resnet18

    model, settings = build("resnet18", 2, "all", seed=0), Model(arch="resnet18", trainable="all")
    saved = saved_checkpoint(tmp_path / "epoch-0003.pt", model, CLASSES, settings, precision="bf16")
    images = tree(tmp_path / "images", 64) / "test"
    export(ExportSettings(checkpoint=saved, format="torch", out=tmp_path))
    theirs = resnet18(num_classes=2)
    theirs.fc = torch.nn.Linear(512, 2, bias=False)
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(images.rglob("*.png"))])
    with torch.no_grad():
        expected = theirs.eval()(normalise(pixels.permute(0, 3, 1, 2), Data())).log_softmax(1).numpy()

    def asked(*arguments: str) -> tuple[np.ndarray, str]:
        values = answers(verb, "--checkpoint", saved, "--input", images, *arguments)
        return values, capsys.readouterr().out

    auto, bf16, fp32 = asked(), asked("--precision", "bf16"), asked("--precision", "fp32")
    assert np.array_equal(auto[0], bf16[0])
    assert 3e-5 < np.abs(auto[0] - expected).max() < 0.3
    assert np.abs(fp32[0] - expected).max() < 1e-5
    assert [(", bf16" in said, ", fp32" in said) for _, said in (auto, bf16, fp32)] == [
        (True, False),
        (True, False),
        (False, True),
    ]


@pytest.fixture
def calibrated(tmp_path: Path, narrow: None) -> tuple[Path, LandCoverResNet, Path]:
    """A checkpoint with temperatures, its network, and images of two classes."""
    model, settings = build("resnet18", 2, "all", seed=0), Model(arch="resnet18", trainable="all")
    saved = saved_checkpoint(tmp_path / "epoch-0003.pt", model, CLASSES, settings, temperatures={1: 2.0, 8: 3.0})
    return saved, model.eval(), tree(tmp_path / "images", 64)


def shown(model: LandCoverResNet, images: Path, views: int) -> torch.Tensor:
    """The mean probabilities of so many views, [N, 2]."""
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(images.rglob("*.png"))])
    batch, numbers = pixels.permute(0, 3, 1, 2), range(views)
    with torch.no_grad():
        each = [model(normalise(turn_and_flip(batch, torch.full((len(batch),), n)), Data())).exp() for n in numbers]
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_views_and_temperature(calibrated: tuple[Path, LandCoverResNet, Path], answers: Answer, verb: str) -> None:
    """Each number of views has a temperature of its own; --raw leaves it out."""
    saved, model, images = calibrated
    for views, temperature in ((1, 2.0), (8, 3.0)):
        expected = shown(model, images / "test", views).log()
        asked = ("--checkpoint", saved, "--input", images / "test", "--views", views)
        assert np.abs(answers(verb, *asked, "--raw") - expected.numpy()).max() < 1e-5
        tempered = (expected / temperature).log_softmax(1)
        assert np.abs(answers(verb, *asked) - tempered.numpy()).max() < 1e-5


@pytest.mark.parametrize(("raw", "temperature"), [(False, 2.0), (True, 1.0)])
def test_an_export_has_the_temperature_in_its_head(
    calibrated: tuple[Path, LandCoverResNet, Path], tmp_path: Path, raw: bool, temperature: float
) -> None:
    saved, model, _ = calibrated
    export(ExportSettings(checkpoint=saved, format="safetensors", out=tmp_path, raw=raw))
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["fc.weight"], model.fc.weight / temperature)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert float(file.metadata()["temperature"]) == temperature


def test_two_checkpoints_on_the_same_images(
    calibrated: tuple[Path, LandCoverResNet, Path],
    tmp_path: Path,
    answers: Answer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one says the opposite of each."""
    saved, model, images = calibrated
    correct = int((shown(model, images / "test", 1).argmax(1) == torch.tensor([0, 0, 1, 1])).sum())
    model.fc.weight.data = model.fc.weight.data.flip(0)
    settings = Model(arch="resnet18", trainable="all")
    other = saved_checkpoint(tmp_path / "other.pt", model, CLASSES, settings)
    answers("evaluate", "--checkpoint", saved, "--against", other, "--data.root", images)
    said = capsys.readouterr().out
    counts = f"({4 - correct}/4): {correct} images are right here alone, {4 - correct} there alone, McNemar's p = "
    assert f"against {other}, {25 * (4 - correct):.2f}% {counts}" in said
    assert "\ntemperature 2.000, without which negative log-likelihood " in said
    assert "\n95% interval " in said
    assert said.splitlines()[-1].startswith("test accuracy: ")
    foreign = saved_checkpoint(tmp_path / "foreign.pt", model, ["a", "b"], settings)
    with pytest.raises(UserError, match=r"--against .*foreign\.pt knows other classes: a, b"):
        answers("evaluate", "--checkpoint", saved, "--against", foreign, "--data.root", images)
