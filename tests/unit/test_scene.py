"""Scenes as they come in: which band is which, what the numbers are, where pixels lie, what is masked or refused."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from PIL import Image
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.warp import transform as reproject

from hvd_eurosat.data.inputs import EUROSAT, EUROSAT_CLASSES, PICTURES, Inputs, inputs_of
from hvd_eurosat.data.sample import SCENES, draw_scene
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.finding import split_scenes
from hvd_eurosat.scene.source import Scene, SceneOptions, open_scene
from tests.unit.scenes import BANDS, CORNER, LOSSLESS, RGB, numbers, write_product, write_raster, zipped

SHARED = Path(__file__).parents[3] / "shared" / "data"
NAMES = ("B04", "B03", "B02")
DEGREES = Affine(9e-5, 0, 11, 0, -9e-5, 46)
MS_BANDS = (*BANDS[:8], *BANDS[9:], "B8A")  # of EuroSAT's 13-band files
UNMEASURED = EUROSAT.model_copy(update={"quantiles": None})
RED = UNMEASURED.model_copy(update={"bands": ("B04",)})


def opened(*what: Path, wants: Inputs = UNMEASURED, **options: object) -> Scene:
    return open_scene([str(path) for path in what], wants, SceneOptions(**options))


def pixels(*what: Path, wants: Inputs = UNMEASURED, **options: object) -> tuple[np.ndarray, np.ndarray]:
    with opened(*what, wants=wants, **options) as scene:
        return scene.read(slice(None))


def grey(numbers: np.ndarray, offset: float = 0, white: float = 2750) -> np.ndarray:
    """As EuroSAT RGB was made from digital numbers."""
    return np.clip(np.rint(1 + 254 * (numbers.astype(np.float64) - offset) / white), 1, 255)


def refuses(message: str, *what: Path, wants: Inputs = UNMEASURED, **options: object) -> str:
    with pytest.raises(UserError, match=message) as refused:
        pixels(*what, wants=wants, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- which band is which ---


@pytest.mark.parametrize(
    "names",
    [
        ("B02", "B03", "B04"),
        ("b2", "b3", "b4"),
        ("Blue", "Green", "Red"),
        ("B2, central wavelength 490 nm", "B3, central wavelength 560 nm", "B4, central wavelength 665 nm"),
    ],
)
def test_descriptions_name_the_bands_in_whatever_order(names: tuple[str, ...], tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 9))
    path = write_raster(tmp_path / "scene.tif", x, names=names)
    values, masked = pixels(path, offset=0)
    np.testing.assert_array_equal(values, grey(x[::-1]))
    assert values.dtype == np.uint8
    assert not masked.any()


def test_bands_names_them_in_the_files_order(tmp_path: Path) -> None:
    x = numbers(0, (5, 8, 9))
    path = write_raster(tmp_path / "scene.tif", x)
    refuses(r"no band B04.*--bands", path, offset=0)
    refuses(r"--bands names 3 and .* has 5.*with -", path, offset=0, bands=NAMES)
    refuses(r"names B04 twice", path, offset=0, bands=("B04", "B03", "B02", "B04", "SCL"))
    refuses(r"no band B02.*has B03, B04", path, offset=0, bands=("-", "B03", "-", "-", "B04"))
    values, _ = pixels(path, offset=0, bands=("B02", "-", "B03", "SCL", "red"))
    np.testing.assert_array_equal(values, grey(x[[4, 2, 0]]))


def test_colours_name_the_bands(tmp_path: Path) -> None:
    x = numbers(0, (4, 8, 9), 1, 255).astype(np.uint8)
    colours = (ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.alpha)
    x[3] = 255
    x[3, 2] = 0
    values, masked = pixels(write_raster(tmp_path / "scene.tif", x, colours=colours))
    assert masked[2].all()
    assert masked.sum() == 9
    np.testing.assert_array_equal(values, np.where(masked, 0, x[2::-1]))
    infrared = write_raster(
        tmp_path / "four.tif", x, colours=(*RGB, ColorInterp.undefined), photometric="RGB", alpha="NO"
    )
    np.testing.assert_array_equal(pixels(infrared)[0], x[:3])


def test_files_of_one_band_each_name_it(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 9))
    files = [write_raster(tmp_path / f"T32TPS_20170701T101031_{b}_10m.tif", a) for b, a in zip(NAMES, x, strict=True)]
    write_raster(tmp_path / "T32TPS_20170701T101031_TCI_10m.tif", x.astype(np.uint8))
    for what in ([tmp_path], files[::-1]):
        with opened(*what, offset=0) as scene:
            assert scene.bands == NAMES
            np.testing.assert_array_equal(scene.read(slice(None))[0], grey(x))
    write_raster(tmp_path / "more" / "B04.tif", x)
    refuses("has 3 bands and the name of one", tmp_path / "more", offset=0, wants=RED)
    renamed = [file.rename(tmp_path / f"{n}.tif") for n, file in enumerate(files)]
    refuses("no band B04", *renamed, offset=0)
    np.testing.assert_array_equal(pixels(*renamed, offset=0, bands=NAMES)[0], grey(x))


def test_of_a_band_at_two_resolutions_the_finer_is_taken_and_of_two_alike_none(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 8))
    for name, band in zip(NAMES, x, strict=True):
        write_raster(tmp_path / f"{name}_10m.tif", band)
        write_raster(tmp_path / f"{name}_20m.tif", band[::2, ::2], transform=CORNER @ Affine.scale(2))
    np.testing.assert_array_equal(pixels(tmp_path, offset=0)[0], grey(x))
    write_raster(tmp_path / "old" / "B04_10m.tif", x[0])
    refuses("both .* and .* are B04", tmp_path, offset=0)


def test_landsats_b4_is_not_sentinels(tmp_path: Path) -> None:
    for name in ("B4", "B3", "B2"):
        write_raster(tmp_path / f"LE07_L1TP_193027_20020701_{name}.TIF", numbers(0, (8, 8)))
    refuses("names say no band", tmp_path, offset=0)


def test_paths_fall_into_scenes(tmp_path: Path) -> None:
    def there(name: str) -> str:
        return str(write_raster(tmp_path / name, numbers(0, (4, 4))))

    first = [there(f"T32TPS_20230701_{b}.tif") for b in NAMES]
    second = [there(f"T32TPS_20230706_{b}.tif") for b in NAMES]
    mosaic, plain = there("mosaic.tif"), [there(f"{n}.tif") for n in range(3)]
    assert split_scenes([*first, mosaic, *second], ()) == [tuple(first), (mosaic,), tuple(second)]
    assert split_scenes(plain, ()) == [(path,) for path in plain]
    assert split_scenes(plain, NAMES) == [tuple(plain)]


# --- products ---


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_products_say_it_all(level: str, tmp_path: Path) -> None:
    x = numbers(0, (3, 60, 72), 900, 4000)
    classes = np.full((30, 36), 4, np.uint8)
    classes[:5], classes[5:10] = 9, 11
    bands = dict(zip(NAMES, x, strict=True)) | ({"SCL": classes, "B11": x[0, ::2, ::2]} if level == "L2A" else {})
    product = write_product(tmp_path, bands, level)
    for what in (product, zipped(product), product / f"MTD_MSI{level}.xml", next(product.glob("GRANULE/*"))):
        with opened(what, mask="SCL" if level == "L2A" else None) as scene:
            values, masked = scene.read(slice(None))
            assert scene.name == product.stem
            assert scene.rule["level"] == level
            assert scene.rule["offset"] == dict.fromkeys(NAMES, 1000)
            assert [f"is {level}" in warning for warning in scene.warnings] == [True] * (level == "L2A")
        np.testing.assert_array_equal(masked, np.arange(60)[:, None] < (10 if level == "L2A" else 0) + np.zeros(72))
        np.testing.assert_array_equal(values, np.where(masked, 0, grey(x, 1000)))


def test_what_the_metadata_say_of_offsets(tmp_path: Path) -> None:
    x = numbers(0, (3, 16, 16), 900, 4000)
    bands = dict(zip(NAMES, x, strict=True))
    old = write_product(tmp_path / "old", bands, "L1C", "02.07", None)
    np.testing.assert_array_equal(pixels(old)[0], grey(x))
    lost = write_product(tmp_path / "lost", bands, "L1C", "04.00", None)
    refuses("say no offset of B04.*--offset", lost)
    np.testing.assert_array_equal(pixels(lost, offset=1000)[0], grey(x, 1000))
    with opened(old, offset=1000) as scene:
        assert any("--offset 1000 is not what its metadata say" in warning for warning in scene.warnings)
    extra = '<RADIO_ADD_OFFSET band_id="1">-1000</RADIO_ADD_OFFSET>'  # of B02 alone
    some = write_product(tmp_path / "some", bands, "L1C", "04.00", None, extra=extra)
    refuses("say no offset of B04, B03: give", some)
    np.testing.assert_array_equal(pixels(some, offset=0)[0], grey(x))
    extra = '<RADIO_ADD_OFFSET band_id="3">-2000</RADIO_ADD_OFFSET>'
    each = write_product(tmp_path / "each", bands, "L1C", extra=extra)
    np.testing.assert_array_equal(pixels(each)[0], np.stack([grey(x[0], 2000), *grey(x[1:], 1000)]))
    (old / "MTD_MSIL1C.xml").unlink()
    refuses("without metadata.*--offset 1000.*--offset 0.*--stretch", old)
    bands_alone = sorted(each.rglob("*_B0?.jp2"))
    np.testing.assert_array_equal(pixels(*bands_alone)[0], pixels(each)[0])


def test_what_a_product_must_not_have(tmp_path: Path) -> None:
    product = write_product(tmp_path, dict(zip(NAMES, numbers(0, (3, 16, 16)), strict=True)), "L1C")
    (granule,) = product.glob("GRANULE/*")
    xml = product / "MTD_MSIL1C.xml"
    good = xml.read_text()
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
    )
    for text, message in (
        (good.replace("<n1:", bomb + "]><n1:", 1), "DOCTYPE"),
        (good[: len(good) // 2], "no whole XML"),
        (good.replace(">10000<", ">0<"), "QUANTIFICATION_VALUE of 0"),
        (good.replace(">-1000<", ">many<"), "RADIO_ADD_OFFSET is 'many'"),
        (good.replace("PROCESSING_BASELINE", "BASELINE"), "no PROCESSING_BASELINE"),
        ("", "no whole XML"),
    ):
        xml.write_text(text)
        refuses(message, product)
    xml.write_bytes(good.replace("<n1:", bomb + "]><n1:", 1).replace("UTF-8", "UTF-16").encode("utf-16"))
    refuses("DOCTYPE", product)
    xml.write_text(good)
    granule.rename(granule.with_name("L1C_T32TPS_A0"))
    write_raster(granule / "IMG_DATA" / "T32TPS_20230701T101031_B04.jp2", numbers(1, (16, 16)), **LOSSLESS)
    refuses("2 granules", product)


@pytest.mark.parametrize("name", ["../B04.jp2", "/etc/B04.jp2", "a/../../B04.jp2", "C:\\B04.jp2", "a//B04.jp2"])
def test_a_zip_that_leads_out_of_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / "scene.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    refuses("is not safe", path)


# --- what the numbers are ---


def test_numbers_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    x = numbers(0, (3, 32, 32), 1, 9000)
    plain = write_raster(tmp_path / "plain.tif", x, names=NAMES)
    refuses("holds uint16 without metadata.*--offset", plain)
    refuses("leave --offset out", plain, offset=0, stretch=(0, 1))
    refuses("--offset -1000: give 1000", plain, offset=-1000)
    refuses("the first must be less", plain, stretch=(3000, 0))
    refuses("the network knows 8-bit RGB.*--stretch", plain, wants=PICTURES)
    refuses("the network knows 8-bit RGB.*--stretch", plain, wants=PICTURES, offset=0)
    for wants in (UNMEASURED, PICTURES):
        np.testing.assert_array_equal(pixels(plain, wants=wants, stretch=(500, 4500))[0], grey(x, 500, 4000))
    floats = write_raster(tmp_path / "float.tif", x.astype(np.float32), names=NAMES)
    refuses("are no reflectance", floats)
    np.testing.assert_array_equal(pixels(floats, offset=1000)[0], grey(x, 1000))
    bytes_ = write_raster(tmp_path / "bytes.tif", x.astype(np.uint8), names=NAMES)
    refuses("has 8-bit grey values", bytes_, offset=0)


def test_reflectance_as_floats_and_by_the_files_own_scale(tmp_path: Path) -> None:
    x = numbers(0, (3, 32, 32), 1, 9000)
    reflectance = (x / 10_000).astype(np.float64)
    reflectance[0, 0, :3] = np.nan, np.inf, -np.inf
    values, masked = pixels(write_raster(tmp_path / "float.tif", reflectance, names=NAMES))
    assert np.argwhere(masked).tolist() == [[0, 0], [0, 1], [0, 2]]
    np.testing.assert_array_equal(values, np.where(masked, 0, grey(x)))
    scaled = write_raster(tmp_path / "scaled.tif", x, names=NAMES)
    with rasterio.open(scaled, "r+") as file:
        file.scales, file.offsets = [1e-4] * 3, [-0.1] * 3
    assert abs(pixels(scaled)[0] - grey(x, 1000)).max() <= 1


def test_signed_numbers(tmp_path: Path) -> None:
    x = numbers(0, (3, 32, 32), 0, 5000).astype(np.int16) - 500
    np.testing.assert_array_equal(
        pixels(write_raster(tmp_path / "a.tif", x, names=NAMES, nodata=-9999), offset=0)[0], grey(x) * (x != 0).any(0)
    )


def test_what_is_not_like_the_training_images_is_warned_of(tmp_path: Path) -> None:
    wants = inputs_of(EUROSAT_CLASSES).measured(numbers(0, (10, 64, 64, 3), 60, 120).astype(np.uint8))
    for low, high, words in ((60, 120, ""), (1, 30, "darker in"), (150, 255, "brighter in")):
        x = numbers(1, (3, 64, 64), low, high).astype(np.uint8)
        with opened(write_raster(tmp_path / "a.tif", x, colours=RGB), wants=wants) as scene:
            assert [words in warning for warning in scene.warnings] == [True] * bool(words)
    picture = write_raster(tmp_path / "T32TPS_20230701T101031_TCI_10m.tif", x, colours=RGB)
    with opened(picture) as scene:
        assert "true-colour" in scene.warnings[0]
    empty = write_raster(tmp_path / "empty.tif", np.zeros_like(x), colours=RGB)
    with opened(empty, wants=wants) as scene:
        assert scene.read(slice(None))[1].all()
        assert "no data" in scene.warnings[0]


# --- where pixels lie ---


def plane(grid_transform: Affine, crs: str, height: int, width: int) -> np.ndarray:
    """Digital numbers that rise evenly to the east and south of EPSG:32632."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    xs, ys = grid_transform @ (columns.ravel(), rows.ravel())
    xs, ys = reproject(crs, "EPSG:32632", xs, ys) if crs != "EPSG:32632" else (xs, ys)
    return plane_at(np.array(xs), np.array(ys)).reshape(height, width)


