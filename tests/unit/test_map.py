"""Maps in this process: where windows lie, what the network is shown, and what is made of its answers."""

from __future__ import annotations

import base64
import contextlib
import csv
import itertools
import json
import re
import resource
import threading
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from affine import Affine
from PIL import Image
from rasterio.crs import CRS
from rio_cogeo.cogeo import cog_validate

from hvd_eurosat import map as maps
from hvd_eurosat import predict
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.errors import STOPPED, RunError, UserError
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run.display import Display
from hvd_eurosat.scene import mapping, products, windows
from hvd_eurosat.scene.grid import Grid
from hvd_eurosat.scene.mapping import cut, masked_counts
from hvd_eurosat.scene.parts import FOLDER, NONE, Parts
from hvd_eurosat.scene.picture import _drawn as drawn
from hvd_eurosat.scene.picture import brightened, round_length, write_picture
from hvd_eurosat.scene.plan import window_side
from hvd_eurosat.scene.rasters import write_rasters
from hvd_eurosat.scene.result import LandCover, areas
from hvd_eurosat.scene.vectors import write_polygons
from hvd_eurosat.scene.windows import Windows, block_rows, blocks, check
from tests.unit.conftest import saved_checkpoint
from tests.unit.scenes import write_raster

UTM = CRS.from_epsg(32632)
NORTH_UP = Affine(10, 0, 600_000, 0, -10, 5_200_000)
CLASSES = ["Forest", "River", "Sea"]
SIDE = 32
NAME = 'Süd$t_{irol$, "neu".tif'
Map = Callable[..., int]

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


