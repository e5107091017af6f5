"""safetensors and torch exports; folders of images; the large-batch optimisers and the schedules."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Data, Model, Optim
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.augment import augment, network_input, plain_input, resample, resized
from hvd_eurosat.data.folder import Seen, class_numbers, file_batches, find_images, find_labelled
from hvd_eurosat.data.images import Crop, decode, to_array
from hvd_eurosat.data.inputs import PICTURES
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import LandCoverResNet, build
from hvd_eurosat.run.predictions import write_predictions
from hvd_eurosat.training.optimiser import build_optimiser
from hvd_eurosat.weights.loading import load_weights
from tests.unit.conftest import Grow, saved_checkpoint

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LandCoverResNet]:
    """A checkpoint of a small network, and the network."""
    path = tmp_path_factory.mktemp("saved") / "epoch-0003.pt"
    model = build("resnet18", 3, "all", seed=0)
    saved_checkpoint(path, model, CLASSES, Model(arch="resnet18", trainable="all"), Data(resize=72, center_crop=64))
    return path, model.eval()


@pytest.mark.parametrize(("format_", "name"), [("safetensors", "model.safetensors"), ("torch", "model.pt")])
def test_what_goes_out_comes_back(saved: tuple[Path, LandCoverResNet], tmp_path: Path, format_: str, name: str) -> None:
    export(ExportSettings.model_validate({"checkpoint": saved[0], "format": format_, "out": tmp_path}))
    again = build("resnet18", 3, "all", seed=1)
    load_weights(again, Model(weights=str(tmp_path / name), arch="resnet18"))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in saved[1].state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "model_card.md", "stac_item.json"]
    if format_ == "torch":
        from torchvision.models import resnet18

        theirs = resnet18(num_classes=3)
        theirs.fc = torch.nn.Linear(512, 3, bias=False)
        theirs.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        return
    with safetensors.safe_open(tmp_path / name, "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["config"])["model"]["arch"] == "resnet18"
    assert (facts["variant"], json.loads(facts["std"])) == ("v1.5", [0.229, 0.224, 0.225])


def test_exports_that_cannot_be(saved: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format keras is for resnet50, and this network is a resnet18"):
        export(ExportSettings(checkpoint=saved[0], format="keras", out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"leave out model\.\*"):
        export(ExportSettings(checkpoint=saved[0], format="torch", out=tmp_path / "out", model=Model(weights="none")))
    with pytest.raises(UserError, match=r"leave out model\.\* and data\.\*"):
        export(ExportSettings(checkpoint=saved[0], format="torch", out=tmp_path / "out", data=Data(image_size=32)))
    with pytest.raises(UserError, match="--out /proc/out"):
        export(ExportSettings(checkpoint=saved[0], format="torch", out=Path("/proc/out")))
    assert not (tmp_path / "out").exists()


def test_names_of_images(grow: Grow, tmp_path: Path) -> None:
    root = grow("images", {"Forest": 2, "River": 1})
    (root / "River" / ".hidden.jpg").write_bytes(b"")
    names = ["Forest/Forest_1.jpg", "Forest/Forest_2.jpg", "River/River_1.jpg"]
    assert list(find_images([root]).paths) == names
    images, labels = find_labelled(root)
    assert (list(images.paths), labels) == (names, ["Forest", "Forest", "River"])
    assert class_numbers(labels, names, ["Forest", "Lake", "River"], "x").tolist() == [0, 0, 2]
    assert find_labelled(root / "Forest")[1] == []
    with pytest.raises(UserError, match=r"x: River/River_1\.jpg lies in no folder of a class; the checkpoint"):
        class_numbers(labels, names, ["Forest"], "x")
    files = [root / name for name in names]
    assert list(find_images(files).paths) == ["Forest_1.jpg", "Forest_2.jpg", "River_1.jpg"]
    with pytest.raises(UserError, match=r"Forest_1\.jpg is named twice"):
        find_images([files[0], files[0]])
    other = grow("others", {"Forest": 1}) / "Forest" / "Forest_1.jpg"
    with pytest.raises(UserError, match=r"both .* and .* would be Forest_1\.jpg .*--list"):
        find_images([files[0], other])
    odd = grow("odd", {"Forest_1.jpg/below": 1})
    with pytest.raises(UserError, match=r"Forest_1\.jpg would be an image and the folder of "):
        find_images([files[0], odd])
    with pytest.raises(UserError, match="no image at /nowhere"):
        find_images([Path("/nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        find_images([tmp_path / "empty"])


def test_file_batches_are_those_of_one_rank_in_turn(grow: Grow) -> None:
    root = grow("images", {"Forest": 5})
    files = list(find_images([root]).paths.values())
    shares = [list(file_batches(files, Data(), PICTURES, 2, torch.device("cpu"), n, 2, Seen())) for n in range(2)]
    batches = [shares[n % 2][n // 2] for n in range(3)]
    assert [batch.total for batch in batches] == [2, 2, 1]
    assert all(batch.images.shape == (2, 3, 64, 64) for batch in batches)
    expected = [to_array(decode(path.read_bytes()), 64) for path in files]
    found = torch.cat([batch.images[: batch.total] for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(expected))


def test_decoding_goes_on_during_computation(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    root, decoded, second = grow("images", {"Forest": 200}), [], threading.Event()

    def note(data: bytes, size: int | None) -> Image.Image:
        decoded.append(data)
        if len(decoded) > 100:
            second.set()
        return decode(data, size)

    monkeypatch.setattr("hvd_eurosat.data.folder.decode", note)
    batches = file_batches(
        list(find_images([root]).paths.values()), Data(), PICTURES, 100, torch.device("cpu"), 0, 1, Seen()
    )
    next(batches)
    assert second.wait(60)
    batches.close()


def test_prediction_files(tmp_path: Path) -> None:
    values = np.log(np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32))
    write_predictions(tmp_path, ["b/x.jpg", "y.jpg"], [Path("in/b/x.jpg"), Path("in/y.jpg")], values, CLASSES)
    with h5py.File(tmp_path / "output_1.h5") as file:
        assert file["b"]["x.jpg"].shape == (3,)
        assert np.array_equal(file["y.jpg"][()], values[1])
        assert list(file.attrs["classes"]) == CLASSES
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines == ["name,file,class,probability", "b/x.jpg,in/b/x.jpg,b,0.7", "y.jpg,in/y.jpg,a,0.5"]


def test_several_inputs_after_one_flag() -> None:
    settings = verbs.predict(["--checkpoint", "c.pt", "--input", "a,b.jpg", "c", "--out", "o"])
    assert (settings.input, settings.out) == ((Path("a,b.jpg"), Path("c")), Path("o"))
    with pytest.raises(UserError, match="--input or --list is required"):
        verbs.predict(["--checkpoint", "c.pt", "--out", "o", "--input"])


def test_crops() -> None:
    pixels = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)
    image = Image.fromarray(pixels)
    assert np.array_equal(to_array(image, 48, Crop(side=48)), pixels[8:56, 8:56])
    assert to_array(image, 64, Crop(resize=72, side=64)).shape == (64, 64, 3)
    with pytest.raises(Exception, match=r"64x64 pixels; data\.center_crop is 65"):
        to_array(image, 64, Crop(side=65))


def test_resampling_turns_and_zooms() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).expand(2, 2, 3)
    assert torch.equal(resample(images, quarter, 16), torch.rot90(images, 1, (2, 3)))
    indices = torch.tensor([3, 4])
    flipped = augment(images, indices, 0, 0, Data(augment=False, random_horizontal_flip=1))
    assert torch.equal(flipped, images.flip(3))
    constant = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    data = Data(augment=False, random_rotate=180, jitter_crop=0.5, random_zoom=0.5)
    assert torch.equal(augment(constant, indices, 0, 0, data), constant)


def test_turned_images_are_as_sharp_as_plain_ones() -> None:
    """They are sampled once, at the size that the network sees, however much larger that is."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    places = torch.eye(2, 3).expand(2, 2, 3)
    for size in (16, 24, 32):
        assert (resample(images, places, size).int() - resized(images, size).int()).abs().max() <= 1
    data = Data(augment=False, random_rotate=1e-3, input_size=32)
    indices, epoch = torch.arange(2), torch.tensor(0)
    turned, plain = network_input(images, indices, 0, epoch, 32, data), plain_input(images, data)
    assert (turned - plain).abs().max() < 0.05
    assert network_input(images, indices, 0, epoch, 8, data).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", ["lars", "lamb", "adagrad", "rmsprop", "sgd", "adamw"])
def test_optimisers_learn_and_resume(name: str) -> None:
    """A least-squares problem is solved in part; a restart from the saved state goes on with the same bits."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)

    def steps(model: torch.nn.Module, optimiser: torch.optim.Optimizer, count: int) -> float:
        for _ in range(count):
            optimiser.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimiser.step()
        return loss.item()

    optim = Optim(name=name, lr=0.1 if name != "lars" else 1.0, weight_decay=1e-4, momentum=0.5, trust=0.05)
    model, other = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    optimiser = build_optimiser(model, optim)
    first = steps(model, optimiser, 1)
    assert steps(model, optimiser, 20) < first
    other.load_state_dict(model.state_dict())
    resumed = build_optimiser(other, optim)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert steps(model, optimiser, 3) == steps(other, resumed, 3)