def plane_at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1000 + (x - 600000) * 0.5 + (5200020 - y) * 0.25


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32632", CORNER @ Affine.scale(2)),
        ("EPSG:32632", CORNER @ Affine.scale(0.5)),
        ("EPSG:32632", CORNER @ Affine.scale(2, 1)),
        ("EPSG:32632", CORNER @ Affine.rotation(30)),
        ("EPSG:4326", Affine(0.00012, 0, 10.3, 0, -0.00009, 46.94)),
        ("EPSG:3857", Affine(14, 0, 1146700, 0, -14, 5930000)),
    ],
)
def test_resampled_pixels_lie_where_they_lay(crs: str, transform: Affine, tmp_path: Path) -> None:
    truth = plane(transform, crs, 90, 80)
    path = write_raster(tmp_path / "a.tif", np.stack([truth] * 3).astype(np.float32), crs, transform, NAMES)
    with opened(path, resolution=10, stretch=(truth.min(), truth.max())) as scene:
        values, masked = scene.read(slice(None))
        grid = scene.grid
    assert grid.crs == CRS.from_epsg(32632)
    assert (grid.transform.a, grid.transform.b, grid.transform.d, grid.transform.e) == (10, 0, 0, -10)
    there = plane(grid.transform, "EPSG:32632", grid.height, grid.width)
    wanted = grey(there, truth.min(), np.ptp(truth))
    inner = ~masked
    inner[1:-1, 1:-1] &= ~(masked[:-2, 1:-1] | masked[2:, 1:-1] | masked[1:-1, :-2] | masked[1:-1, 2:])
    inner[[0, -1]] = inner[:, [0, -1]] = False  # the outermost pixels have no neighbours to be between
    assert inner.mean() > 0.4
    step = np.hypot(0.5, 0.25) * 10 * 254 / np.ptp(truth)  # grey values from pixel to pixel
    assert abs(values[0].astype(float) - wanted)[inner].max() < 1 + 0.2 * step


