"""Sentinel-2 weights that have names: where they come from, which images they are for, and how these are normalised."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hvd_eurosat.config.schema import Config, Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.bands import EUROSAT13
from hvd_eurosat.data.inputs import EUROSAT, EUROSAT_CLASSES, PICTURES, REFLECTANCE
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import build
from hvd_eurosat.train import settled
from hvd_eurosat.weights.known import KNOWN, check_name, normalised
from hvd_eurosat.weights.loading import digest_of, load_weights
from tests.unit.conftest import Grow

RGB = "sentinel2-rgb-moco"
RAW = {"bands": EUROSAT13, "unit": REFLECTANCE, "dtype": "uint16", "stretch": None}


def test_files_are_named_by_arch_and_digest() -> None:
    for name, known in KNOWN.items():
        assert len(known.bands) == (3 if "-rgb-" in name else 13)
        for arch, url in known.urls.items():
            stem = f"{arch}_{name.replace('-', '_')}"
            place = rf"https://hf\.co/torchgeo/{stem}/resolve/[0-9a-f]{{40}}/"
            assert re.fullmatch(rf"{place}{stem}-[0-9a-f]{{8}}\.pth", url)
        assert known.bands[3 if len(known.bands) == 13 else 0] == "B04"
    assert KNOWN["sentinel2-all-moco"].bands[7:9] == ("B08", "B8A")


def test_grey_becomes_reflectance() -> None:
    """DN / 10,000 is what these weights want; EuroSAT's grey is 1 + 254 DN / 2750."""
    data = normalised(Data(), RGB, EUROSAT)
    numbers = np.array([0, 100, 1000, 2750])
    grey = 1 + 254 * numbers / 2750
    for mean, std in zip(data.mean, data.std, strict=True):
        np.testing.assert_allclose((grey / 255 - mean) / std, numbers / 10_000, atol=1e-12)
    raw = normalised(Data(), "sentinel2-all-moco", EUROSAT.model_copy(update=RAW))
    assert (raw.mean, raw.std) == ((0,) * 13, (10_000,) * 13)
    shifted = normalised(Data(), RGB, EUROSAT.model_copy(update={"stretch": (500, 1770)}))
    np.testing.assert_allclose((np.array([1, 255]) / 255 - shifted.mean[0]) / shifted.std[0], [0.05, 0.177], atol=1e-12)


def test_a_normalisation_that_is_given_is_kept() -> None:
    data = Data(mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert normalised(data, RGB, EUROSAT) == data
    assert normalised(Data(), "imagenet", PICTURES) == Data()


def test_a_run_takes_the_normalisation_of_its_weights(grow: Grow) -> None:
    for split in ("train", "valid", "test"):
        root = grow(f"data/{split}", dict.fromkeys(EUROSAT_CLASSES, 1)).parent
    config = settled(Config(data=Data(root=root), model=Model(weights=RGB)), open_tree(root))
    assert config.data.mean == pytest.approx((1 / 255,) * 3)
    assert config.data.std == pytest.approx((254 / (255 * 0.275),) * 3)
    again = Config(**{**config.model_dump(), "config": None})
    assert settled(again, open_tree(root)).flat() == config.flat()


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        (RGB, PICTURES, "wants reflectance, and which one the numbers of the images mean is not known: "),
        (RGB, EUROSAT.model_copy(update={"stretch": None}), "give data.mean and data.std"),
        (
            "sentinel2-all-moco",
            EUROSAT.model_copy(update={"unit": "digital numbers", "dtype": "uint16"}),
            "give data.mean and data.std, or prepare the images with --unit 'reflectance x 10,000', if they hold that",
        ),
    ],
)
def test_images_that_weights_are_not_for(name: str, inputs: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        normalised(Data(), name, inputs)
    assert message in str(error.value)


def test_names_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"sentinel2-rgb-moko is neither a file nor one of sentinel2-all-moco, "):
        check_name("sentinel2-rgb-moko", "resnet50")
    with pytest.raises(UserError, match=r"sentinel2-all-dino is of resnet50, and model\.arch is resnet18"):
        check_name("sentinel2-all-dino", "resnet18")


def test_an_export_must_be_told_the_normalisation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wants reflectance, .*: give data\.mean and data\.std"):
        export(ExportSettings(format="torch", out=tmp_path / "out", model=Model(weights=RGB)))


def test_they_come_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file cannot be had here, so one of the same form stands in, and its digest in the address."""
    source = build("resnet18", 10, "all", seed=9)
    state = {name: tensor for name, tensor in source.state_dict().items() if name[:2] != "fc"}
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    url = f"https://hf.co/somewhere/file-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setitem(KNOWN, RGB, dataclasses.replace(KNOWN[RGB], urls={"resnet18": url}))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    model, settings = build("resnet18", 10, "bn+head", seed=0), Model(arch="resnet18", weights=RGB)
    place = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]
    with pytest.raises(RunError) as error:  # status 1, as where prepare cannot download: nobody's mistake
        load_weights(model, settings)
    said = f"cannot fetch the weights {RGB} (no network): put {url} at {place}, or give --model.weights FILE (or none)"
    assert str(error.value) == said
    place.write_bytes(content)
    assert load_weights(model, settings).line == "120 tensors; it has no head"
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert digest_of(RGB) is None
    reordered = build("resnet18", 10, "bn+head", seed=0, bands=("B02", "B03", "B04"))
    load_weights(reordered, settings)
    assert torch.equal(reordered.conv1.weight, source.conv1.weight.flip(1))
    place.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{place.name} is damaged \(its sha256 does not begin with "):
        load_weights(model, settings)


def test_imagenet_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    with pytest.raises(RunError, match=r"cannot fetch the ImageNet weights \(no network\): put https://"):
        load_weights(build("resnet18", 10, "bn+head", seed=0), Model(arch="resnet18", weights="imagenet"))


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")
