"""Sets of any bands: how they are read, described and refused, chosen by name, augmented and normalised."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data
from hvd_eurosat.data import augment
from hvd_eurosat.data.bands import EUROSAT13, RGB, SENTINEL2
from hvd_eurosat.data.batches import open_images
from hvd_eurosat.data.images import BadImageError, Crop
from hvd_eurosat.data.inputs import (
    EUROSAT,
    EUROSAT_CLASSES,
    EUROSAT_MS,
    IMAGENET_MEAN,
    LEVELS,
    PICTURES,
    REFLECTANCE,
    Inputs,
)
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.multispectral import grey, kind_of, read_bands, read_pixels
from hvd_eurosat.data.packed import open_packed, pack, resolve_normalisation, verify_packed
from hvd_eurosat.data.tree import Tree, open_tree, read_manifest
from hvd_eurosat.errors import UserError
from hvd_eurosat.prepare import main
from tests.unit.conftest import EUROSAT as RGB_ZIP
from tests.unit.conftest import EUROSAT_13 as MS_ZIP
from tests.unit.conftest import Encode, Grow, Run
from tests.unit.patches import SIDE, grow_bands, noise
from tests.unit.scenes import write_raster

needs_ms = pytest.mark.skipif(not MS_ZIP.exists(), reason=f"the multispectral patches are not at {MS_ZIP}")
FOUR = ("B04", "B03", "B02", "B08")
UNMEASURED = {"mean": None, "std": None, "quantiles": None}


def pixels_of(tree: Tree, split: str) -> np.ndarray:
    """All images of a split as rasterio reads them, [N, S, S, bands]."""
    import rasterio

    found = []
    for name in tree.files(split):
        with rasterio.open(tree.path(name)) as file:
            found.append(np.moveaxis(file.read(), 0, -1))
    return np.stack(found)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A prepared set of four bands of 16 bits."""
    root = tmp_path_factory.mktemp("four")
    source = grow_bands(root / "source", ("Field", "Wood"), 4)
    words = ["--bands", ",".join(FOUR), "--image-size", SIDE, "--ratios", "50,25,25"]
    assert main(["--source", str(source), "--out", str(root / "data"), *map(str, words)]) == 0
    return open_tree(root / "data")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The 100 multispectral patches, from the original archive's folders."""
    out = tmp_path_factory.mktemp("real") / "data"
    assert main(["--source", str(MS_ZIP), "--out", str(out), "--ratios", "60,20,20"]) == 0
    return open_tree(out)


# --- prepare


