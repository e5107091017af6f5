"""Networks for any bands, and weights for other bands than the data's: by name, never by position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.bands import EUROSAT13, RGB, SENTINEL2
from hvd_eurosat.data.inputs import EUROSAT_MS, REFLECTANCE
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import LandCoverResNet, build, count_parameters
from hvd_eurosat.training import checkpoint
from hvd_eurosat.weights.loading import load_weights, read_weights
from hvd_eurosat.weights.settle import settle
from tests.unit.conftest import saved_checkpoint

SMALL = {"arch": "resnet18"}
MEASURED = EUROSAT_MS.model_copy(update={"mean": (1000.0,) * 13, "std": tuple(range(100, 113))})
NORMALISED = {"mean": MEASURED.mean, "std": MEASURED.std}


pytestmark = pytest.mark.usefixtures("narrow_resnet18")


def network(bands: Sequence[str], seed: int = 0, trainable: str = "bn+head") -> LandCoverResNet:
    return build("resnet18", 10, trainable, seed, bands=bands).eval()


def saved(path: Path, model: LandCoverResNet, **metadata: str) -> Model:
    """model.weights for the model's weights in a file of safetensors with these metadata."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, metadata)
    return Model(weights=str(path), **SMALL)


def named(bands: Sequence[str]) -> dict[str, str]:
    return {"bands": json.dumps(list(bands))}


def images(bands: int) -> Tensor:
    return torch.randn(2, bands, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("bands", "parameters"), [(1, -2), (3, 0), (4, 1), (13, 10), (64, 61)])
def test_parameters_by_bands(bands: int, parameters: int) -> None:
    with torch.device("meta"):
        model = LandCoverResNet("resnet50", 10, "bn+head", bands=tuple(map(str, range(bands))))
    assert count_parameters(model) == (23_528_512 + 3_136 * parameters, 73_600)
    with torch.device("meta"):
        first = LandCoverResNet("resnet50", 10, "bn+head,conv1", bands=tuple(map(str, range(bands))))
    assert count_parameters(first)[1] == 73_600 + 3_136 * bands
    assert first.conv1.weight.requires_grad


def test_b8a_is_where_its_name_says(tmp_path: Path) -> None:
    """Weights in Sentinel-2's order on data in EuroSAT's; by position the same kernels give another answer."""
    original = network(SENTINEL2)
    ours = network(EUROSAT13, seed=1)
    assert load_weights(ours, saved(tmp_path / "w.safetensors", original, **named(SENTINEL2))).line == "121 tensors"
    in_eurosats_order = images(13)
    reordered = in_eurosats_order[:, [EUROSAT13.index(name) for name in SENTINEL2]]
    with torch.no_grad():
        expected, found = original(reordered), ours(in_eurosats_order)
        by_position = original(in_eurosats_order)
    assert (found - expected).abs().max() < 1e-5
    assert (by_position - expected).abs().max() > 1e-2


def test_fewer_bands_take_the_kernels_of_theirs(tmp_path: Path) -> None:
    original, ours = network(SENTINEL2), network(("B8A", "B02"), seed=1)
    settings = saved(tmp_path / "w.safetensors", original, bands="B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B10,B11,B12")
    assert load_weights(ours, settings).line == "121 tensors"
    assert torch.equal(ours.conv1.weight, original.conv1.weight[:, [8, 1]])
    assert settle(settings, 10, 64, ours.bands).trainable == "bn+head"


def test_rgb_weights_lie_where_red_green_and_blue_are(tmp_path: Path) -> None:
    original = network(("red", "green", "blue"))
    settings = saved(tmp_path / "w.safetensors", original)
    ours = network(EUROSAT13, seed=1)
    drawn = ours.conv1.weight.detach().clone()
    said = load_weights(ours, settings).line
    assert (
        said == "121 tensors; they know no B01, B05, B06, B07, B08, B09, B10, B11, B12, B8A, whose kernels begin small"
    )
    kernels = ours.conv1.weight.detach()
    at = [EUROSAT13.index(name) for name in RGB]
    assert torch.equal(kernels[:, at], original.conv1.weight)
    others = [n for n in range(13) if n not in at]
    assert torch.equal(kernels[:, others], 0.1 * drawn[:, others])
    assert 0 < kernels[:, others].std() < kernels[:, at].std() / 3
    again = network(EUROSAT13, seed=1)
    load_weights(again, settings)
    assert torch.equal(again.conv1.weight, kernels)