def scene_file(path: Path, pixels: np.ndarray, crs: CRS | None = UTM, transform: Affine = NORTH_UP) -> Path:
    """A GeoTIFF in red, green and blue of pixels uint8 [h, w, 3], in strips of 16 rows."""
    height, width = pixels.shape[:2]
    shape = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": "uint8", "blockysize": 16}
    with rasterio.open(path, "w", **shape, crs=crs, transform=transform, photometric="RGB") as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Plots of any colour, in which a random network sees several classes."""
    rng = np.random.default_rng(seed)
    plots = rng.integers(1, 256, (height // 16 + 1, width // 16 + 1, 3))
    texture = rng.integers(-20, 20, (height, width, 3))
    return np.clip(plots.repeat(16, 0).repeat(16, 1)[:height, :width] + texture, 1, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, narrow_resnet18: None) -> Path:
    """The checkpoint of a random network of three classes, all of which it finds in `noise`."""
    model = build("resnet18", len(CLASSES), "all", seed=0)
    with torch.no_grad():
        model.train()
        for seed in range(4):  # statistics of BatchNorm, without which all images look alike
            model(torch.from_numpy(noise(SIDE * 8, SIDE * 8, seed)).permute(2, 0, 1)[None].float() / 64 - 2)
        model.fc.weight *= 40
        model.eval()
    path = tmp_path_factory.mktemp("network") / "epoch-0003.pt"
    settings = Model(arch="resnet18", trainable="all")
    return saved_checkpoint(path, model, CLASSES, settings, Data(image_size=SIDE), image_side=SIDE)


@pytest.fixture
def map_of(monkeypatch: pytest.MonkeyPatch, network: Path) -> Map:
    """map_of(*words): the status of `map` with that network. It draws no picture, which takes longer than the rest."""
    monkeypatch.setattr(maps, "StopRequest", lambda: lambda: False)
    monkeypatch.setattr(World, "watch", lambda world, seconds: None)
    monkeypatch.setattr(products, "write_picture", lambda cover, areas, out: (out / "map.png").touch())
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)

    def mapped(*words: object, checkpoint: Path = network) -> int:
        return maps.main(world, verbs.map_scenes(["--checkpoint", str(checkpoint), *map(str, words)]))

    return mapped


def raster(path: Path) -> np.ndarray:
    """All bands, or the only one."""
    with rasterio.open(path) as file:
        values = file.read()
    return values[0] if len(values) == 1 else values


# --- where windows lie ---


@pytest.mark.parametrize(("height", "width", "side", "stride"), [(64, 64, 64, 64), (200, 137, 64, 64), (99, 65, 33, 8)])
def test_windows_cover_the_scene_and_none_reaches_beyond(height: int, width: int, side: int, stride: int) -> None:
    one = Windows(height, width, side, stride)
    for starts, length in ((one.tops, height), (one.lefts, width)):
        assert starts[0] == 0
        assert starts[-1] == length - side
        assert all(0 < b - a <= stride for a, b in pairwise(starts))
        assert all(starts[:-1] == np.arange(len(starts) - 1) * stride)


@pytest.mark.parametrize(
    "turn",
    [
        NORTH_UP,
        Affine(10, 0, 600_000, 0, -20, 5_200_000),
        Affine.translation(600_000, 5_200_000) @ Affine.rotation(30) @ Affine.scale(10, -7),
        Affine(0.0001, 0, 11.3, 0, -0.0001, 46.5),
    ],
    ids=["north-up", "not-square", "rotated", "degrees"],
)
@pytest.mark.parametrize(("side", "stride"), [(64, 64), (64, 16), (64, 33)])
def test_a_map_pixel_is_the_middle_of_its_window(turn: Affine, side: int, stride: int) -> None:
    one = Windows(500, 700, side, stride)
    for row, column in ((0, 0), (2, 5), (4, 1)):
        middle = turn @ (one.lefts[column] + side / 2, one.tops[row] + side / 2)
        assert one.transform(turn) @ (column + 0.5, row + 0.5) == pytest.approx(middle, abs=1e-9)
    corner = one.transform(turn) @ one.ends[::-1]
    margin = (side - stride) / 2
    assert corner == pytest.approx(turn @ (700 - margin, 500 - margin), abs=1e-9)


def test_what_cannot_be_windowed_is_refused() -> None:
    with pytest.raises(UserError, match=r"s.tif has 63 x 500 pixels, and the network's window 64 x 64"):
        check(Grid(UTM, NORTH_UP, 63, 500), 64, 64, "s.tif")
    with pytest.raises(UserError, match="--stride 65 leaves gaps between windows of 64 pixels: give 64 or less"):
        check(Grid(UTM, NORTH_UP, 500, 500), 64, 65, "s.tif")


def test_blocks_hold_every_window_once_and_every_pixel_row() -> None:
    one = Windows(1000, 300, 64, 16)
    found = blocks(one, 5)
    assert [row for block in found for row in range(block.first, block.end)] == list(range(one.shape[0]))
    for block, after in pairwise(found):
        assert block.next_top == after.top <= block.bottom
    assert (found[0].top, found[-1].bottom, found[-1].next_top) == (0, 1000, 1000)


def test_memory_bounds_a_block_and_what_does_not_fit_is_refused() -> None:
    tile = Windows(10_980, 10_980, 64, 16)
    usual = block_rows(tile, 3, 10, 512, 2.0, "tile.jp2")
    less = block_rows(tile, 3, 10, 512, 0.33, "tile.jp2")
    assert 1 <= less < usual
    for rows, memory in ((usual, 2.0), (less, 0.33)):
        block = blocks(tile, rows)[0]
        assert windows.COPIES * (block.bottom - block.top) * 10_980 * 4 < memory * 1e9
    with pytest.raises(UserError, match=r"--memory 0.1: tile.jp2 in 684 x 684 windows takes \d.* GB a process"):
        block_rows(tile, 3, 10, 512, 0.1, "tile.jp2")
    with pytest.raises(UserError, match=r"--memory 2: sparse.tif in 15,625 x 15,625 windows takes"):
        block_rows(Windows(10**6, 10**6, 64, 64), 3, 10, 256, 2.0, "sparse.tif")


@pytest.mark.parametrize(
    ("data", "file", "side"),
    [
        (Data(), 64, 64),
        (Data(image_size=224), 64, 64),  # enlarged
        (Data(image_size=32), None, 32),
        (Data(image_size=48, center_crop=48), 64, 48),
        (Data(image_size=48, center_crop=48, resize=96), 64, 32),
    ],
)
def test_a_window_is_what_a_training_image_showed(data: Data, file: int | None, side: int) -> None:
    assert window_side(data, file) == side


# --- what the network is shown ---


def test_overlapping_windows_are_cut_out_of_one_block() -> None:
    block = torch.from_numpy(noise(50, 70)).permute(2, 0, 1).contiguous()
    tops, lefts = np.array([0, 3, 18, 18]), np.array([0, 11, 1, 38])
    found = cut(block, tops, lefts, 32)
    assert all(
        torch.equal(found[n], block[:, y : y + 32, x : x + 32])
        for n, (y, x) in enumerate(zip(tops, lefts, strict=True))
    )


def test_masked_pixels_are_counted_in_each_window() -> None:
    masked = np.random.default_rng(0).random((60, 90)) < 0.3
    tops, lefts = np.array([0, 7, 28]), np.array([0, 13, 58])
    expected = [[masked[y : y + 32, x : x + 32].sum() for x in lefts] for y in tops]
    assert masked_counts(masked, tops, lefts, 32).tolist() == expected


def test_the_next_block_is_read_while_this_one_is_worked_with(
    tmp_path: Path, map_of: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [threading.Event() for _ in range(4)]
    read, classify = mapping.read_block, mapping.classify

    def spied_read(scene: Any, plan: Any, block: Any, tick: Any) -> Any:
        begun[block.index].set()
        return read(scene, plan, block, tick)

    def spied_classify(network: Any, plan: Any, one: Any, *of: Any) -> Any:
        following = one.block.index + 1
        assert following == len(plan.blocks) or begun[following].wait(60)
        return classify(network, plan, one, *of)

    monkeypatch.setattr(mapping, "read_block", spied_read)
    monkeypatch.setattr(mapping, "classify", spied_classify)
    scene = scene_file(tmp_path / "scene.tif", noise(4 * SIDE, 2 * SIDE))
    assert map_of("--scene", scene, "--out", tmp_path / "map") == 0
    assert all(one.is_set() for one in begun)


@pytest.mark.parametrize("stride", [SIDE, 8])
def test_every_window_is_what_predict_says_of_its_cut_out(
    tmp_path: Path, network: Path, map_of: Map, stride: int
) -> None:
    pixels = noise(150, 210)
    scene = scene_file(tmp_path / "scene.tif", pixels)
    assert map_of("--scene", scene, "--out", tmp_path / "map", "--stride", stride, "--probabilities") == 0
    one = Windows(150, 210, SIDE, stride)
    (tmp_path / "patches").mkdir()
    for row, y in enumerate(one.tops):
        for column, x in enumerate(one.lefts):
            patch = Image.fromarray(pixels[y : y + SIDE, x : x + SIDE])
            patch.save(tmp_path / "patches" / f"{row:03}-{column:03}.png")
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    words = ["--checkpoint", network, "--input", tmp_path / "patches", "--out", tmp_path / "predictions"]
    predict.main(world, verbs.predict([*map(str, words)]))
    said = list(csv.DictReader((tmp_path / "predictions" / "predictions.csv").read_text().splitlines()))
    classes, confidence = raster(tmp_path / "map" / "classes.tif"), raster(tmp_path / "map" / "confidence.tif")
    assert classes.shape == one.shape
    assert [CLASSES[n] for n in classes.ravel()] == [row["class"] for row in said]
    assert len(set(classes.ravel())) == len(CLASSES)
    assert np.abs(confidence.ravel() - [100 * float(row["probability"]) for row in said]).max() < 0.6
    percents = raster(tmp_path / "map" / "probabilities.tif")
    assert percents.shape == (len(CLASSES), *one.shape)
    assert np.array_equal(percents.max(0), confidence)


def test_a_block_goes_to_the_device_once_however_much_windows_overlap(
    tmp_path: Path, map_of: Map, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = mapping.send
    monkeypatch.setattr(mapping, "send", lambda pixels, device: (sent.append(pixels.nbytes), send(pixels, device))[1])
    pixels = noise(800, 160)
    for stride, most in ((SIDE, 1.0), (SIDE // 4, 2.0)):
        sent.clear()
        map_of("--scene", scene_file(tmp_path / "s.tif", pixels), "--out", tmp_path / str(stride), "--stride", stride)
        assert pixels.nbytes <= sum(sent) <= most * pixels.nbytes
        assert len(sent) > 1


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Torch's setting, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_makes_the_same_bytes(
    tmp_path: Path, map_of: Map, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does all, three that share every batch, two and eight that have one each, sixteen in eight pairs."""
    judge, shown = mapping.judge, []
    scene, found = scene_file(tmp_path / "scene.tif", noise(100, 160)), []
    for cores, at_once, share in ((1, 1, 1), (2, 2, 1), (3, 1, 3), (8, 8, 1), (16, 8, 2)):
        together, batches = threading.Barrier(at_once), []

        def spied(network: Any, images: Any) -> Any:
            together.wait(60)  # noqa: B023
            batches.append((len(images), torch.get_num_threads()))  # noqa: B023
            return judge(network, images)

        monkeypatch.setattr(mapping, "judge", spied)
        threads(cores)
        out = tmp_path / str(cores)
        assert map_of("--scene", scene, "--out", out, "--stride", 16, "--probabilities") == 0
        assert {threads for _, threads in batches} == {share}
        shown.append(sorted(count for count, _ in batches))
        found.append([(out / name).read_bytes() for name in ("classes.tif", "probabilities.tif", "areas.csv")])
    assert all(one == shown[0] for one in shown)
    assert all(one == found[0] for one in found)