def test_prepare_keeps_the_files_and_states_their_bands(four: Tree) -> None:
    inputs = four.inputs
    assert (inputs.bands, inputs.file, inputs.dtype, inputs.unit) == (FOUR, FOUR, "uint16", "digital numbers")
    assert inputs.stretch is None
    expected = pixels_of(four, "train")
    np.testing.assert_allclose(inputs.mean, expected.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(inputs.std, expected.std((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(inputs.quantiles, np.quantile(expected, LEVELS, (0, 1, 2)).T, rtol=1e-12)


@needs_ms
def test_the_real_archive_is_prepared_as_it_is(real: Tree) -> None:
    assert [len(real.files(split)) for split in SPLITS] == [60, 20, 20]
    assert real.inputs.model_copy(update=UNMEASURED) == EUROSAT_MS
    expected = pixels_of(real, "train").astype(np.float64)
    assert np.abs(np.subtract(real.inputs.mean, expected.mean((0, 1, 2)))).max() < 1e-6
    assert np.abs(np.subtract(real.inputs.std, expected.std((0, 1, 2)))).max() < 1e-6
    assert np.abs(np.subtract(real.inputs.quantiles, np.quantile(expected, LEVELS, (0, 1, 2)).T)).max() < 1e-6
    assert EUROSAT13.index("B8A") == 12


@needs_ms
def test_the_recorded_rule_makes_the_rgb_set_of_these_bands(real: Tree) -> None:
    """To JPEG's own error, which over all pixels is none."""
    as_rgb = real.brought_to(EUROSAT)
    images = open_packed(as_rgb, "test", 64, None).images
    assert images.dtype == np.uint8
    differences = []
    with zipfile.ZipFile(RGB_ZIP) as archive:
        members = {Path(name).stem: name for name in archive.namelist()}
        for name, found in zip(as_rgb.files("test"), images, strict=True):
            jpeg = np.asarray(Image.open(BytesIO(archive.read(members[Path(name).stem]))))
            differences.append(found.astype(float) - jpeg)
    assert np.abs(np.mean(differences, (0, 1, 2))).max() < 0.2
    assert np.abs(differences).mean() < 2


def test_files_may_name_their_bands_in_whatever_order(tmp_path: Path, run: Run) -> None:
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), 3, names=("Blue", "B8A", "b12, SWIR"))
    swapped = source / "Wood" / "Wood_1.tif"
    write_raster(swapped, noise(4, 3)[::-1], names=("B12", "B8A", "B02"))
    status, _, said = run(source, "--image-size", SIDE)
    assert status == 0, said
    tree = open_tree(tmp_path / "out")
    assert tree.inputs.bands == ("B02", "B8A", "B12")
    split = next(name.split("/")[0] for name in tree.checksums if name.endswith("Wood_1.tif"))
    packed = open_packed(tree, split, SIDE, None)
    place = [Path(name).name for name in packed.files].index("Wood_1.tif")
    assert np.array_equal(np.moveaxis(packed.images[place], -1, 0), noise(4, 3))


def test_eight_bit_bands_are_grey_and_four_of_them_no_rgb(tmp_path: Path, run: Run) -> None:
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), 4, "uint8", photometric="RGB", alpha="NO")
    status, _, said = run(source, "--image-size", SIDE, out="refused")
    assert status == 2
    assert "a TIFF of 4 bands, of which nobody can tell the red, green and blue: prepare --bands names them" in said
    assert run(source, "--image-size", SIDE, "--bands", "red,green,blue,nir")[0] == 0
    inputs = open_tree(tmp_path / "out").inputs
    assert (inputs.bands, inputs.unit, inputs.dtype, inputs.is_rgb) == (FOUR, "grey", "uint8", False)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_set_of_pictures_is_described_too(
    is_split: bool, grow: Grow, encode: Encode, run: Run, tmp_path: Path
) -> None:
    """By the training images as they are in the folder: no others, nor what was left out."""
    folders = [f"{split}/{label}" if is_split else label for split in SPLITS[: 1 + 2 * is_split] for label in "AB"]
    source = grow("photos", dict.fromkeys(folders, 6))
    for number, folder in enumerate(folders):
        (source / folder / "large.jpg").write_bytes(encode(number, (90, 70)))
        (source / folder / "grey.png").write_bytes(encode(10 + number, kind="PNG", mode="L"))
        (source / folder / "of_two_classes.jpg").write_bytes(encode(99))
        (source / folder / "broken.jpg").write_bytes(encode(number)[:300])
    status, _, said = run(source, "--resize", "--convert", "--skip-bad", "--ratios", "2,1,1")
    assert status == 0, said
    tree = open_tree(tmp_path / "out")
    assert len(tree.files("train")) == (16 if is_split else 8)
    pixels = np.stack([np.asarray(Image.open(tree.path(name))) for name in tree.files("train")])
    np.testing.assert_allclose(tree.inputs.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(tree.inputs.std, pixels.std((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(tree.inputs.quantiles, np.quantile(pixels, LEVELS, (0, 1, 2)).T, rtol=1e-12)
    assert tree.inputs.model_copy(update=UNMEASURED) == PICTURES
    assert tree.inputs.measured(pixels[:1]) is tree.inputs


@pytest.mark.parametrize(
    ("bands", "options", "message"),
    [
        (4, ("--bands", "B04,B03,B02"), "--bands names 3 bands, and Field/Field_0.tif of .* has 4"),
        (4, ("--bands", "B04,B03,red,B08"), "--bands names B04 twice"),
        (4, ("--bands", "B04,,B02,B08"), "'' is no name of a band"),
        (4, (), "a TIFF of 4 bands, of which nobody can tell"),
        (13, (), "a TIFF of 13 bands, of which nobody can tell"),
        (65, (), "a TIFF of 65 bands; 64 is the most"),
        (65, ("--bands", ",".join(f"n{n}" for n in range(65))), "--bands names 65 bands; 1 to 64 are wanted"),
        (65, ("--bands", ",".join(f"n{n}" for n in range(64))), "Field_0.tif: a TIFF of 65 bands; 64 is the most"),
        (4, ("--bands", "a,b,c,d", "--resize"), "--resize and --convert are for 8-bit RGB, and .* has 4 bands"),
    ],
)
def test_bands_that_do_not_fit_are_refused(
    bands: int, options: tuple[str, ...], message: str, tmp_path: Path, run: Run
) -> None:
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), bands, count=1)
    status, _, said = run(source, "--image-size", SIDE, *options)
    assert status == 2
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_set_may_have_64_bands(tmp_path: Path, run: Run) -> None:
    names = tuple(f"n{n}" for n in range(64))
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), 64)
    status, _, said = run(source, "--image-size", SIDE, "--bands", ",".join(names))
    assert status == 0, said
    tree = open_tree(tmp_path / "out")
    assert tree.inputs.bands == names
    np.testing.assert_allclose(tree.inputs.mean, pixels_of(tree, "train").mean((0, 1, 2)), rtol=1e-12)


