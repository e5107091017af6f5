"""`prepare` with a split that it is told: lists of names, published lists, blocks of ground; and what says so later."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from hvd_eurosat import evaluate, prepare, train
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.data import splits
from hvd_eurosat.data.layout import SPLITS, Item
from hvd_eurosat.data.places import places_of, share_out
from hvd_eurosat.data.sources import open_source
from hvd_eurosat.data.tree import open_tree, split_of
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.trained_on import note_images
from tests.unit.conftest import EUROSAT, Grow, Run, left, manifest, needs_eurosat, saved_checkpoint

COUNTS = {"Forest": 4, "River": 4}
NAMES = {
    "train": ["Forest_1", "Forest_2", "River_1", "River_2"],
    "valid": ["Forest_3", "River_3"],
    "test": ["Forest_4", "River_4"],
}
MULTISPECTRAL = EUROSAT.with_name("EuroSAT_MS_100.zip")
LISTS = EUROSAT.with_name("splits")


def write_lists(folder: Path, **changed: list[str]) -> list[Path]:
    """NAMES as three files, some with other names."""
    for split, names in (NAMES | changed).items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return [folder / f"{split}.txt" for split in SPLITS]


def names_of(out: Path, split: str) -> list[str]:
    return [Path(name).stem for name in open_tree(out).files(split)]


# --- lists


@pytest.mark.parametrize(
    "form",
    [
        "{0}.jpg",
        "{0}",
        "{0}.tif",
        "{1}/{0}.jpg",
        "ds/images/tif/{1}/{0}.tif",
        r"photos\{1}\{0}.jpg",
        "./{1}/{0}",
    ],
)
def test_lists_make_the_split(tmp_path: Path, grow: Grow, run: Run, form: str) -> None:
    """As torchgeo publishes them, and with folders and suffixes of any other edition of the set."""
    said = {split: [form.format(name, name.split("_")[0]) for name in names] for split, names in NAMES.items()}
    status, stdout, stderr = run(grow("photos", COUNTS), "--split-lists", *write_lists(tmp_path, **said))
    assert (status, stderr) == (0, "")
    assert stdout.splitlines()[-1] == "8 images: 4 train / 2 valid / 2 test"
    assert {split: names_of(tmp_path / "out", split) for split in SPLITS} == NAMES


def test_a_list_may_come_from_windows(tmp_path: Path, grow: Grow, run: Run) -> None:
    lists = write_lists(tmp_path)
    lists[0].write_bytes(b"\xef\xbb\xbf" + lists[0].read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert run(grow("photos", COUNTS), "--split-lists", *lists)[0] == 0


def test_the_manifest_says_which_lists(tmp_path: Path, grow: Grow, run: Run) -> None:
    lists = write_lists(tmp_path)
    assert run(grow("photos", COUNTS), "--split-lists", *lists)[0] == 0
    digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in lists}
    found = manifest(tmp_path / "out")
    assert (found["seed"], found["ratios"], found["split"]["kind"]) == (None, None, "lists")
    assert found["split"]["lists"] == digests
    words = "by lists of names, sha256 " + ", ".join(f"{split} {digests[split][:8]}" for split in SPLITS)
    assert split_of(open_tree(tmp_path / "out")).startswith(f"{words} (digest ")


BAD_LISTS = [
    ({"test": ["Forest_4", "River_4", "River_9", "Sea_1"]}, r"test.txt names 2 images \S+ \S+ has not: River_9, Sea_1"),
    ({"test": ["Forest_4", "Sea/River_4"]}, r"test.txt names 1 images that \S+ has not: Sea/River_4"),
    (
        {"test": ["Forest_4", "River_4", "River_1"]},
        r"the lists name 1 images of \S+ more than once: River/River_1.jpg \(in \S+/train.txt and \S+/test.txt\)",
    ),
    (
        {"train": [*NAMES["train"], "Forest_1.jpg"]},
        r"the lists name 1 images of \S+ more than once: Forest/Forest_1.jpg \(in \S+/train.txt and \S+/train.txt\)",
    ),
    ({"test": ["Forest_4"]}, r"1 of 8 images of \S+ are in no list: River/River_4.jpg"),
    ({"valid": []}, r"valid.txt is no list of names"),
    (
        {"train": ["Forest_1", "Forest_2", "Forest_3", "River_1", "River_2"], "valid": ["River_3"]},
        r"class Forest has no images in valid/",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), BAD_LISTS)
def test_bad_lists_are_one_line(tmp_path: Path, grow: Grow, run: Run, changed: dict[str, list[str]], said: str) -> None:
    status, stdout, stderr = run(grow("photos", COUNTS), "--split-lists", *write_lists(tmp_path, **changed))
    assert (status, stdout, stderr.count("\n"), left(tmp_path)) == (2, "", 1, [])
    assert re.search(said, stderr), stderr


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"", None])
def test_what_is_no_list(tmp_path: Path, grow: Grow, run: Run, content: bytes | None) -> None:
    lists = write_lists(tmp_path)
    lists[1].unlink()
    if content is not None:
        lists[1].write_bytes(content)
    status, _, stderr = run(grow("photos", COUNTS), "--split-lists", *lists)
    assert (status, stderr.count("\n"), str(lists[1]) in stderr) == (2, 1, True)


def test_one_name_in_two_classes_wants_its_folder(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", COUNTS)
    for label in COUNTS:
        for path in sorted((source / label).iterdir()):
            path.rename(path.with_name(path.name.removeprefix(f"{label}_")))
    numbers = {split: [name.partition("_")[2] for name in names] for split, names in NAMES.items()}
    status, _, stderr = run(source, "--split-lists", *write_lists(tmp_path, **numbers))
    assert (status, stderr.count("\n")) == (2, 1)
    assert "train.txt: 1 may be Forest/1.jpg, River/1.jpg: name its folder too" in stderr
    folders = {split: [name.replace("_", "/") for name in names] for split, names in NAMES.items()}
    assert run(source, "--split-lists", *write_lists(tmp_path, **folders))[0] == 0


def test_lists_win_over_copies(tmp_path: Path, grow: Grow, run: Run) -> None:
    """A published split stays what it is; a warning counts the images that are in two of its lists."""
    source = grow("photos", COUNTS)
    shutil.copy(source / "Forest" / "Forest_1.jpg", source / "Forest" / "Forest_4.jpg")
    status, _, stderr = run(source, "--split-lists", *write_lists(tmp_path))
    warning = f"warning: 1 images of {source} are in several splits, as the lists say: 1 in train and test\n"
    assert (status, stderr) == (0, warning)
    assert {split: names_of(tmp_path / "out", split) for split in SPLITS} == NAMES


def test_a_split_tree_is_split_anew(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", COUNTS)
    assert run(source, out="out-before")[0] == 0
    status, _, stderr = run(tmp_path / "out-before", "--split-lists", *write_lists(tmp_path))
    assert (status, stderr.splitlines()[-1]) == (
        0,
        f"note: {tmp_path / 'out-before'} is split already and gets another split",
    )
    assert {split: names_of(tmp_path / "out", split) for split in SPLITS} == NAMES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "spatial", "--seed", "1"], "--seed makes no difference with --split"),
        (["--split-lists", "a", "b", "c", "--ratios", "8,1,1"], "--ratios makes no difference with --split-lists"),
        (["--split", "spatial", "--split-by-place", "1"], "not allowed with argument --split"),
        (["--split", "other"], "invalid choice: 'other'"),
        (["--split-by-place", "0"], "'0' is not a number of degrees"),
        (["--split-by-place", "nan"], "'nan' is not a number of degrees"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        prepare.main(["--source", "x.zip", "--out", "x", *words])
    assert (end.value.code, said in capsys.readouterr().err) == (2, True)


# --- published lists


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served in the place of torchgeo's."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(splits, "TORCHGEO", f"http://127.0.0.1:{server.server_port}/")
        yield folder
        server.shutdown()


def test_published_lists_are_fetched_and_checked(
    tmp_path: Path, grow: Grow, run: Run, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = write_lists(served)
    known = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in lists}
    monkeypatch.setitem(splits.PUBLISHED, "spatial", known)
    source = grow("photos", COUNTS)
    assert run(source, "--split", "spatial")[::2] == (0, "")
    assert {split: names_of(tmp_path / "out", split) for split in SPLITS} == NAMES
    assert split_of(open_tree(tmp_path / "out")).startswith("by torchgeo's spatial lists (digest ")
    assert run(source, "--split-lists", *lists, out="out-given")[0] == 0  # known by their content
    assert manifest(tmp_path / "out-given")["split"] == manifest(tmp_path / "out")["split"]
    lists[2].write_text("Forest_4\nRiver_3\n")
    status, stdout, stderr = run(source, "--split", "spatial", out="out-changed")
    assert (status, stdout, stderr.count("\n"), (tmp_path / "out-changed").exists()) == (1, "", 1, False)
    assert re.search(r"test.txt came with the sha256 \w{8}…, not torchgeo's \w{8}…: get train.txt, valid.txt", stderr)


@pytest.mark.parametrize("name", ["spatial", "random"])
def test_without_network_it_says_where_to_get_the_lists(
    tmp_path: Path, grow: Grow, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    status, stdout, stderr = run(grow("photos", COUNTS), "--split", name)
    assert (status, stdout, stderr.count("\n"), left(tmp_path)) == (1, "", 1, [])
    first = next(iter(splits.PUBLISHED[name]))
    assert stderr.startswith(f"error: cannot download {first} (")
    assert stderr.endswith("and give them with --split-lists\n")


@needs_eurosat
def test_the_spatial_lists_are_those_published() -> None:
    """Which name the images of the set, each once: 16,200, 5,400 and 5,400."""
    files = splits.PUBLISHED["spatial"]
    lists = splits.lists_for(splits.Wish(split_lists=tuple(LISTS / file for file in files)))
    assert [one.sha256 for one in lists] == list(files.values())
    with zipfile.ZipFile(EUROSAT) as archive:
        names = [Path(name).name for name in archive.namelist() if name.endswith(".jpg")]
    assert [len(one.names) for one in lists] == [16200, 5400, 5400]
    assert sorted(name for one in lists for name in one.names) == sorted(names)


# --- by place


def geotiff(path: Path, east: float, north: float, number: int, crs: str = "EPSG:4326") -> None:
    """A 64x64 GeoTIFF of noise around a place."""
    pixels = np.random.default_rng(number).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    place = {"crs": crs, "transform": from_origin(east - 0.0032, north + 0.0032, 0.0001, 0.0001)}
    shape = {"driver": "GTiff", "count": 3, "height": 64, "width": 64, "dtype": "uint8", "photometric": "RGB"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **shape, **place) as raster:
        raster.write(pixels)


@pytest.fixture
def country(tmp_path: Path) -> Path:
    """Two images of each class in each of 10 x 2 blocks of half a degree."""
    for number in range(80):
        block, label = number // 4, ("Forest", "River")[number % 2]
        east, north = 10 + block % 10 * 0.5 + 0.1 + number % 4 / 10, 45.2 + block // 10 * 0.5
        geotiff(tmp_path / "country" / label / f"{label}_{number}.tif", east, north, number)
    return tmp_path / "country"


def block_of(name: str) -> int:
    """The block of the country that an image is in."""
    return int(Path(name).stem.partition("_")[2]) // 4


def test_blocks_of_ground_go_whole_to_one_split(tmp_path: Path, country: Path, run: Run) -> None:
    wish = ("--split-by-place", "0.5", "--ratios", "80,10,10")
    status, stdout, stderr = run(country, *wish)
    assert (status, stdout.splitlines()[-1]) == (0, "80 images: 64 train / 8 valid / 8 test")
    said = "note: blocks of 0.5 degrees, 16 train, 2 valid, 2 test: 80.0:10.0:10.0 of the images, for 80.0:10.0:10.0\n"
    assert stderr == said
    tree = open_tree(tmp_path / "out")
    blocks = [{block_of(name) for name in tree.files(split)} for split in SPLITS]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 20
    found = manifest(tmp_path / "out")
    assert (found["seed"], found["ratios"], found["split"]["kind"], found["split"]["degrees"]) == (
        0, [80, 10, 10], "place", 0.5,
    )  # fmt: skip
    words = "80:10:10 by prepare, by place, in whole blocks of 0.5 degrees by seed 0 (digest "
    assert split_of(tree).startswith(words)
    assert run(country, *wish, out="out-again")[0] == run(country, *wish, "--seed", 1, out="out-other")[0] == 0
    assert manifest(tmp_path / "out-again")["digest"] == found["digest"] != manifest(tmp_path / "out-other")["digest"]


def test_images_without_coordinates_are_named(tmp_path: Path, country: Path, grow: Grow, run: Run) -> None:
    shutil.copy(grow("photos", {"Forest": 1}) / "Forest" / "Forest_1.jpg", country / "Forest" / "new.jpg")
    (country / "River" / "cut.tif").write_bytes((country / "River" / "River_1.tif").read_bytes()[:300])
    wish = ("--split-by-place", "0.5", "--ratios", "80,10,10")
    status, stdout, stderr = run(country, *wish)
    assert (status, stdout, left(tmp_path)) == (2, "", [])
    assert stderr.startswith(f"error: 2 of 82 files of {country} cannot be used (--skip-bad leaves them out):\n")
    assert "2 files: it has no coordinates, which --split-by-place needs: GeoTIFFs have them: " in stderr
    status, stdout, stderr = run(country, *wish, "--skip-bad")
    assert (status, stdout.splitlines()[-1]) == (0, "80 images: 64 train / 8 valid / 8 test")
    assert [one["file"] for one in manifest(tmp_path / "out")["skipped"]] == ["Forest/new.jpg", "River/cut.tif"]


def test_too_few_blocks(tmp_path: Path, country: Path, run: Run) -> None:
    status, _, stderr = run(country, "--split-by-place", 90)
    assert (status, stderr.count("\n"), left(tmp_path)) == (2, 1, [])
    said = (
        "class Forest lies in 1 of the 1 blocks of 90 degrees, and valid gets none: give --split-by-place smaller ones"
    )
    assert said in stderr


def test_uneven_blocks_come_near_the_ratios() -> None:
    """Ten classes in 200 blocks of 1 to 50 images, of which few classes lie in each."""
    random = np.random.default_rng(0)
    items, places = [], {}
    for block in range(200):
        for _ in range(int(random.integers(1, 50))):
            label = f"c{(block + int(random.integers(3))) % 10}"
            path = f"{label}/{len(items)}.tif"
            items.append(Item(path, None, label, f"{len(items)}.tif"))
            places[path] = (block % 20 + 0.5, block // 20 + 0.5)
    chosen, blocks = share_out(items, places, 1.0, splits.Wish.ratios, seed=0)
    totals = np.array([sum(split == one for one in chosen.values()) for split in SPLITS])
    assert np.abs(totals / len(items) - [0.94, 0.05, 0.01]).max() < 0.002
    assert sum(blocks.values()) == 200


@pytest.mark.skipif(not MULTISPECTRAL.exists(), reason=f"the multispectral sample is not at {MULTISPECTRAL}")
def test_places_of_real_patches() -> None:
    """In their own UTM zones, all over Europe."""
    with open_source(str(MULTISPECTRAL), 0) as source:
        places, flaws = places_of(source)
        inside = [item for item in source.layout.items if "AnnualCrop_1175" in item.path]
    assert (len(places), flaws) == (100, {})
    assert all(-25 < east < 45 and 34 < north < 72 for east, north in places.values())
    assert places[inside[0].path] == pytest.approx((4.682432, 48.951615), abs=1e-6)


# --- what says it later


@pytest.fixture
def two_splits(tmp_path: Path, grow: Grow, run: Run) -> tuple[Path, Path]:
    """The same images split as in NAMES, and with two of its training images as the test images."""
    source = grow("photos", COUNTS)
    run(source, "--split-lists", *write_lists(tmp_path))
    swapped = {"train": ["Forest_4", "Forest_2", "River_4", "River_2"], "test": ["Forest_1", "River_1"]}
    run(source, "--split-lists", *write_lists(tmp_path, **swapped), out="other")
    return tmp_path / "out", tmp_path / "other"


def trained_on(folder: Path, root: Path, run: Path) -> Path:
    """A checkpoint of a run in `run` on the data at root."""
    folder.mkdir(exist_ok=True)
    model = build("resnet18", 2, "head", seed=0)
    saved = saved_checkpoint(folder / "epoch-0003.pt", model, list(COUNTS), Model(arch="resnet18"), Data(image_size=64))
    config = load(["--data.root", str(root), "--run.dir", str(run), "--model.arch", "resnet18"])
    state = replace(checkpoint.load(saved), config=config.model_dump(mode="json"), digest=open_tree(root).digest)
    checkpoint.write(state, saved, frozen=None)
    return saved


def asked(alone: World, saved: Path, root: Path, *words: str) -> None:
    evaluate.main(alone, verbs.evaluate(["--checkpoint", str(saved), "--data.root", str(root), *words]))


def test_evaluating_what_was_trained_on_is_warned_of(
    tmp_path: Path, two_splits: tuple[Path, Path], alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two_splits
    saved = trained_on(tmp_path / "checkpoints", first, tmp_path / "gone")
    note_images(saved.parent, open_tree(first))
    capsys.readouterr()
    asked(alone, saved, first)
    out, err = capsys.readouterr()
    assert (out.startswith(f"test images of {first}, split by lists of names, sha256 train "), err) == (True, "")
    warning = f"warning: {saved} was trained on 2 of these 2 images, so its accuracy on them says little of others\n"
    shutil.rmtree(first)  # it may be gone, or hold another split by then
    asked(alone, saved, second)
    assert capsys.readouterr().err == warning
    asked(alone, saved, second, "--split", "valid")
    assert capsys.readouterr().err == ""


def test_what_nobody_can_tell_is_said(
    tmp_path: Path, two_splits: tuple[Path, Path], alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the note beside the checkpoint, from the data where they were; from nothing where they are gone."""
    first, second = two_splits
    saved = trained_on(tmp_path / "elsewhere", first, tmp_path / "run")
    capsys.readouterr()
    asked(alone, saved, second)
    assert "was trained on 2 of these 2 images" in capsys.readouterr().err
    first.rename(tmp_path / "moved")
    asked(alone, saved, second)
    note = f"note: nobody can tell whether {saved} was trained on them: their digests are not known\n"
    assert capsys.readouterr().err == note
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    note_images(tmp_path / "run" / "checkpoints", open_tree(tmp_path / "moved"))
    asked(alone, saved, second)
    assert "was trained on 2 of these 2 images" in capsys.readouterr().err