def test_batches_of_larger_images_are_smaller_on_cores() -> None:
    """So that they take as much memory; no window is left out."""
    sizes = {side: [len(batch) for batch in mapping.split(1000, 128, side, torch.device("cpu"))] for side in (64, 224)}
    assert {side: (sum(each), max(each)) for side, each in sizes.items()} == {64: (1000, 125), 224: (1000, 10)}
    assert [len(batch) for batch in mapping.split(1000, 500, 224, torch.device("cuda"))] == [500, 500]
    assert [len(batch) for batch in mapping.split(3, 128, 64, torch.device("cpu"))] == [1, 1, 1]
    assert mapping.split(0, 128, 64, torch.device("cpu")) == []


def test_a_thread_that_fails_ends_the_map_and_the_others(
    tmp_path: Path, map_of: Map, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    scene, judge, running = scene_file(tmp_path / "scene.tif", noise(100, 160)), mapping.judge, threading.active_count()
    numbers = itertools.count(1)

    def failing(network: Any, images: Any) -> Any:
        if next(numbers) == 3:
            raise RuntimeError("no memory")
        return judge(network, images)

    monkeypatch.setattr(mapping, "judge", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        map_of("--scene", scene, "--out", tmp_path / "map", "--stride", 16)
    assert threading.active_count() == running


def test_asked_to_stop_between_the_batches_of_two_threads(
    tmp_path: Path, map_of: Map, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    words = ("--scene", scene_file(tmp_path / "scene.tif", noise(100, 160)), "--out", tmp_path / "map", "--stride", 16)
    judge, judged = mapping.judge, threading.Event()

    def told(network: Any, images: Any) -> Any:
        judged.set()
        return judge(network, images)

    with monkeypatch.context() as patch:
        patch.setattr(mapping, "judge", told)
        patch.setattr(maps, "StopRequest", lambda: judged.is_set)
        assert map_of(*words) == STOPPED
    assert not list((tmp_path / "map" / FOLDER).glob("*.part"))
    assert map_of(*words) == 0
    assert (tmp_path / "map" / "map.json").exists()


def test_windows_with_too_much_masked_have_no_class(tmp_path: Path, map_of: Map) -> None:
    pixels = noise(128, 160)
    pixels[:SIDE, :SIDE] = 0  # all of the first
    pixels[: SIDE // 4, SIDE : 2 * SIDE] = 0  # a quarter of the second
    pixels[: SIDE // 4 + 1, 2 * SIDE : 3 * SIDE] = 0  # a little more of the third
    scene = scene_file(tmp_path / "scene.tif", pixels)
    assert map_of("--scene", scene, "--out", tmp_path / "map") == 0
    classes = raster(tmp_path / "map" / "classes.tif")
    assert np.argwhere(classes == NONE).tolist() == [[0, 0], [0, 2]]
    assert (raster(tmp_path / "map" / "confidence.tif") == NONE).tolist() == (classes == NONE).tolist()
    assert map_of("--scene", scene, "--out", tmp_path / "all", "--max-masked", 0.99) == 0
    assert (raster(tmp_path / "all" / "classes.tif") == NONE).sum() == 1


# --- what is made of its answers ---


@pytest.fixture(scope="module")
def cover() -> LandCover:
    """A map of random classes, some of its windows moved in, one without class."""
    return cover_of(UTM, NORTH_UP)


def cover_of(crs: CRS | None, turn: Affine) -> LandCover:
    grid, one = Grid(crs, turn, 700, 500), Windows(500, 700, 64, 64)
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, one.shape).astype(np.uint8)
    classes[3, 4] = NONE
    percents = rng.integers(0, 101, (3, *one.shape)).astype(np.uint8)
    preview = np.full((250, 350, 4), 255, np.uint8)
    return LandCover("scene: land cover", ("<Forest>", "River", "Sea"), grid, one, classes, percents, preview, 2, {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Path:
    """A map of `map`, with all that it writes."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "StopRequest", lambda: lambda: False)
        patch.setattr(World, "watch", lambda world, seconds: None)
        world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
        scene = scene_file(folder / NAME, noise(200, 300))
        words = ["--checkpoint", network, "--scene", scene, "--out", folder / "map", "--probabilities"]
        assert maps.main(world, verbs.map_scenes([*map(str, words)])) == 0
    return folder / "map"


def test_a_map_has_all_its_files_and_no_others(finished: Path) -> None:
    expected = {"classes.tif", "classes.tif.aux.xml", "confidence.tif", "probabilities.tif", "areas.csv"}
    expected |= {"map.png", "map.geojson", "map.html", "map.json"}
    assert {path.name for path in finished.iterdir()} == expected
    with Image.open(finished / "map.png") as picture:
        assert picture.size[0] > 1000


def test_rasters_are_what_a_gis_expects(finished: Path, network: Path, tmp_path: Path) -> None:
    with rasterio.open(finished / "classes.tif") as file:
        assert (file.crs, file.nodata, file.dtypes) == (UTM, NONE, ("uint8",))
        assert file.transform == NORTH_UP @ Affine.scale(SIDE)
        assert file.colorinterp == (rasterio.enums.ColorInterp.palette,)
        colours = file.colormap(1)
        assert len({colours[n] for n in range(len(CLASSES))}) == len(CLASSES)
        assert colours[NONE][3] == 0
        tags = file.tags()
        assert json.loads(tags["CLASSES"]) == CLASSES
        record = json.loads(network.with_suffix(".json").read_text())
        assert tags["CHECKPOINT_SHA256"] == record["content"]["sha256"]
        rasterio.shutil.copy(file, tmp_path / "seen.vrt", driver="VRT")  # as GDAL sees it
    assert re.findall(r"<Category>(.*)</Category>", (tmp_path / "seen.vrt").read_text()) == CLASSES
    with rasterio.open(finished / "probabilities.tif") as file:
        assert list(file.descriptions) == CLASSES


def check_cogs(folder: Path) -> None:
    """By another's validator, which warns of nothing either."""
    for name in ("classes.tif", "confidence.tif", "probabilities.tif"):
        assert cog_validate(folder / name, strict=True, quiet=True) == (True, [], [])


def test_small_rasters_are_valid_cogs(finished: Path) -> None:
    check_cogs(finished)
    with rasterio.open(finished / "classes.tif") as file:
        assert file.overviews(1) == []


@pytest.mark.parametrize(("crs", "turn"), [(UTM, NORTH_UP), (None, Affine.identity())], ids=["UTM", "no CRS"])
def test_large_rasters_are_valid_cogs_with_overviews_by_mode(tmp_path: Path, crs: CRS | None, turn: Affine) -> None:
    """Three of four are of class 2, and the fourth of class 0: by average they would be of 1."""
    classes = np.tile(np.array([[2, 2], [2, 0]], np.uint8), (300, 300))
    grid, one = Grid(crs, turn, 600, 600), Windows(600, 600, 1, 1)
    percents = np.full((3, 600, 600), 50, np.uint8)
    preview = np.full((600, 600, 4), 255, np.uint8)
    (tmp_path / FOLDER).mkdir()
    whole = LandCover("", tuple(CLASSES), grid, one, classes, percents, preview, 1, {})
    write_rasters(whole, tmp_path, tmp_path / FOLDER, probabilities=True)
    check_cogs(tmp_path)
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert file.overviews(1) == [2]
    with rasterio.open(tmp_path / "classes.tif", overview_level=0) as file:
        assert set(file.read(1).ravel()) == {2}


def test_areas_add_up_to_the_scene(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "areas.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == [*CLASSES, "no class"]
    assert sum(float(row["hectares"]) for row in rows) == pytest.approx(200 * 300 / 100)  # of 10 x 10 m
    assert sum(int(row["windows"]) for row in rows) == raster(finished / "classes.tif").size
    assert sum(float(row["share"]) for row in rows[:-1]) == pytest.approx(1, abs=1e-5)
    assert all(0.3 < float(row["mean_confidence"]) <= 1 for row in rows[:-1] if int(row["windows"]))


def test_areas_in_degrees_are_those_on_the_ellipsoid() -> None:
    """Of a square degree: 12,308.8 km2 at the equator, and cos(60) less 0.17 % at 60 degrees north (Snyder 1987)."""
    step = 1 / 700
    for north, expected in ((0.5 * 500 / 700, 12_308.8 * 500 / 700), (60 + 250 / 700, 6_216.0 * 500 / 700)):
        found = areas(cover_of(CRS.from_epsg(4326), Affine(step, 0, 11, 0, -step, north)))
        assert sum(area.hectares or 0 for area in found) / 100 == pytest.approx(expected, rel=1e-3)
    assert all(area.hectares is None for area in areas(cover_of(None, Affine.identity())))


def polygons(cover: LandCover, folder: Path, min_area: float) -> list[dict[str, Any]]:
    write_polygons(cover, folder, min_area)
    return list(json.loads((folder / "map.geojson").read_text())["features"])


def test_polygons_have_the_places_and_areas_of_the_classes(tmp_path: Path, cover: LandCover) -> None:
    features = polygons(cover, tmp_path, 0)
    for area in areas(cover)[:-1]:
        mine = [feature["properties"] for feature in features if feature["properties"]["class"] == area.name]
        assert sum(one["windows"] for one in mine) == area.windows
        assert sum(one["hectares"] for one in mine) == pytest.approx(area.hectares)
    points = np.array([point for feature in features for point in feature["geometry"]["coordinates"][0]])
    corners = [600_000, 607_000, 607_000, 600_000], [5_200_000, 5_200_000, 5_195_000, 5_195_000]
    xs, ys = rasterio.warp.transform("EPSG:32632", "EPSG:4326", *corners)
    assert points.min(0) == pytest.approx([min(xs), min(ys)], abs=1e-6)
    assert points.max(0) == pytest.approx([max(xs), max(ys)], abs=1e-6)
    for feature in features:  # RFC 7946: the outer ring against the clock
        x, y = np.array(feature["geometry"]["coordinates"][0]).T
        assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
        assert feature["geometry"]["coordinates"][0][0] == feature["geometry"]["coordinates"][0][-1]


def test_areas_where_the_plane_is_far_from_true_are_those_on_the_ground() -> None:
    """Web Mercator's pixels are larger than the ground by the square of 1 / cos(latitude), but for the flattening."""
    found = areas(cover_of(CRS.from_epsg(3857), Affine(10, 0, 1_260_000, 0, -10, 5_860_000)))
    expected = 500 * 700 * 100 * np.cos(np.radians(46.5)) ** 2
    assert sum(area.hectares or 0 for area in found) * 10_000 == pytest.approx(expected, rel=5e-3)


def test_the_picture_shows_scene_classes_and_legend(tmp_path: Path) -> None:
    """From left to right; the upper rows are forest, the others river, and of the sea, which is not there, no word."""
    grid, one = Grid(UTM, NORTH_UP, 700, 500), Windows(500, 700, 100, 100)
    classes = np.repeat(np.array([0, 0, 1, 1, 1], np.uint8), 7).reshape(5, 7)
    percents, preview = np.full((3, 5, 7), 50, np.uint8), np.full((250, 350, 4), 255, np.uint8)
    preview[..., :3] = 60, 120, 180
    cover = LandCover("the title", tuple(CLASSES), grid, one, classes, percents, preview, 2, {})
    write_picture(cover, areas(cover), tmp_path)
    image = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))

    def box(colour: Any, left: int, right: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what has the colour, from one column to another."""
        ys, xs = np.nonzero((image[:, left:right] == colour).all(-1))
        return left + xs.min(), ys.min(), left + xs.max(), ys.max()

    end = image.shape[1]
    left, top, right, bottom = box(brightened(preview)[0, 0, :3], 0, end)
    width, height = right - left, bottom - top
    assert width / height == pytest.approx(700 / 500, rel=0.02)
    forest, river, sea = (tuple(bytes.fromhex(colour[1:])) for colour in cover.colours)
    start = box(forest, right, end)[0]
    legend = start + width + 6
    assert box(forest, start, legend) == pytest.approx((start, top, start + width, top + 0.4 * height), abs=4)
    assert box(river, start, legend) == pytest.approx((start, top + 0.4 * height, start + width, bottom), abs=4)
    assert box(forest, legend, end)[3] < box(river, legend, end)[1]
    assert not (image == sea).all(-1).any()
    figure = drawn(cover, [area for area in areas(cover) if area.windows])
    scene, land_cover = figure.axes
    words = land_cover.get_legend()
    assert words
    assert figure.get_suptitle() == "the title"
    assert [text.get_text() for text in scene.texts] == ["1 km"]
    assert [text.get_text() for text in words.get_texts()] == ["Forest  40.0%", "River  60.0%"]


@pytest.mark.parametrize(("most", "length"), [(3e-5, 2e-5), (0.99, 0.5), (1000, 1000), (7.1e6, 5e6)])
def test_a_scale_bar_has_a_round_length(most: float, length: float) -> None:
    assert round_length(most) == pytest.approx(length)


def test_small_polygons_go_to_their_neighbours(tmp_path: Path, cover: LandCover) -> None:
    window, before = 0.64**2 * 100, len(polygons(cover, tmp_path, 0))  # hectares
    for least in (3, 20, 10**6):  # more than any has, and than all have
        features = polygons(cover, tmp_path, least * window)
        assert len(features) < before
        assert min(feature["properties"]["windows"] for feature in features) >= min(least, cover.classes.size // 2)
        assert sum(feature["properties"]["windows"] for feature in features) == cover.classes.size - 1


def test_the_page_needs_nothing_from_outside_and_holds_the_map(finished: Path) -> None:
    page = (finished / "map.html").read_text()
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    data = json.loads(found[1])
    values = np.frombuffer(zlib.decompress(base64.b64decode(data["values"])), np.uint8)
    values = values.reshape(1 + len(CLASSES), data["rows"], data["columns"])
    assert np.array_equal(values[0], raster(finished / "classes.tif"))
    assert np.array_equal(values[1:], raster(finished / "probabilities.tif"))


def test_names_of_classes_are_no_markup(tmp_path: Path, cover: LandCover) -> None:
    from hvd_eurosat.scene.page import write_page

    write_page(cover, areas(cover), tmp_path)
    assert "<Forest>" not in (tmp_path / "map.html").read_text()


def test_a_map_says_how_it_came_about(finished: Path, network: Path) -> None:
    said = json.loads((finished / "map.json").read_text())
    assert said["settings"]["checkpoint"] == str(network)
    assert said["map"]["transform"] == list((NORTH_UP @ Affine.scale(SIDE))[:6])
    assert {"hvd_eurosat", "torch", "rasterio", "gdal"} <= said["versions"].keys()
    assert said["run"]["seconds"] > 0
    of_the_job = {"out": str(finished), "memory": 2.0, "watchdog_seconds": 600.0}
    assert {key: said["run"][key] for key in of_the_job} == of_the_job
    assert not of_the_job.keys() & said["settings"].keys()


def test_no_crs_is_a_map_in_pixels(tmp_path: Path, map_of: Map) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(100, 100), None, Affine.identity())
    assert map_of("--scene", scene, "--out", tmp_path / "map") == 0
    with rasterio.open(tmp_path / "map" / "classes.tif") as file:
        assert (file.crs, file.transform) == (None, Affine.scale(SIDE))
    rows = list(csv.DictReader((tmp_path / "map" / "areas.csv").read_text().splitlines()))
    assert not any(row["hectares"] for row in rows)
    assert not (tmp_path / "map" / "map.geojson").exists()


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([(10, 10.0), (90, 90.0)], None),  # windows and seconds: a rank that has fewer is done sooner
        ([(50, 10.0), (50, 20.0)], "rank 1 (b) was 100% slower"),
        ([(90, 20.0), (10, 1.0)], "rank 0 (a) was 122% slower"),
        ([(100, 90.0), (0, 0.0)], None),
        ([(50, 0.1), (50, 0.9)], None),  # noise
    ],
)
def test_ranks_that_are_slow_are_named(
    ranks: list[tuple[int, float]],
    named: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"), threads=1)
    monkeypatch.setattr(World, "gather", lambda self, mine: [("a", *ranks[0]), ("b", *ranks[1])])
    assert maps.stragglers_named(world, ranks[0], Display(speaks=True)) == 100
    assert capsys.readouterr().err == (f"warning: {named} than the other ranks\n" if named else "")


# --- folders, again and again ---


def test_a_finished_map_is_not_made_again_and_another_not_over_it(
    tmp_path: Path, map_of: Map, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(100, 100))
    words = ("--scene", scene, "--out", tmp_path / "map")
    assert map_of(*words) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "map").iterdir()}
    assert map_of(*words) == 0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SharedError, match="holds a map with another stride, 32 and not 16: give a new folder"):
        map_of(*words, "--stride", 16)
    scene_file(scene, noise(100, 100, seed=1))
    with pytest.raises(SharedError, match=r"holds a map with another .*of the scene"):
        map_of(*words)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "map").iterdir()} == before


def test_a_map_may_lie_in_its_scenes_folder(tmp_path: Path, map_of: Map, capsys: pytest.CaptureFixture[str]) -> None:
    for n, band in enumerate(("B04", "B03", "B02")):
        write_raster(tmp_path / "scene" / f"{band}.tif", noise(64, 64, n)[..., 0])
    for said in ("windows in", "is finished"):
        assert map_of("--scene", tmp_path / "scene", "--out", tmp_path / "scene" / "map") == 0
        assert said in capsys.readouterr().out


def test_a_scene_that_is_named_twice_is_refused(tmp_path: Path, map_of: Map) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(64, 64))
    with pytest.raises(SharedError, match=r"--scene names .*scene.tif twice"):
        map_of("--scene", scene, scene, "--out", tmp_path / "maps")


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, map_of: Map) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(100, 100))
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(SharedError, match=r"holds what is no map of ours \(thesis.tex\): give a new folder"):
        map_of("--scene", scene, "--out", tmp_path / "papers")
    with pytest.raises(SharedError, match=r"--out .*scene.tif: File exists"):
        map_of("--scene", scene, "--out", scene)
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["thesis.tex"]


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, map_of: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(400, 100))
    words = ("--scene", scene, "--stride", 8)
    assert map_of(*words, "--out", tmp_path / "whole") == 0
    write, left = Parts.write, [3]

    def full(parts: Parts, *of: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RunError("cannot write: No space left on device")
        write(parts, *of)

    monkeypatch.setattr(Parts, "write", full)
    with pytest.raises(RunError, match="No space left"):
        map_of(*words, "--out", tmp_path / "map")
    assert len(list((tmp_path / "map" / FOLDER).glob("*.part"))) == 3
    left[0] = 1000
    read: list[int] = []
    read_block = mapping.read_block
    monkeypatch.setattr(mapping, "read_block", lambda *of: (read.append(of[2].index), read_block(*of))[1])
    assert map_of(*words, "--out", tmp_path / "map") == 0
    assert 0 not in read
    assert len(read) == len(set(read))
    for name in ("classes.tif", "confidence.tif", "areas.csv", "map.geojson", "map.html"):
        assert (tmp_path / "map" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("room", [100_000, 330_000, 365_000, 375_000, 500_000])
def test_a_raster_is_whole_or_not_there_where_the_disk_fills(tmp_path: Path, room: int) -> None:
    """Of a COG that is cut short GDAL says nothing."""
    rng, one = np.random.default_rng(0), Windows(600, 600, 1, 1)
    classes, percents = (rng.integers(0, 100, shape).astype(np.uint8) for shape in ((600, 600), (100, 600, 600)))
    names = tuple(map(str, range(100)))
    cover = LandCover("", names, Grid(UTM, NORTH_UP, 600, 600), one, classes, percents, np.empty(0, np.uint8), 1, {})
    (tmp_path / FOLDER).mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with contextlib.suppress(RunError):
            write_rasters(cover, tmp_path, tmp_path / FOLDER, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name, values in (("classes.tif", classes), ("confidence.tif", cover.confidence)):
        if (tmp_path / name).exists():
            assert np.array_equal(raster(tmp_path / name), values)


def test_a_damaged_part_is_made_again(tmp_path: Path, map_of: Map, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_file(tmp_path / "scene.tif", noise(400, 100))
    words = ("--scene", scene, "--out", tmp_path / "map")
    with monkeypatch.context() as patch:
        patch.setattr(maps, "write_products", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        with pytest.raises(RunError, match="killed"):
            map_of(*words)
    part = sorted((tmp_path / "map" / FOLDER).glob("*.part"))[1]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunError, match=r"was damaged and is removed: start again"):
        map_of(*words)
    assert map_of(*words) == 0


def test_a_bad_scene_among_others_is_told_and_the_others_are_mapped(
    tmp_path: Path, map_of: Map, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [scene_file(tmp_path / f"{name}.tif", noise(100, 100)) for name in ("a", "c")]
    (tmp_path / "b.tif").write_bytes(b"no TIFF")
    assert map_of("--scene", good[0], tmp_path / "b.tif", good[1], "--out", tmp_path / "maps") == 1
    assert (tmp_path / "maps" / "a" / "map.json").exists()
    assert (tmp_path / "maps" / "c" / "map.json").exists()
    assert not (tmp_path / "maps" / "b").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "b.tif" in errors[0]
    assert "1 of 3 scenes" in errors[1]


def test_the_preview_does_not_depend_on_the_blocks() -> None:
    pixels, one = noise(960, 320).transpose(2, 0, 1), Windows(960, 320, 64, 32)
    masked = np.zeros((960, 320), np.bool_)
    masked[:120] = True
    whole = mapping.preview(pixels, masked, blocks(one, 100)[0], 8)
    assert whole.shape == (120, 40, 4)
    assert (whole[:15, :, 3] == 0).all()
    assert (whole[15:, :, 3] == 255).all()
    means = pixels.reshape(3, 120, 8, 40, 8).mean((2, 4)).transpose(1, 2, 0)
    assert np.abs(whole[..., :3] - means).max() <= 0.5
    parts = [
        mapping.preview(pixels[:, block.top : block.bottom], masked[block.top : block.bottom], block, 8)
        for block in blocks(one, 3)
    ]
    assert np.array_equal(np.concatenate(parts), whole)