def float_patch() -> np.ndarray:
    """Reflectances, one of which is missing."""
    pixels = noise(1, 4).astype(np.float32) / 10_000
    pixels[0, 0, 0] = np.nan
    return pixels


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (noise(1, 5), "5 bands; 4 are wanted: B04, B03, B02, B08"),
        (noise(1, 4, side=24), "24x24 pixels; 16x16 is wanted"),
        (float_patch(), "float32 numbers, some of them NaN; uint16 is wanted"),
        (noise(1, 4, "uint8"), "uint8 numbers; uint16 is wanted"),
    ],
    ids=["another count", "another size", "NaN", "8 bits"],
)
def test_a_patch_unlike_the_others_is_named(pixels: np.ndarray, message: str, tmp_path: Path, run: Run) -> None:
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), 4)
    write_raster(source / "Wood" / "odd.tif", pixels)
    options = ("--image-size", SIDE, "--bands", ",".join(FOUR))
    status, _, said = run(source, *options)
    assert status == 2
    assert f"Wood/odd.tif: {message}" in said
    assert run(source, *options, "--skip-bad")[0] == 0
    assert [bad.file for bad in read_manifest(tmp_path / "out").skipped] == ["Wood/odd.tif"]


def test_a_set_of_floating_point_numbers_is_refused(tmp_path: Path, run: Run) -> None:
    for label in ("Field", "Wood"):
        write_raster(tmp_path / "source" / label / "1.tif", float_patch())
    status, _, said = run(tmp_path / "source", "--image-size", SIDE, "--bands", ",".join(FOUR))
    assert status == 2
    assert "holds float32, and uint16 or uint8 is wanted: gdal_translate -ot UInt16" in said


