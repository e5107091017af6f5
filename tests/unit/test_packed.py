"""The packed arrays: right pixels, built once and whole, errors that name the culprit."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.packed import open_packed, pack, verify_packed
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.prepare import main

REPOSITORY = Path(__file__).parents[2]
COUNTS = {f"{split}/{label}": 3 for split in SPLITS for label in ("Forest", "River")}

Grow = Callable[..., Path]
Encode = Callable[..., bytes]


@pytest.fixture
def prepared(tmp_path: Path, grow: Grow) -> Tree:
    out = tmp_path / "data"
    assert main(["--source", str(grow("photos", {"Forest": 9, "River": 5})), "--out", str(out)]) == 0
    return open_tree(out)


def pixels(path: Path, size: int = 64) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def test_it_holds_the_pixels_in_the_tree_s_order(prepared: Tree) -> None:
    packed = open_packed(prepared, "train", 64, None)
    assert (packed.images.dtype.name, packed.labels.dtype.name) == ("uint8", "int64")
    assert packed.images.shape == (10, 64, 64, 3)
    assert packed.files == tuple(prepared.files("train"))
    for image, label, file in zip(packed.images, packed.labels, packed.files, strict=True):
        assert np.array_equal(image, pixels(prepared.root / file))
        assert prepared.classes[label] == file.split("/")[1]


def test_it_is_an_ordinary_npy_file_that_is_built_once(prepared: Tree, tmp_path: Path) -> None:
    path = pack(prepared, "valid", 64, tmp_path / "cache")
    assert path == tmp_path / "cache" / f"{prepared.digest[:16]}-valid-64.npy"
    assert np.load(path).shape == (2, 64, 64, 3)
    assert json.loads(path.with_suffix(".json").read_text())["shape"] == [2, 64, 64, 3]
    verify_packed(path)
    before = path.stat()
    assert pack(prepared, "valid", 64, tmp_path / "cache") == path
    assert path.stat() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [path.with_suffix(".json").name, path.name]


def test_writing_to_the_images_changes_no_file(prepared: Tree) -> None:
    open_packed(prepared, "test", 64, None).images[:] = 0
    verify_packed(pack(prepared, "test", 64, None))
    assert open_packed(prepared, "test", 64, None).images.any()


def test_another_size_is_resized_smoothly(prepared: Tree) -> None:
    for size in (32, 96):
        packed = open_packed(prepared, "test", size, None)
        assert packed.images.shape == (2, size, size, 3)
        assert np.array_equal(packed.images[0], pixels(prepared.root / packed.files[0], size))


def test_a_tree_without_manifest_may_have_any_one_size(grow: Grow, encode: Encode) -> None:
    tree = open_tree(grow("data", COUNTS, size=(48, 48)))
    assert open_packed(tree, "train", 64, None).images.shape == (6, 64, 64, 3)
    odd = tree.root / "train" / "River" / "River_2.jpg"
    odd.write_bytes(encode(1, (64, 64)))
    with pytest.raises(UserError, match=r"train/River/River_2.jpg: 64x64 pixels; 48x48 .*prepare --resize"):
        pack(open_tree(tree.root), "train", 64, None)


def test_images_that_are_not_square_are_sent_to_prepare(grow: Grow) -> None:
    tree = open_tree(grow("data", COUNTS, size=(63, 64)))
    with pytest.raises(
        UserError, match=r"files: 63x64 pixels; squares are wanted \(prepare --resize makes them so\): .*Forest_1.jpg"
    ):
        pack(tree, "train", 64, None)


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_file_that_is_not_as_prepared_is_named(prepared: Tree, encode: Encode, change: str) -> None:
    name = prepared.files("train")[3]
    (prepared.root / name).unlink()
    if change == "rewritten":
        (prepared.root / name).write_bytes(encode(12345))
    with pytest.raises(UserError, match=name):
        pack(prepared, "train", 64, None)
    assert list((prepared.root / ".packed").iterdir()) == []


def test_a_bad_image_in_a_tree_without_manifest_is_named(grow: Grow) -> None:
    tree = open_tree(grow("data", COUNTS))
    (tree.root / "test" / "River" / "River_3.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"test/River/River_3.jpg: not a readable"):
        pack(tree, "test", 64, None)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"!")


def behead(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 20)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def reshape(path: Path) -> None:
    np.save(path, np.zeros((1, 64, 64, 3), np.uint8))


def retype(path: Path) -> None:
    np.save(path, np.zeros((10, 64, 64, 3), np.int8))


@pytest.mark.parametrize("damage", [cut, lengthen, behead, empty, reshape, retype])
def test_a_damaged_packed_file_is_refused(prepared: Tree, damage: Callable[[Path], None]) -> None:
    path = pack(prepared, "train", 64, None)
    damage(path)
    with pytest.raises(RunError, match=r"-train-64.npy is damaged: delete it"):
        open_packed(prepared, "train", 64, None)
    with pytest.raises(RunError, match="damaged"):
        verify_packed(path)
    path.unlink()
    assert len(open_packed(prepared, "train", 64, None).images) == 10


def test_changed_pixels_are_found_by_verify(prepared: Tree) -> None:
    path = pack(prepared, "train", 64, None)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"!!!")
    with pytest.raises(RunError, match="damaged"):
        verify_packed(path)


def test_a_place_that_cannot_be_written_points_to_cache_dir(prepared: Tree) -> None:
    for place in (Path("/sys/packed"), Path("/dev/null")):
        with pytest.raises(UserError, match=rf"{place} .*--data.cache_dir DIR"):
            pack(prepared, "train", 64, place)


FULL = """
import sys
from pathlib import Path
from hvd_eurosat.data.packed import pack
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import RunError
try:
    pack(open_tree(Path(sys.argv[1])), "train", 64, None)
except RunError as error:
    raise SystemExit(f"error: {error}")
"""


def test_a_full_disk_leaves_no_part_of_a_file(prepared: Tree) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(prepared.root)],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert "no room for" in done.stderr
    assert "-train-64.npy (0.1 MB)" in done.stderr
    assert list((prepared.root / ".packed").iterdir()) == []


def test_several_may_build_at_once(prepared: Tree) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        paths = {job.result() for job in [pool.submit(pack, prepared, "train", 64, None) for _ in range(4)]}
    assert len(paths) == 1
    verify_packed(paths.pop())
    assert len(list((prepared.root / ".packed").iterdir())) == 2