@pytest.mark.parametrize(
    ("weights", "bands", "trainable", "settled"),
    [
        ("imagenet", EUROSAT13, "bn+head", "bn+head,conv1"),
        ("imagenet", RGB, "bn+head", "bn+head"),
        ("imagenet", EUROSAT13, "head", "head"),
        ("imagenet", EUROSAT13, "all", "all"),
        ("none", EUROSAT13, "bn+head", "bn+head"),
    ],
)
def test_the_first_convolution_trains_where_it_must(
    weights: str, bands: tuple[str, ...], trainable: str, settled: str
) -> None:
    assert settle(Model(weights=weights, trainable=trainable), 10, 64, bands).trainable == settled


def test_three_bands_without_a_name_are_red_green_and_blue(tmp_path: Path) -> None:
    original, ours = network(RGB), network(("B02", "B03", "B04"), seed=1)
    load_weights(ours, saved(tmp_path / "w.safetensors", original))
    assert torch.equal(ours.conv1.weight, original.conv1.weight.flip(1))


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    thirteen = network(SENTINEL2)
    silent = saved(tmp_path / "silent.safetensors", thirteen)
    message = "first convolution takes 13 bands and does not say which, and an order is not guessed; the data has B01"
    for act in (lambda: load_weights(network(EUROSAT13), silent), lambda: settle(silent, 10, 64, EUROSAT13)):
        with pytest.raises(UserError, match=message):
            act()
    wrong = saved(tmp_path / "wrong.safetensors", thirteen, **named(SENTINEL2[:12]))
    with pytest.raises(UserError, match="takes 13 bands and it names 12"):
        load_weights(network(EUROSAT13), wrong)
    strange = saved(tmp_path / "strange.safetensors", network(RGB), **named(("VV", "VH", "HV")))
    with pytest.raises(UserError, match=r"its bands are VV, VH, HV, the data's B01.*none is in both"):
        load_weights(network(EUROSAT13), strange)


def test_a_checkpoint_says_its_bands_to_others(tmp_path: Path) -> None:
    model = network(EUROSAT13, trainable="all")
    inputs = MEASURED.model_dump(mode="json")
    settings = Model(trainable="all", **SMALL)
    path = saved_checkpoint(tmp_path / "epoch-0003.pt", model, ["a"] * 10, settings, Data(**NORMALISED), inputs=inputs)
    kept = checkpoint.load(path)
    assert kept.wants == MEASURED
    assert kept.build_model(torch.device("cpu")).bands == EUROSAT13
    ours = network(SENTINEL2, seed=1)
    load_weights(ours, Model(weights=str(path), **SMALL))
    assert torch.equal(ours.conv1.weight[:, 8], model.conv1.weight[:, 12])


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LandCoverResNet]:
    """A checkpoint of a ResNet-50, which Keras' export takes, for EuroSAT's 13 bands, and the network."""
    model = build("resnet50", 10, "all", seed=0, bands=EUROSAT13).eval()
    return saved_13(tmp_path_factory.mktemp("thirteen"), model, Model(trainable="all")), model


@pytest.fixture(scope="module")
def small_13(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LandCoverResNet]:
    """A checkpoint of a ResNet-18 for EuroSAT's 13 bands of 32 x 32 pixels, and the network."""
    model = network(EUROSAT13, trainable="all")
    settings = Model(trainable="all", **SMALL)
    return saved_13(tmp_path_factory.mktemp("small"), model, settings, image_size=32), model


def saved_13(folder: Path, model: LandCoverResNet, settings: Model, **data: int) -> Path:
    inputs = MEASURED.model_dump(mode="json")
    path, images = folder / "epoch-0003.pt", Data(**NORMALISED, **data)
    return saved_checkpoint(path, model, list("abcdefghij"), settings, images, inputs=inputs)