def test_grids_stay_as_they_are_without_resolution(tmp_path: Path) -> None:
    for transform in (CORNER @ Affine.rotation(30), CORNER @ Affine.scale(1, -1), CORNER @ Affine.scale(1, 0.98)):
        path = write_raster(tmp_path / "a.tif", numbers(0, (3, 8, 9)), transform=transform, names=NAMES)
        with opened(path, offset=0) as scene:
            assert scene.grid.transform == transform
            assert (scene.grid.width, scene.grid.height) == (9, 8)
            assert scene.warnings == []


def test_a_finer_grid_begins_where_the_scene_does(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 9))
    path = write_raster(tmp_path / "a.tif", x, transform=CORNER @ Affine.translation(0.3, 0.4), names=NAMES)
    with opened(path, offset=0, resolution=5) as scene:
        assert scene.grid.transform == CORNER @ Affine.translation(0.3, 0.4) @ Affine.scale(0.5)
        assert (scene.grid.width, scene.grid.height) == (18, 16)


def test_pixels_of_another_size_are_told_or_refused(tmp_path: Path) -> None:
    for scale, crs in ((2, "EPSG:32632"), (0.05, "EPSG:32632"), (4, "EPSG:3857")):
        path = write_raster(tmp_path / "a.tif", numbers(0, (3, 8, 9)), crs, CORNER @ Affine.scale(scale), NAMES)
        refuses("--resolution 10 resamples it", path, offset=0)
    with opened(path, offset=0, resolution=40) as scene:  # said, so meant
        assert "the network learned from 10 m" in scene.warnings[0]
    degrees = write_raster(tmp_path / "b.tif", numbers(0, (3, 8, 9)), "EPSG:4326", Affine(9e-5, 0, 9, 0, -9e-5, 47))
    with opened(degrees, offset=0, bands=NAMES) as scene:
        assert "6.85 x 10 m" in scene.warnings[0]
    with opened(degrees, stretch=(0, 1), bands=NAMES, wants=PICTURES) as scene:
        assert scene.warnings == []
    refuses("a 16th", path, offset=0, resolution=0.01)