def test_a_set_of_16_bits_gets_its_unit(tmp_path: Path, run: Run) -> None:
    source = grow_bands(tmp_path / "source", ("Field", "Wood"), 4)
    words = ("--image-size", SIDE, "--bands", ",".join(FOUR))
    status, _, said = run(source, *words, "--unit", REFLECTANCE)
    assert status == 0, said
    assert f"has uint16 bands {', '.join(FOUR)}: reflectance x 10,000" in said
    told = open_tree(tmp_path / "out")
    assert told.inputs.unit == REFLECTANCE
    assert run(source, *words, "--unit", "digital numbers", out="as-it-is")[0] == 0
    plain = open_tree(tmp_path / "as-it-is").inputs
    assert plain.model_copy(update={"unit": REFLECTANCE}) == told.inputs
    assert told.brought_to(EUROSAT_MS.choosing(FOUR, "", "")).inputs.places == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("classes", "bands", "dtype", "unit", "message"),
    [
        (EUROSAT_CLASSES, 13, "uint16", "digital numbers", "holds reflectance x 10,000: EuroSAT's 13 bands, known by"),
        (("Field", "Wood"), 4, "uint8", "reflectance x 10,000", "holds grey: 4 bands by name, uint8"),
        (("Field", "Wood"), 4, "uint8", "digital numbers", "holds grey: 4 bands by name, uint8"),
        (("Field", "Wood"), 4, "uint16", "grey", "4 bands by name, uint16, and only 8-bit numbers are grey"),
        (("Field", "Wood"), 3, "uint8", "grey", "--unit is for TIFFs of bands, and .* is taken for RGB"),
    ],
)
def test_a_unit_that_contradicts_what_is_known_is_refused(
    classes: tuple[str, ...], bands: int, dtype: str, unit: str, message: str, tmp_path: Path, run: Run
) -> None:
    options = {"photometric": "RGB"} if bands == 3 else {}
    source = grow_bands(tmp_path / "source", classes, bands, dtype, count=1, **options)
    names = ("--bands", ",".join(FOUR)) if bands == 4 else ()
    status, _, said = run(source, "--image-size", SIDE, *names, "--unit", unit)
    assert status == 2
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [4, 60, 900])
def test_a_file_cut_short_is_a_bad_image(cut: int, tmp_path: Path) -> None:
    data = write_raster(tmp_path / "a.tif", noise(1, 4)).read_bytes()
    with pytest.raises(BadImageError):
        read_bands(data[:cut], FOUR, "uint16")


def test_a_file_of_several_pages_is_a_bad_image(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(n, 1, "uint8")[0]) for n in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(BadImageError, match="several pages"):
        kind_of((tmp_path / "a.tif").read_bytes())


# --- the chosen bands


def test_bands_are_chosen_by_name_and_order(four: Tree, tmp_path: Path) -> None:
    whole = open_packed(four, "train", SIDE, tmp_path)
    chosen = four.choosing(("nir", "B2"))
    assert chosen.inputs.bands == ("B08", "B02")
    assert chosen.inputs.mean == (four.inputs.mean[3], four.inputs.mean[2])
    packed = open_packed(chosen, "train", SIDE, tmp_path)
    assert np.array_equal(packed.images, whole.images[..., [3, 2]])
    assert whole.images.dtype == packed.images.dtype == np.uint16
    for path in tmp_path.glob("*.npy"):
        verify_packed(path)
    with pytest.raises(UserError, match=r"has no band B11, which data.bands asks for; it has B04, B03, B02, B08"):
        four.choosing(("B11",))
    with pytest.raises(UserError, match=r"data.bands names B08 twice"):
        four.choosing(("B08", "nir"))


def test_red_green_and_blue_of_16_bits_are_no_rgb_set(four: Tree) -> None:
    chosen = four.choosing(RGB)
    assert not chosen.inputs.is_rgb
    data = resolve_normalisation(chosen, Data())
    assert (data.mean, data.std) == (chosen.inputs.mean, chosen.inputs.std)
    assert open_packed(chosen, "test", SIDE, None).images.dtype == np.uint16