def test_a_run_says_its_split(tmp_path: Path, two_splits: tuple[Path, Path], alone: World) -> None:
    root, keys = two_splits[0], {"model.arch": "resnet18", "model.weights": "none", "train.epochs": 1}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    config = load([*words, "--data.root", str(root), "--run.dir", str(tmp_path / "run"), "--train.batch_size", "2"])
    assert train.train(alone, config) == 0
    split = split_of(open_tree(root))
    for name in ("summary.json", "status.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["split"] == split
    assert split in (tmp_path / "run" / "index.html").read_text()
    noted = next((tmp_path / "run" / "checkpoints").glob("trained-on-*.npy"))
    assert noted.name == f"trained-on-{open_tree(root).digest[:16]}.npy"
    assert noted.stat().st_size == 128 + 4 * 8  # eight bytes an image


@pytest.mark.parametrize(
    ("ratios", "words"),
    [([94, 5, 1], "94:5:1 by prepare, at random by seed 3"), (None, "as the images came")],
)
def test_manifests_of_before(tmp_path: Path, grow: Grow, run: Run, ratios: list[float] | None, words: str) -> None:
    assert run(grow("photos", COUNTS))[0] == 0
    found = manifest(tmp_path / "out") | {"seed": 3 if ratios else None, "ratios": ratios}
    del found["split"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(found))
    assert split_of(open_tree(tmp_path / "out")).startswith(f"{words} (digest ")