def test_without_a_coordinate_system_pixels_are_all_there_is(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", numbers(0, (3, 8, 9)), None, Affine.identity(), NAMES)
    with opened(path, offset=0) as scene:
        assert scene.grid.crs is None
        assert "no coordinate system" in scene.warnings[0]
    refuses("no place on Earth", path, offset=0, resolution=10)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ('LOCAL_CS["here",UNIT["metre",1]]', CORNER),
        (
            'GEOGCS["Mars",DATUM["Mars",SPHEROID["Mars",3396190,169.89]],PRIMEM["0",0],UNIT["degree",0.0174532925]]',
            None,
        ),
        ("EPSG:32632", Affine(10, 0, 9e8, 0, -10, 9e8)),
        ("EPSG:4326", Affine(9e-5, 0, 11, 0, -9e-5, 200)),
    ],
)
def test_a_scene_that_is_nowhere_on_earth_is_refused(crs: str, transform: Affine, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", numbers(0, (3, 8, 9)), crs, transform, NAMES)
    refuses("no place on Earth by its coordinate system.*-a_srs", path, offset=0)


@pytest.mark.parametrize("name", ["a\nb.tif", "S\u00fcd {1}.tif"])
def test_names_of_files_may_be_odd(name: str, tmp_path: Path) -> None:
    path = write_raster(tmp_path / name, numbers(0, (3, 8, 9)), names=NAMES)
    refuses("without metadata", path)
    pixels(path, offset=0)
    refuses("is no text in UTF-8", path.rename(tmp_path / "a\udcffb.tif"))


def test_bands_of_other_places_are_refused(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 8))
    for name, band in zip(NAMES, x, strict=True):
        write_raster(tmp_path / f"{name}.tif", band)
    write_raster(tmp_path / "B03.tif", x[1], "EPSG:32633")
    refuses(r"B03.*is in EPSG:32633, another band in EPSG:32632", tmp_path, offset=0)
    write_raster(tmp_path / "B03.tif", x[1], transform=CORNER @ Affine.translation(5, 0))
    refuses("covers another place", tmp_path, offset=0)
    write_raster(tmp_path / "B03.tif", x[1, ::2, ::2], transform=CORNER @ Affine.scale(2))
    assert pixels(tmp_path, offset=0)[0].shape == (3, 8, 8)


