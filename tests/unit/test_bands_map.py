"""Scenes for networks of digital numbers: the bands by name, each at 10 m, the numbers without their offset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from hvd_eurosat import map as maps
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.data.augment import plain_input
from hvd_eurosat.data.bands import EUROSAT13
from hvd_eurosat.data.inputs import EUROSAT, EUROSAT_MS, Inputs
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import build
from hvd_eurosat.scene import products
from hvd_eurosat.scene.source import Scene, SceneOptions, open_scene
from tests.unit.conftest import saved_checkpoint
from tests.unit.scenes import METRES, numbers, write_product, write_raster

SIDE = 32
UNKNOWN = Inputs(name="", bands=("B08", "B04"), file=("B04", "B08"), unit="digital numbers", dtype="uint16")


def opened(path: Path, wants: Inputs = EUROSAT_MS, **options: object) -> Scene:
    return open_scene([str(path)], wants, SceneOptions(**options))


def test_a_product_gives_its_reflectances_at_ten_metres(tmp_path: Path) -> None:
    bands = {name: numbers(n, (240 // METRES.get(name, 20),) * 2, 1200) for n, name in enumerate(EUROSAT13)}
    with opened(write_product(tmp_path, bands, "L1C", offset=-1000)) as scene:
        values, masked = scene.read(slice(None))
    assert (values.dtype.name, values.shape) == ("uint16", (13, 24, 24))
    assert not masked.any()
    assert np.array_equal(values[EUROSAT13.index("B08")], bands["B08"] - 1000)
    assert np.abs(values[12].mean() - (bands["B8A"].mean() - 1000.0)) < 60
    assert "offset" in scene.rule


def test_reflectance_of_a_file_becomes_digital_numbers(tmp_path: Path) -> None:
    wants = EUROSAT_MS.choosing(("B08", "B04"), "", "")
    digital = numbers(0, (2, 8, 9), 1, 15_000)
    path = write_raster(tmp_path / "a.tif", (digital / 10_000).astype(np.float32), names=("B04", "B08"))
    with opened(path, wants) as scene:
        assert np.array_equal(scene.read(slice(None))[0], digital[::-1])
    plain = write_raster(tmp_path / "b.tif", digital, names=("B04", "B08"))
    with opened(plain, wants, offset=1000) as scene:
        assert np.array_equal(scene.read(slice(None))[0], np.maximum(digital[::-1].astype(int) - 1000, 0))


@pytest.mark.parametrize(
    ("wants", "dtype", "options", "message"),
    [
        (EUROSAT_MS, "uint16", {}, "without metadata that say what the numbers are: give --offset 1000"),
        (EUROSAT_MS, "uint16", {"stretch": (0, 1)}, "--stretch is for networks that take grey values; this one takes"),
        (EUROSAT_MS, "uint8", {}, "has 8-bit bands, and the network takes reflectance x 10,000"),
        (UNKNOWN, "uint8", {}, "the network takes digital numbers .*holds uint8"),
        (UNKNOWN, "uint16", {"offset": 0}, "the network takes digital numbers .*leave --offset out"),
        (EUROSAT, "uint16", {"offset": 0}, "has no band B03"),
    ],
)
def test_what_is_not_known_is_refused(
    wants: Inputs, dtype: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_raster(tmp_path / "a.tif", numbers(0, (2, 8, 9), 1, 200).astype(dtype), names=("B04", "B08"))
    wants = wants if wants is not EUROSAT_MS else EUROSAT_MS.choosing(("B08", "B04"), "", "")
    with pytest.raises(UserError, match=message):
        opened(path, wants, **options)


def test_numbers_of_no_known_unit_stay_as_they_are(tmp_path: Path) -> None:
    digital = numbers(0, (2, 8, 9))
    with opened(write_raster(tmp_path / "a.tif", digital, names=("B04", "B08")), UNKNOWN) as scene:
        assert np.array_equal(scene.read(slice(None))[0], digital[::-1])


def test_a_map_says_what_the_network_says_of_each_window(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "StopRequest", lambda: lambda: False)
    monkeypatch.setattr(products, "write_picture", lambda cover, areas, out: (out / "map.png").touch())
    model = build("resnet18", 3, "all", seed=0, bands=EUROSAT13)
    digital = numbers(1, (13, 2 * SIDE, 3 * SIDE), 1, 3000) // np.repeat([1, 2, 3], SIDE).astype(np.uint16)
    wants = EUROSAT_MS.model_copy(update={"mean": (1000.0,) * 13, "std": (500.0,) * 13})
    data = Data(image_size=SIDE, mean=wants.mean, std=wants.std)
    with torch.no_grad():
        windows = torch.from_numpy(digital).view(13, 2, SIDE, 3, SIDE).permute(1, 3, 0, 2, 4).reshape(6, 13, SIDE, SIDE)
        shown = plain_input(windows.float(), data)
        model.train()(shown)  # statistics of BatchNorm
        expected = model.eval()(shown).argmax(1).view(2, 3)
    settings = Model(arch="resnet18", trainable="all")
    facts = {"image_side": SIDE, "inputs": wants.model_dump(mode="json")}
    path = saved_checkpoint(tmp_path / "epoch-0003.pt", model, list("abc"), settings, data, **facts)
    scene = write_raster(tmp_path / "scene.tif", digital, names=EUROSAT13)
    words = ["--checkpoint", path, "--scene", scene, "--out", tmp_path / "map", "--offset", 0]
    assert maps.main(alone, verbs.map_scenes(list(map(str, words)))) == 0
    with rasterio.open(tmp_path / "map" / "classes.tif") as file:
        assert np.array_equal(file.read(1), expected.numpy())