def test_normalisation_is_imagenets_of_pictures_the_sets_of_others_and_ones_own(four: Tree, grow: Grow) -> None:
    pictures = open_tree(grow("data", {f"{split}/{label}": 1 for split in SPLITS for label in "ab"}))
    assert resolve_normalisation(pictures, Data()).mean == IMAGENET_MEAN
    own = resolve_normalisation(four, Data(mean=(0.0,) * 4, std=(10_000.0,) * 4))
    assert (own.mean, own.std) == ((0,) * 4, (10_000,) * 4)
    with pytest.raises(UserError, match=r"data.mean has 3 numbers for 4 bands: B04, B03, B02, B08"):
        resolve_normalisation(four, Data(mean=IMAGENET_MEAN))
    with pytest.raises(UserError, match=r"has no statistics of blue, green, red: give data.mean and data.std"):
        resolve_normalisation(pictures.choosing(("B02", "B03", "B04")), Data())
    seen = {"mean": (51.0, 102.0, 153.0), "std": (25.5, 51.0, 0.0), "quantiles": ((0.0,) * len(LEVELS),) * 3}
    prepared = replace(pictures, inputs=PICTURES.model_copy(update=seen))
    assert resolve_normalisation(prepared, Data()).mean == IMAGENET_MEAN
    turned = resolve_normalisation(prepared.choosing(("B02", "B03", "B04")), Data())
    assert (turned.mean, turned.std) == ((0.6, 0.4, 0.2), (1.0, 0.2, 0.1))


def test_pictures_keep_their_packed_files(grow: Grow, tmp_path: Path) -> None:
    tree = open_tree(grow("data", {f"{split}/{label}": 1 for split in SPLITS for label in "ab"}))
    assert pack(tree, "test", 64, tmp_path).name == f"{tree.digest[:16]}-test-64.npy"
    assert pack(tree.choosing(("red", "green", "blue")), "test", 64, tmp_path).name == f"{tree.digest[:16]}-test-64.npy"
    swapped = tree.choosing(("B02", "B03", "B04"))
    assert np.array_equal(
        open_packed(swapped, "test", 64, tmp_path).images, open_packed(tree, "test", 64, tmp_path).images[..., ::-1]
    )


def test_another_size_and_a_crop_are_made_of_each_band(tmp_path: Path) -> None:
    data = write_raster(tmp_path / "a.tif", noise(1, 5)).read_bytes()
    inputs = Inputs(name="", bands=tuple("abcde"), file=tuple("abcde"), dtype="uint16", unit="digital numbers")
    whole = np.moveaxis(noise(1, 5), 0, -1)
    assert np.array_equal(read_pixels(data, inputs, SIDE, 8, Crop(side=8)), whole[4:12, 4:12])
    larger = read_pixels(data, inputs, SIDE, 32)
    assert larger.shape == (32, 32, 5)
    assert np.abs(larger.mean((0, 1)) - whole.mean((0, 1))).max() < 20


# --- checkpoints and other sets


def test_another_set_is_brought_to_a_network_by_name(four: Tree) -> None:
    wants = four.inputs.choosing(("B08", "B04"), "", "")
    assert four.brought_to(wants).inputs.places == (3, 0)
    thirteen = EUROSAT_MS.model_copy(update={"bands": SENTINEL2})
    twelve = tuple(name for name in EUROSAT13 if name != "B10")
    less = EUROSAT_MS.model_copy(update={"bands": twelve, "file": twelve})
    assert less.choosing(twelve[::-1], "", "").bands == twelve[::-1]
    with pytest.raises(UserError, match="data has no band B10, which the network was trained with; it has B01, B02"):
        less.brought_to(thirteen, "data")
    assert EUROSAT_MS.brought_to(thirteen, "data").places == tuple(EUROSAT13.index(name) for name in SENTINEL2)


def test_units_are_never_taken_for_each_other(four: Tree) -> None:
    with pytest.raises(UserError, match=r"holds digital numbers .*trained on grey"):
        four.brought_to(EUROSAT)
    wants = EUROSAT_MS.choosing(FOUR, "", "")
    with pytest.raises(UserError, match=r"trained on reflectance x 10,000.*with --unit 'reflectance x 10,000'$"):
        four.brought_to(wants)
    with pytest.raises(UserError, match=r"holds grey .*trained on reflectance"):
        EUROSAT.brought_to(EUROSAT_MS.choosing(RGB, "", ""), "data")