# --- what is masked ---


def test_no_data_is_what_the_file_says_and_0_in_all_bands(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 9))
    x[:, 0], x[0, 1], x[1, 2] = 0, 0, 7
    for nodata, rows in ((None, [0]), (0, [0]), (7, [0, 2])):
        _, masked = pixels(write_raster(tmp_path / "a.tif", x, names=NAMES, nodata=nodata), offset=0)
        assert np.flatnonzero(masked.all(1)).tolist() == rows
        assert masked.sum() == 9 * len(rows)


def test_no_data_does_not_bleed_into_resampled_pixels(tmp_path: Path) -> None:
    for nothing, dtype, said in ((0, np.uint16, None), (7, np.uint16, 7), (np.nan, np.float32, None)):
        x = np.full((3, 20, 20), 2000 if dtype == np.uint16 else 0.2, dtype)
        x[:, 5:12] = nothing
        path = write_raster(tmp_path / "a.tif", x, names=NAMES, nodata=said)
        values, masked = pixels(path, resolution=7, offset=0 if dtype == np.uint16 else None)
        assert set(np.unique(values[:, ~masked])) == {186}
        assert 0.3 < masked.mean() < 0.4


def test_masks_by_band_by_file_and_by_class(tmp_path: Path) -> None:
    x = numbers(0, (4, 8, 8))
    x[3] = np.arange(8)[:, None]
    path = write_raster(tmp_path / "a.tif", x, names=(*NAMES, "SCL"))
    clouds = np.zeros((2, 2), np.uint8)
    clouds[0, 1] = 1
    half = write_raster(tmp_path / "clouds.tif", clouds, transform=CORNER @ Affine.scale(4), nodata=0)
    same = write_raster(tmp_path / "same.tif", np.kron(clouds, np.ones((4, 4), np.uint8)), nodata=0)
    for spec, rows in (("SCL", [0, 1, 3]), ("scl=4,5", [4, 5]), ("B04", list(range(8)))):
        assert np.flatnonzero(pixels(path, offset=0, mask=spec)[1].all(1)).tolist() == rows
    cloudy = np.zeros((8, 8), bool)
    cloudy[:4, 4:] = True
    for file in (half, same):  # though 0, the clear sky, is called no data
        np.testing.assert_array_equal(pixels(path, offset=0, mask=str(file))[1], cloudy)
    np.testing.assert_array_equal(pixels(path, offset=0, mask=f"{half}=0,7")[1], ~cloudy)
    small = write_raster(tmp_path / "small.tif", clouds, transform=CORNER)
    assert pixels(path, offset=0, mask=str(small))[1].sum() == 64 - 3  # what it does not cover is not known
    refuses("neither a file nor a band; the scene has B02, B03, B04, SCL", path, offset=0, mask="QA")
    refuses("has 4 bands", path, offset=0, mask=str(path))
    nowhere = write_raster(tmp_path / "nowhere.tif", clouds, None, Affine.identity())
    refuses("no coordinate system", path, offset=0, mask=str(nowhere))