def facts_in(file: Path) -> dict[str, Any]:
    """What an export says of its network, as others read it."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata())
    if file.suffix == ".h5":
        with h5py.File(file) as opened:
            return dict(opened.attrs)
    return dict(torch.load(file, weights_only=True)._metadata[""])


def plain(facts: dict[str, Any], *keys: str) -> list[Any]:
    """Of facts that may be in JSON."""
    return [json.loads(facts[key]) if isinstance(facts[key], str) else facts[key] for key in keys]


@pytest.mark.parametrize("kind", ["safetensors", "torch", "keras"])
def test_exports_state_bands_and_are_read_back(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path, model = request.getfixturevalue("thirteen" if kind == "keras" else "small_13")
    arch = "resnet50" if kind == "keras" else "resnet18"
    lines = export(ExportSettings(checkpoint=path, format=kind, out=tmp_path))
    file = next(Path(line.removeprefix("wrote ")) for line in lines if "model." in line and "layers" not in line)
    assert read_weights(file).bands == EUROSAT13
    facts = facts_in(file)
    assert facts["unit"] == REFLECTANCE
    assert plain(facts, "mean", "std") == [list(MEASURED.mean), list(MEASURED.std)]
    ours = build(arch, 10, "all", seed=1, bands=SENTINEL2)
    load_weights(ours, Model(weights=str(file), arch=arch))
    assert torch.equal(ours.conv1.weight[:, 8], model.conv1.weight[:, 12])
    card = (tmp_path / "model_card.md").read_text()
    assert "float32, (pixel - mean) / std, [N, " in card
    assert ", ".join(EUROSAT13) in card
    (stated,) = json.loads((tmp_path / "stac_item.json").read_text())["properties"]["mlm:input"]
    assert stated["bands"] == list(EUROSAT13)
    assert stated["value_scaling"][2] == {"type": "z-score", "mean": 1000, "stddev": 102}
    if kind == "keras":
        layers = tmp_path / "layers.json"
        assert json.loads(layers.read_text())["config"]["layers"][0]["config"]["batch_input_shape"][3] == 13
        assert settle(Model(layers=layers, weights="none"), 10, 64, EUROSAT13).trainable == "all"
        with pytest.raises(UserError, match="takes images of 13 bands; the data has 3"):
            settle(Model(layers=layers, weights="none"), 10, 64)


def test_keras_normalises_the_files_numbers(thirteen: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    words = {"checkpoint": thirteen[0], "format": "keras", "out": tmp_path, "with-normalisation": True}
    export(ExportSettings.model_validate(words))
    first, second, *_ = json.loads((tmp_path / "layers.json").read_text())["config"]["layers"]
    assert first["config"]["dtype"] == "uint16"
    scale, offset = (second["config"][key][2] for key in ("scale", "offset"))
    assert (scale, offset) == (1 / 102, -1000 / 102)


def test_deepness_is_for_rgb(small_13: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format deepness is for red, green and blue; this network takes B01"):
        export(ExportSettings(checkpoint=small_13[0], format="deepness", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_onnx_of_13_bands(small_13: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    import onnxruntime

    path, model = small_13
    export(ExportSettings(checkpoint=path, format="onnx", out=tmp_path))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images(13).numpy()})
    with torch.no_grad():
        assert np.abs(found - model(images(13)).numpy()).max() < 1e-4
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["unit"], facts["dtype"]) == (REFLECTANCE, "uint16")
    assert plain(facts, "bands", "mean", "std") == [list(EUROSAT13), list(MEASURED.mean), list(MEASURED.std)]


@pytest.mark.long
def test_a_normalising_export_takes_the_files_numbers(small_13: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    path, model = small_13
    export(ExportSettings.model_validate(
        {"checkpoint": path, "format": "pt2", "out": tmp_path, "with-normalisation": True}
    ))  # fmt: skip
    digital = torch.randint(0, 5000, (2, 13, 32, 32)).to(torch.uint16)
    mean, std = (torch.tensor(values).view(1, 13, 1, 1) for values in (MEASURED.mean, MEASURED.std))
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(digital)
        expected = model((digital.float() - mean) / std)
    assert (found - expected).abs().max() < 1e-4