def test_the_rule_is_the_recorded_one() -> None:
    digital = np.array([0, 1, 2750, 30_000, 1375], np.uint16)
    assert grey(digital, 0, 2750).tolist() == [1, 1, 255, 255, 128]


# --- batches


def test_batches_hold_the_files_numbers(four: Tree, tmp_path: Path, alone: World) -> None:
    place = Config(data=Data(image_size=32, cache_dir=tmp_path)).data
    images = open_images(alone, four, ["train"], place, place)["train"]
    batch = images.batch(torch.arange(2), 2, 2)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    stored = torch.from_numpy(np.asarray(open_packed(four, "train", 32, tmp_path).images))
    assert torch.equal(batch.images, stored[:2].float().permute(0, 3, 1, 2))
    assert images.sample(2).dtype == np.uint16


COLOURS = {"random_brightness": 0.2, "random_contrast": 0.2, "random_gain": 0.2}
ALL_OF_IT = Data(max_shift=2, random_rotate=20, random_zoom=0.2, jitter_crop=0.1, random_horizontal_flip=0.5)


def test_each_band_is_moved_as_eight_bit_pictures_are() -> None:
    images = torch.from_numpy(noise(1, 3, "uint8")).expand(4, 3, SIDE, SIDE)
    wide = torch.cat([images, images * 1.0, images], 1).float()
    indices, mean = torch.arange(4), (0.0,) * 9
    expected = augment.augment(images, indices, 0, 1, ALL_OF_IT).float()
    found = augment.augment(wide, indices, 0, 1, ALL_OF_IT.model_copy(update={"mean": mean}))
    for first in (0, 3, 6):
        assert torch.equal(found[:, first : first + 3], expected)


def test_bands_beyond_three_get_gains_of_their_own() -> None:
    images = torch.full((2, 64, 4, 4), 1000.0)
    lit = augment.augment(images, torch.arange(2), 0, 0, Data(augment=False, random_gain=0.3))[:, :, 0, 0]
    assert len(set(lit[0].tolist())) > 60
    assert len(set(lit[:, 0].tolist())) == 2
    assert lit.min() >= 700
    assert lit.max() <= 1300


def test_contrast_leaves_the_mean_of_each_band() -> None:
    images = torch.from_numpy(noise(1, 4)).float()[None]
    changed = augment.augment(images, torch.arange(1), 0, 0, Data(augment=False, random_contrast=0.5))
    assert not torch.equal(changed, images)
    assert (changed.mean((2, 3)) - images.mean((2, 3))).abs().max() < 1


def test_sixteen_bits_are_normalised_in_their_own_numbers() -> None:
    images = torch.from_numpy(noise(1, 4)).float()[None]
    mean, std = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)
    found = augment.plain_input(images, Data(image_size=32, mean=mean, std=std))
    assert found.shape == (1, 4, 32, 32)
    found = augment.normalise(images, Data(mean=mean, std=std))
    expected = (images.double() - torch.tensor(mean).view(1, 4, 1, 1)) / torch.tensor(std).view(1, 4, 1, 1)
    assert (found - expected).abs().max() < 1e-3


def test_pictures_for_people_are_in_true_colours(four: Tree) -> None:
    images = pixels_of(four, "test")
    seen = four.inputs.picture(images)
    assert (seen.dtype.name, seen.shape) == ("uint8", (*images.shape[:3], 3))
    order = [np.corrcoef(seen[..., n].ravel(), images[..., n].ravel())[0, 1] for n in range(3)]
    assert min(order) > 0.95
    assert PICTURES.picture(seen) is seen


def test_the_manifest_reads_back(four: Tree) -> None:
    content = json.loads((four.root / "manifest.json").read_text())
    assert Inputs.model_validate(content["inputs"]) == four.inputs