# --- reading in pieces ---


@pytest.mark.parametrize("resolution", [None, 7.0])
def test_pieces_are_those_of_the_whole(resolution: float | None, tmp_path: Path) -> None:
    x = numbers(0, (3, 300, 280), 0, 3000)
    x[:, 40:60] = 0
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "nodata": 0}
    path = write_raster(tmp_path / "a.tif", x, names=NAMES, **tiles)
    whole, masked = pixels(path, offset=0, resolution=resolution)
    with opened(path, offset=0, resolution=resolution) as scene:
        assert resolution or scene.rows_per_block == 64
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def read() -> None:
            for top in range(0, scene.grid.height, 50):
                found.append(scene.read(slice(top, top + 50), slice(13, 200)))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    np.testing.assert_array_equal(np.concatenate([part for part, _ in found], 1), whole[:, :, 13:200])
    np.testing.assert_array_equal(np.concatenate([part for _, part in found]), masked[:, 13:200])


# --- bad input ---


def test_what_is_no_scene(tmp_path: Path) -> None:
    refuses("no scene at", tmp_path / "none.tif")
    refuses("no GeoTIFF, JPEG 2000 or VRT in it", tmp_path)
    text = tmp_path / "text.tif"
    text.write_text("a scene")
    refuses("is no GeoTIFF", text)
    text.write_bytes(b"II*\0" + bytes(100))
    refuses("cannot be read", text)
    zip_ = tmp_path / "a.zip"
    zip_.write_bytes(b"PK" + bytes(100))
    refuses("not a whole zip", zip_)
    x = numbers(0, (3, 8, 8))
    refuses("complex", write_raster(tmp_path / "complex.tif", x.astype(np.complex64), names=NAMES), offset=0)
    palette = write_raster(tmp_path / "palette.tif", x[0].astype(np.uint8))
    with rasterio.open(palette, "r+") as file:
        file.write_colormap(1, {1: (255, 0, 0, 255)})
    refuses("palette", palette)
    flat = write_raster(tmp_path / "flat.tif", x, transform=Affine(0, 0, 1, 0, 0, 1), names=NAMES)
    refuses("puts all pixels in one place", flat, offset=0)


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    x = numbers(0, (3, 200, 200))
    for path in (
        write_raster(tmp_path / "a.tif", x),
        write_raster(tmp_path / "b.tif", x, tiled=True, compress="deflate", blockxsize=64, blockysize=64),
        write_raster(tmp_path / "c.jp2", x, **LOSSLESS),
    ):
        data = path.read_bytes()
        for share in (0.95, 0.5, 0.1):
            path.write_bytes(data[: int(len(data) * share)])
            refuses("cut short", path, offset=0, bands=NAMES)
        if path.suffix == ".tif":  # found before a map is begun
            path.write_bytes(data[: int(len(data) * 0.95)])
            with pytest.raises(UserError, match="it should have"):
                opened(path, offset=0, bands=NAMES)


def test_a_jpeg_2000_that_lies_about_its_size(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.jp2", numbers(0, (3, 64, 64)), **LOSSLESS)
    data = path.read_bytes()
    marker = data.index(b"\xff\x51") + 6  # of SIZ, then width and height
    box = data.index(b"ihdr") + 4  # height and width
    for width, height in ((100_000, 100_000), (2**31 - 1, 2**31 - 1), (64, 4000), (0, 64), (64, 65), (65, 64)):
        size, turned = struct.pack(">LL", width, height), struct.pack(">LL", height, width)
        codestream = data[:marker] + size + data[marker + 8 :]
        path.write_bytes(codestream)
        refuses("damaged|cut short", path, offset=0, bands=NAMES)
        path.write_bytes(data[:box] + turned + data[box + 8 :])
        refuses("it says that it has", path, offset=0, bands=NAMES)
        if height not in (64, 65):  # else the one tile's size is not known from elsewhere
            path.write_bytes(codestream[:box] + turned + codestream[box + 8 :])
            refuses("has 1 of its .* tiles", path, offset=0, bands=NAMES)


def test_a_jpeg_2000_with_boxes_of_no_possible_size(tmp_path: Path) -> None:
    """GDAL goes round and round in some of them."""
    path = write_raster(tmp_path / "a.jp2", numbers(0, (3, 64, 64)), **LOSSLESS)
    data = path.read_bytes()
    assert data.index(b"asoc") < data.index(b"lbl ") < data.index(b"jp2c")
    for kind in (b"lbl ", b"colr", b"asoc"):
        at = data.index(kind) - 4
        for size in (0, 7, 2**31) if kind != b"asoc" else (7,):
            path.write_bytes(data[:at] + struct.pack(">L", size) + data[at + 4 :])
            refuses("a box of no possible size", path, offset=0, bands=NAMES)
    path.write_bytes(data + struct.pack(">L4s", 2**20, b"free"))
    refuses("cut short", path, offset=0, bands=NAMES)
    path.write_bytes(data + struct.pack(">L4s", 8, b"free"))
    pixels(path, offset=0, bands=NAMES)


def test_vrts_stay_on_this_machine(tmp_path: Path) -> None:
    x = numbers(0, (3, 8, 8))
    source = write_raster(tmp_path / "a.tif", x, names=NAMES)

    def vrt(file: str, name: str = "a.vrt") -> Path:
        bands = "".join(
            f'<VRTRasterBand dataType="UInt16" band="{n}"><Description>{band}</Description><SimpleSource>'
            f'<SourceFilename relativeToVRT="1">{file}</SourceFilename><SourceBand>{n}</SourceBand>'
            "</SimpleSource></VRTRasterBand>"
            for n, band in enumerate(NAMES, 1)
        )
        path = tmp_path / name
        place = "<GeoTransform>600000,10,0,5200020,0,-10</GeoTransform><SRS>EPSG:32632</SRS>"
        path.write_text(f'<VRTDataset rasterXSize="8" rasterYSize="8">{place}{bands}</VRTDataset>')
        return path

    np.testing.assert_array_equal(pixels(vrt(source.name), offset=0)[0], grey(x))
    vrt(source.name, "inner.vrt")
    np.testing.assert_array_equal(pixels(vrt("inner.vrt"), offset=0)[0], grey(x))
    for file, message in (
        ("a.vrt", "VRT of VRTs"),
        ("gone.tif", "gone.tif, which is not there"),
        ("/vsicurl/http://127.0.0.1:9/a.tif", "only files on this machine"),
        ("http://127.0.0.1:9/a.tif", "only files on this machine"),
        ("/vsizip//vsicurl/http://127.0.0.1:9/a.zip/a.tif", "only files on this machine"),
        ("WMS:http://127.0.0.1:9", "only files on this machine"),
    ):
        refuses(message, vrt(file), offset=0)
    bomb = vrt(source.name)
    bomb.write_text('<!DOCTYPE x [<!ENTITY a "b">]>' + bomb.read_text())
    refuses("DOCTYPE", bomb, offset=0)


GIANT = """
import resource, sys
from hvd_eurosat.data.inputs import EUROSAT
from hvd_eurosat.scene.source import SceneOptions, open_scene
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_scene(sys.argv[1:], EUROSAT, SceneOptions(offset=0)) as scene:
    for row in range(0, 10**6, 10**5):
        assert scene.read(slice(row, row + 64), slice(0, 20_000))[1].all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_terapixel_takes_no_more_memory_than_a_piece_of_it(tmp_path: Path) -> None:
    path, side = tmp_path / "giant.tif", 10**6
    kind = {"driver": "GTiff", "dtype": "uint16", "count": 3, "crs": "EPSG:32632", "transform": CORNER}
    tiles = {"tiled": True, "blockxsize": 2048, "blockysize": 2048, "sparse_ok": True, "bigtiff": "YES"}
    with rasterio.open(path, "w", width=side, height=side, **kind, **tiles) as file:
        file.descriptions = NAMES
    done = subprocess.run([sys.executable, "-c", GIANT, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600 << 10  # KiB, of which GDAL's cache is 256 MiB
    strip = tmp_path / "strip.tif"
    with rasterio.open(strip, "w", width=side, height=side, blockysize=1024, sparse_ok=True, bigtiff="YES", **kind):
        pass
    refuses("can be read in pieces of 6.1 GB only", strip, offset=0, bands=NAMES)


@pytest.mark.parametrize("count", [70, pytest.param(3000, marks=pytest.mark.long)])
def test_damaged_scenes_are_refused_or_mapped(count: int, tmp_path: Path) -> None:
    """In a process of their own, for GDAL could crash."""
    words = [sys.executable, "-m", "tests.unit.mutants", str(tmp_path), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=max(210, count), check=False)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (outcomes[-1], done.stderr)
    messages = [what for _, _, what in outcomes if what.startswith("refused: ")]
    assert len(messages) > count // 3
    assert sum(what == "mapped" for _, _, what in outcomes) == count - len(messages)
    assert not any("\n" in message for message in messages)
    assert "Traceback" not in done.stderr


# --- what a network's inputs are ---


def test_inputs_are_known_by_the_classes_and_measured() -> None:
    assert inputs_of(EUROSAT_CLASSES[::-1]) == EUROSAT
    assert inputs_of(EUROSAT_CLASSES[:9]) == PICTURES
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[..., 0] = np.arange(16).reshape(4, 2, 2)
    images[..., 2] = 255
    measured = PICTURES.measured(images).quantiles
    assert measured == ((0, 0, 3, 7, 11, 15, 15), (0,) * 7, (255,) * 7)
    assert Inputs.model_validate(EUROSAT.model_dump(mode="json")) == EUROSAT


def test_the_samples_scene_and_its_truth(tmp_path: Path) -> None:
    files = draw_scene(3)
    assert files == draw_scene(3)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    values, masked = pixels(tmp_path / "scene.tif", wants=EUROSAT)
    assert not masked.any()
    with opened(tmp_path / "scene.tif", wants=EUROSAT) as scene, rasterio.open(tmp_path / "scene_truth.tif") as truth:
        assert truth.transform == scene.grid.transform @ Affine.scale(64)
        assert (truth.height * 64, truth.width * 64) == values.shape[1:]
        labels = truth.read(1)
    assert labels.max() < len(SCENES)
    patches = values.reshape(3, 12, 64, 16, 64).mean((2, 4))
    lakes, towns = labels == list(SCENES).index("SeaLake"), labels == list(SCENES).index("Industrial")
    assert patches[0][towns].mean() > patches[0][lakes].mean() + 20


# --- real pieces ---


@pytest.mark.skipif(not (SHARED / "EuroSAT_MS_100.zip").exists(), reason=f"no real patches in {SHARED}")
def test_real_digital_numbers_become_the_grey_of_eurosat(tmp_path: Path) -> None:
    errors = []
    with zipfile.ZipFile(SHARED / "EuroSAT_MS_100.zip") as numbers_, zipfile.ZipFile(SHARED / "EuroSAT_RGB.zip") as rgb:
        for name in [name for name in numbers_.namelist() if name.endswith(".tif")][::9]:
            path = Path(numbers_.extract(name, tmp_path))
            values, masked = pixels(path, offset=0, bands=MS_BANDS)
            picture = rgb.read(f"EuroSAT_RGB/{path.parent.name}/{path.stem}.jpg")
            jpeg = np.asarray(Image.open(io.BytesIO(picture))).transpose(2, 0, 1)
            assert not masked.any()
            errors.append(values.astype(float) - jpeg)
    assert len(errors) == 12
    assert abs(np.mean(errors)) < 0.1
    assert np.abs(errors).mean() < 2  # which is JPEG's


@pytest.mark.parametrize(
    ("name", "bands"),
    [("bolzano_L2A_5band", "B04 B03 B02 B08 SCL"), ("inn_L2A_2x4band", "B04 B03 B02 B08 - - - -")],
)
def test_real_scenes(name: str, bands: str) -> None:
    """Bolzano's file has its red band first: bare soil (SCL 5) and roofs are red in it, not blue."""
    path = SHARED / "scenes" / f"{name}.tif"
    if not path.exists():
        pytest.skip(f"no real scenes in {SHARED}")
    with opened(path, wants=EUROSAT, offset=0, bands=tuple(bands.split())) as scene:
        values, masked = scene.read(slice(None))
        assert scene.rule["level"] == "L2A"
        assert any("is L2A" in warning for warning in scene.warnings)
        assert not any("--bands" in warning for warning in scene.warnings)
    swapped = tuple(bands.replace("B02", "x").replace("B04", "B02").replace("x", "B04").split())
    with opened(path, wants=EUROSAT, offset=0, bands=swapped) as scene:
        assert any("are --bands in the file's order?" in warning for warning in scene.warnings)
    assert masked.mean() < 0.001
    assert np.median(values[1]) > np.median(values[2])  # vegetation is greener than blue
    bright = values.sum(0) > np.quantile(values.sum(0), 0.9)
    assert values[0][bright].mean() > values[2][bright].mean()
