"""What a data tree is: each rule by itself. That all commands keep to it is in test_one_tree.py."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.batches import open_images
from hvd_eurosat.data.folder import find_images
from hvd_eurosat.data.images import BadImageError, decode, decode_any
from hvd_eurosat.data.layout import SPLITS, find_files, lay_out
from hvd_eurosat.data.listing import is_litter, list_folder
from hvd_eurosat.data.packed import open_packed
from hvd_eurosat.data.tree import CHECKSUMS, MANIFEST, open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.prepare import main
from tests.unit.conftest import Encode, Grow, Run, left, manifest, zipped

NFC, NFD = "Forêt", unicodedata.normalize("NFD", "Forêt")
PIXELS = np.random.default_rng(7).integers(0, 256, (64, 64, 4), dtype=np.uint8)


def split_counts(*classes: str) -> dict[str, int]:
    return {f"{split}/{label}": 3 for split in SPLITS for label in classes}


# --- litter, and what lies beside the classes


@pytest.mark.parametrize(
    "name",
    ["desktop.ini", "Desktop.INI", "Thumbs.db", "THUMBS.DB", "ehthumbs.db", "Icon\r", "@eaDir", ".ipynb_checkpoints",
     "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "__MACOSX", ".DS_Store", "._a.jpg", "System Volume Information",
     "#recycle", "a.jpg:Zone.Identifier", "a.jpg\uf03aZone.Identifier", "a.tif.aux.xml", "a.TFW", "a.tif.ovr",
     "~$a.docx", ".git", ".nfs0001", "LOST.DIR", "@Recycle",
     "Thumbs.db:encryptable", "Icon\uf00d", "a.jpg@SynoEAStream", "@SynoResource", "FOUND.000", "WPSettings.dat",
     "Network Trash Folder", "Temporary Items", "Picasa.ini"],
)  # fmt: skip
def test_litter_of_every_system(name: str) -> None:
    assert is_litter(name)


@pytest.mark.parametrize("name", ["Forest", "1.jpg", "icon.png", "thumbs.jpg", "recycling", "lost", "a.xml", "eaDir"])
def test_no_litter(name: str) -> None:
    assert not is_litter(name)


def test_what_is_left_out_is_counted_in_a_line(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", {"A": 4, "B": 4, "A/@eaDir": 2, "B/@EADIR": 1})
    for name in ("A/Thumbs.db", "A/._A_1.jpg", "A/._A_2.jpg", "B/B_1.jpg.aux.xml", "LICENSE", "labels.csv"):
        (source / name).write_bytes(b"litter")
    for options in ((), ("--skip-bad",)):
        status, _, said = run(source, *options, out=f"out{len(options)}")
        assert (status, len(said.splitlines())) == (0, 2)
        litter = "1 *.aux.xml, 2 ._*, 1 @EADIR, 1 @eaDir, 1 Thumbs.db"
        assert f"note: {source}: left out files and folders that are no data: {litter}\n" in said
        assert f"note: {source}: left out 2 files outside the folders of images: LICENSE, labels.csv\n" in said
        assert len(open_tree(tmp_path / f"out{len(options)}").checksums) == 8


def test_a_file_that_is_no_image_is_left_out_only_outside_the_classes(grow: Grow, run: Run) -> None:
    source = grow("photos", {"in/A": 4, "in/B": 4})
    for name in ("notes.txt", "in/notes.txt", "docs/old/notes.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("words")
    assert set(find_files(list_folder(source)).beside) == {"notes.txt", "in/notes.txt", "docs/old/notes.txt"}
    (source / "in" / "docs").mkdir()
    (source / "in" / "docs" / "manual.pdf").write_bytes(b"%PDF-1.4")
    assert "in/docs/manual.pdf: not a readable JPEG, PNG, TIFF, WebP or BMP image but a PDF" in run(source)[2]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"GIF89a", "a GIF image"), (b"<!DOCTYPE html>", "a web page: was its download refused?"),
     (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"PK\3\4", "a zip file"),
     (b"\0\0\0\x18ftypheic", "a HEIC or AVIF image")],
)  # fmt: skip
def test_what_a_file_is_instead(content: bytes, said: str) -> None:
    with pytest.raises(BadImageError, match=re.escape(said)):
        decode(content + bytes(100))


# --- folders around the classes


@pytest.mark.parametrize(
    "around", ["", "UCMerced_LandUse/Images/", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif/"]
)
def test_single_folders_are_walked_through(grow: Grow, around: str) -> None:
    root = grow("photos", {f"{around}{label}": 2 for label in "AB"})
    layout = lay_out(list_folder(root))
    assert (layout.classes, layout.split, len(layout.items)) == (("A", "B"), False, 4)
    root = grow("split", {f"{around}{split}/{label}": 1 for split in SPLITS for label in "AB"})
    tree = open_tree(root)
    assert tree.files("test") == ["test/A/A_1.jpg", "test/B/B_1.jpg"]
    assert tree.path("test/A/A_1.jpg") == root / f"{around}test/A/A_1.jpg"


@pytest.mark.parametrize("counts", [{"x/A": 3, "x/B": 3, "y/A": 3}, {"x/A": 3, "x/B": 3, "train/A": 3, "train/B": 3}])
def test_several_folders_are_named(tmp_path: Path, grow: Grow, run: Run, counts: dict[str, int]) -> None:
    source = grow("a set", counts)
    said = run(source)[2]
    folders = sorted({name.split("/")[0] for name in counts})
    assert (
        f"has class folders in several folders, {folders[0]}/, {folders[1]}/: say which is meant with --inside" in said
    )
    with pytest.raises(UserError, match=re.escape(f"--data.root {shlex.quote(f'{source}/')}{folders[0]}")):
        open_tree(source)
    assert run(source, "--inside", "x")[0] == 0
    assert left(tmp_path) == ["out"]


def test_what_lies_beside_three_splits_is_left_out(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    """A run's own pictures, for one, where the data lie in the working directory."""
    root = grow("work", split_counts("A", "B"))
    before = open_tree(root)
    for name in ("runs/finetune/plots/confusion_matrix.png", "overview.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(1, (200, 100), kind="PNG"))
    (root / "runs" / "finetune" / "config.toml").write_text("[train]")
    tree = open_tree(root)
    assert (tree.digest, list(tree.checksums)) == (before.digest, list(before.checksums))
    assert "3 files (2 of them images) outside the folders of images: overview.jpg, runs/" in tree.notes[0]
    assert tree.notes[0] in run(root)[2]
    assert set(find_images([root]).paths) == {f"{s}/{c}/{c}_{n}.jpg" for s in SPLITS for c in "AB" for n in (1, 2, 3)}
    shutil.rmtree(root / "valid")
    said = run(root, out="out2")[2]
    assert "overview.jpg lies outside the class folders" in said
    (root / "overview.jpg").rename(root / "runs" / "overview.jpg")
    assert re.search(r": runs/\S+ lies outside the class folders, beside test/, train/", run(root, out="out2")[2])


def test_two_trees_of_splits_are_named(grow: Grow, run: Run) -> None:
    source = grow("both", {f"{top}/{name}": 2 for top in ("rgb", "ms") for name in split_counts("A", "B")})
    assert "has splits in several folders, ms/, rgb/: say which is meant with --inside ms" in run(source)[2]
    assert run(source, "--inside", "rgb")[0] == 0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train", "training", "valid", "test"), "of which two would be train/: rename one"),
        (("Train", "Test"), "has Test/, Train/ but not all of train/, valid/ and test/"),
        (("train",), "has train/ but not all of"),
        (("train", "val"), "or split one of them anew with python -m hvd_eurosat.prepare --source {} --inside train "),
    ],
)
def test_splits_that_are_not_three(grow: Grow, run: Run, names: tuple[str, ...], said: str) -> None:
    source = grow("photos", {f"{name}/{label}": 1 for name in names for label in "AB"})
    assert said.format(source) in run(source)[2]


@pytest.mark.parametrize(
    ("counts", "side"),
    [({"A": 4, "B": 4}, 64), ({"A": 4, "B": 4}, 48), ({"Train/A": 4, "Train/B": 4, "Test/A": 1, "Test/B": 1}, 64)],
)
def test_what_train_advises_works(tmp_path: Path, grow: Grow, counts: dict[str, int], side: int) -> None:
    with pytest.raises(UserError) as error:
        open_tree(grow("my photos", counts, size=(side, side)))
    words = shlex.split(str(error.value).partition("hvd_eurosat.prepare ")[2])
    assert main([str(tmp_path / "data") if word == "DIR" else word for word in words]) == 0
    assert open_tree(tmp_path / "data").classes == ("A", "B")


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Train", "Val", "TEST"), ("training",)])
def test_splits_without_class_folders(grow: Grow, run: Run, names: tuple[str, ...]) -> None:
    source = grow("photos", dict.fromkeys(names, 3))
    assert "but no class folders there: make one for each class" in run(source)[2]
    with pytest.raises(UserError, match="but no class folders there"):
        open_tree(source)


def test_splits_within_classes(grow: Grow, run: Run) -> None:
    source = grow("photos", {f"{label}/{split}": 2 for label in "AB" for split in ("train", "val", "test")})
    assert "has test/, train/, val/ in A/, B/: class folders belong into the splits, as in test/A/" in run(source)[2]


@pytest.mark.parametrize("where", ["", "photos/", "train/"])
def test_an_image_beside_the_classes_is_named(grow: Grow, encode: Encode, run: Run, where: str) -> None:
    source = grow("data", {f"{where}{label}": 3 for label in "AB"} if where != "train/" else split_counts("A", "B"))
    (source / f"{where}lost.jpg").write_bytes(encode(1))
    assert f"{where}lost.jpg lies outside the class folders" in run(source)[2]


def test_an_image_is_known_by_its_content(grow: Grow, encode: Encode) -> None:
    root = grow("photos", {"A": 2, "B": 2})
    for kind, file in zip(("JPEG", "PNG", "WEBP", "BMP"), sorted(root.rglob("*.jpg")), strict=True):
        file.with_suffix("").write_bytes(encode(1, kind=kind))
        file.unlink()
    assert len(lay_out(list_folder(root)).items) == 4
    (root / "lost").write_bytes(encode(2, kind="TIFF"))
    with pytest.raises(UserError, match="lost lies outside the class folders"):
        lay_out(list_folder(root))
    (root / "lost").write_text("BM: two letters that begin a bitmap as well")
    assert find_files(list_folder(root)).beside == ("lost",)


def test_folders_in_class_folders(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", {"A": 3, "A/old": 2, "B": 3})
    assert run(source)[0] == 0
    assert {Path(name).name for name in open_tree(tmp_path / "out").checksums} > {"old_old_1.jpg", "old_old_2.jpg"}
    grow("photos", {"C/new": 2})
    assert "C/new/new_1.jpg lies deeper than a class folder: is C its class, or new?" in run(source, out="out2")[2]
    assert (
        "B/A/A_1.jpg lies in the folders of two classes"
        in run(grow("other", {"A": 3, "B": 3, "B/A": 1}), out="out3")[2]
    )


# --- links


def test_links_are_followed_and_loops_found(tmp_path: Path, grow: Grow, run: Run) -> None:
    source, elsewhere = grow("photos", {"A": 3, "B": 3}), grow("elsewhere", {"C": 3})
    (source / "C").symlink_to(elsewhere / "C")
    (source / "A" / "up").symlink_to(source)
    (source / "B" / "here").symlink_to(".")
    said = run(source)[2]
    assert f"note: {source}: left out links that lead back to a folder around them: A/up, B/here\n" in said
    assert f"note: {source}: followed linked folders: C\n" in said
    assert manifest(tmp_path / "out")["classes"] == ["A", "B", "C"]


def test_a_validation_set_that_is_a_link(grow: Grow) -> None:
    root = grow("data", {f"{split}/{label}": 2 for split in ("train", "test") for label in "AB"})
    (root / "valid").symlink_to("test")
    assert len(open_tree(root).files("valid")) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_linked_into_two_classes(grow: Grow, run: Run, alone: World, packed: bool) -> None:
    """In whichever splits: `train` says what `prepare` says, also where it had packed the images before."""
    root = grow("data", split_counts("A", "B"))
    (root / "valid" / "B" / "link.jpg").symlink_to(root / "train" / "A" / "A_1.jpg")
    (root / "test" / "A" / "same.jpg").hardlink_to(root / "test" / "A" / "A_1.jpg")  # twice in one class
    tree = open_tree(root)
    if packed:
        for split in SPLITS:
            open_packed(replace(tree, flaws={}), split, 64, None)
    with pytest.raises(UserError) as error:
        open_images(alone, tree, SPLITS, Data(), Data())
    said = run(root)[2]
    one, other = "train/A/A_1.jpg", "valid/B/link.jpg"
    assert str(error.value).startswith(f"2 of 20 files of {root} cannot be used (python -m hvd_eurosat.prepare ")
    for flaw in (f"{one}: the same image as {other} of another class", f"{other}: the same image as {one} of another"):
        assert flaw in said
        assert flaw in str(error.value)


# --- names


@pytest.mark.parametrize("counts", [{"Forest": 3, "forest": 3, "A": 3}, split_counts("A", "Forest")])
def test_classes_that_differ_in_capitals_alone(grow: Grow, run: Run, counts: dict[str, int]) -> None:
    """Also where each split has but one of them."""
    root = grow("photos", counts)
    if (root / "valid").exists():
        (root / "valid" / "Forest").rename(root / "valid" / "forest")
    said = f"{root} has class folders that differ in capitals alone, Forest/, forest/: rename one, or put "
    with pytest.raises(UserError, match=re.escape(said)):
        open_tree(root)
    assert said in run(root)[2]
    with pytest.raises(UserError, match=re.escape(said)):
        find_images([root])
    assert said.replace(str(root), str(root.with_suffix(".zip"))) in run(zipped(root.with_suffix(".zip"), root))[2]


def test_two_spellings_are_one_class(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", {NFC: 2, "Mer": 4})
    (source / NFD).mkdir()
    for n in (3, 4):
        (source / NFD / f"é{n}.jpg").write_bytes(encode(n))
    status, _, said = run(source)
    assert (status, said) == (0, f"note: {source}: folders spelt in two ways of Unicode (NFC, NFD) are one: {NFC}\n")
    assert manifest(tmp_path / "out")["classes"] == [NFC, "Mer"]
    (source / NFD / f"{NFC}_1.jpg").write_bytes(encode(9))
    said = run(source, out="out2")[2]
    assert "are two files of one name" in said
    assert "Fore\\u0302t" in said


def test_the_same_tree_on_two_systems(grow: Grow) -> None:
    """Names, classes, their order and the digest are the same."""
    one = open_tree(grow("linux", split_counts(NFC, "Forf", "Mer")))
    shutil.copytree(one.root, one.root.with_name("mac"), copy_function=shutil.copy2)
    for folder in one.root.with_name("mac").glob(f"*/{NFC}"):
        for file in folder.iterdir():
            file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))
        folder.rename(folder.with_name(NFD))
    other = open_tree(one.root.with_name("mac"))
    assert (other.classes, list(other.checksums), other.digest) == (one.classes, list(one.checksums), one.digest)
    assert all(other.path(name).exists() for name in other.checksums)


def test_a_prepared_tree_that_went_through_macos(tmp_path: Path, grow: Grow, run: Run) -> None:
    assert run(grow("photos", {NFC: 4, "Mer": 4}))[0] == 0
    out = tmp_path / "out"
    expected = [open_packed(open_tree(out), split, 64, tmp_path / "cache").images for split in SPLITS]
    for folder in out.glob(f"*/{NFC}"):
        for file in folder.iterdir():
            file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))
        folder.rename(folder.with_name(NFD))
    assert main(["--verify", str(out)]) == 0
    found = [open_packed(open_tree(out), split, 64, tmp_path / "other").images for split in SPLITS]
    assert all(map(np.array_equal, found, expected))


def test_a_tree_prepared_with_decomposed_names(tmp_path: Path, grow: Grow, run: Run) -> None:
    """As earlier versions wrote them: the order stays, so that packed arrays fit."""
    assert run(grow("photos", {"Forf": 4, NFC: 4}))[0] == 0
    out = tmp_path / "out"
    text = unicodedata.normalize("NFD", (out / CHECKSUMS).read_text())
    text = "".join(f"{line}\n" for line in sorted(text.splitlines(), key=lambda line: line[66:]))
    (out / CHECKSUMS).write_text(text)
    record = json.loads(unicodedata.normalize("NFD", (out / MANIFEST).read_text()))
    del record["converted"]  # which they did not know
    record |= {"classes": sorted(record["classes"]), "digest": hashlib.sha256(text.encode()).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(record))
    for folder in out.glob(f"*/{NFC}"):
        folder.rename(folder.with_name(NFD))
    tree = open_tree(out)
    assert NFC in tree.classes
    assert [name.split("/")[1] for name in tree.files("test")] == list(tree.classes) == [NFC, "Forf"]
    assert len(open_packed(tree, "train", 64, None).images) == len(tree.files("train"))


# --- modes, bands and what Pillow makes of them


def png(array: np.ndarray, mode: str | None = None, **more: object) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, "PNG", **more)
    return stream.getvalue()


def banded(bands: int, extra: int | None = None, tile: bool = False) -> bytes:
    """An uncompressed 8-bit TIFF that calls its first three bands red, green and blue."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262] = 64, 64, (8,) * bands, 1, 2
    tags[277], tags[284] = bands, 1
    if extra is not None:
        tags[338] = (extra,) + (0,) * (bands - 4)
    if tile:
        tags[322], tags[323], tags[324], tags[325] = 64, 64, 1000, 64 * 64 * bands
    else:
        tags[273], tags[278], tags[279] = 1000, 64, 64 * 64 * bands
    pixels = np.concatenate([PIXELS, PIXELS], axis=2)[..., :bands]
    header = (b"II*\0\x08\0\0\0" + tags.tobytes(8)).ljust(1000, b"\0")
    if bands <= 6:  # more than these Pillow does not open
        header = header.ljust(Image.open(io.BytesIO(header)).tile[0].offset, b"\0")
    return header + pixels.tobytes()


def test_converting_writes_what_was_converted(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", {"A": 4, "B": 4})
    files = {
        "A/grey.png": encode(1, kind="PNG", mode="L"),
        "A/cmyk.jpg": encode(2, mode="CMYK"),
        "A/palette.png": encode(3, kind="PNG", mode="P"),
        "B/alpha.png": png(PIXELS),
        "B/deep.png": png(PIXELS[..., 0].astype(np.uint16) * 256 + 77),
        "B/wide.png": encode(6, (80, 64), "PNG", "L"),
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    said = run(source)[2]
    assert "6 of 14 files" in said
    assert "A/grey.png: mode L (grey); 8-bit RGB is wanted (prepare --convert makes it so)" in said
    assert "B/wide.png: 80x64 pixels; 64x64 is wanted" in run(source, "--convert")[2]
    status, _, said = run(source, "--convert", "--resize")
    kinds = "1 of 16 bits a channel and grey, 1 of CMYK, 1 of alpha, 2 of grey, 1 of palette"
    wide = "to 64x64, the largest from 80x64; squeezed, for they are no squares: 1"
    notes = [
        f"note: resized 1 images of {source} {wide}",
        f"note: converted 6 images of {source} to 8-bit RGB: {kinds}",
    ]
    assert (status, said.splitlines()) == (0, notes)
    assert manifest(tmp_path / "out")["converted"] == {
        "16 bits a channel and grey": ["B/deep.png"],
        "CMYK": ["A/cmyk.jpg"],
        "alpha": ["B/alpha.png"],
        "grey": ["A/grey.png", "B/wide.png"],
        "palette": ["A/palette.png"],
    }
    assert main(["--verify", str(tmp_path / "out")]) == 0


def test_the_rules_of_converting() -> None:
    deep, was = decode_any(png(PIXELS[..., 0].astype(np.uint16) * 256 + 255))
    assert was == "16 bits a channel and grey"
    assert np.array_equal(np.asarray(deep), np.repeat(PIXELS[..., :1], 3, axis=2))  # value // 256
    half = np.dstack([PIXELS[..., :3], np.full((64, 64), 128, np.uint8)])
    on_white, _ = decode_any(png(half))
    expected = (PIXELS[..., :3].astype(float) * 128 + 255 * 127) / 255
    assert np.abs(np.asarray(on_white) - expected).max() <= 1
    clear, was = decode_any(png(PIXELS[..., :3], transparency=tuple(map(int, PIXELS[0, 0, :3]))))
    assert (was, clear.getpixel((0, 0))) == ("alpha", (255, 255, 255))


@pytest.mark.parametrize(("bands", "extra"), [(4, 0), (4, 1), (4, 2), (4, None), (5, 0), (6, 0)])
@pytest.mark.parametrize("convert", [False, True])
def test_more_bands_are_never_red_green_and_blue_by_accident(bands: int, extra: int | None, convert: bool) -> None:
    """The cure is named at once: --convert would refuse them as well."""
    with pytest.raises(BadImageError, match=f"a TIFF of {bands} bands, .*: prepare --bands names them"):
        decode_any(banded(bands, extra), convert=convert)


def test_an_alpha_of_a_tiff_is_one_that_hides_or_shows() -> None:
    mask = np.where(PIXELS[..., 3:] > 99, 255, 0).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.dstack([PIXELS[..., :3], mask])).save(stream, "TIFF")
    image, was = decode_any(stream.getvalue())
    assert was == "alpha"
    assert np.array_equal(np.asarray(image), np.where(mask == 255, PIXELS[..., :3], 255))
    with pytest.raises(
        BadImageError, match=r"mode RGBA \(alpha\); 8-bit RGB is wanted \(prepare --convert makes it so\)"
    ):
        decode(stream.getvalue())


def test_tiles_are_fine_up_to_the_limit() -> None:
    assert np.array_equal(np.asarray(decode(banded(3, tile=True))), PIXELS[..., :3])


def test_one_image_a_file() -> None:
    first, second = Image.fromarray(PIXELS[..., :3]), Image.fromarray(PIXELS[..., 1:])
    for kind, said in (("TIFF", "several pages"), ("PNG", "animation of 2 frames"), ("WEBP", "animation of 2 frames")):
        stream = io.BytesIO()
        first.save(stream, kind, save_all=True, append_images=[second])
        with pytest.raises(BadImageError, match=said):
            decode(stream.getvalue())
    stream = io.BytesIO()  # a camera's, with a small copy
    first.save(stream, "MPO", save_all=True, append_images=[second])
    assert decode(stream.getvalue()).size == (64, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    turns: dict[int, Any] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    smooth = np.asarray(Image.fromarray(PIXELS[:2, :2, :3]).resize((32, 48), Image.Resampling.BILINEAR))
    plain, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(smooth).save(plain, kind, quality=100)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth).save(turned, kind, quality=100, exif=exif)
    expected = turns[orientation](np.asarray(decode(plain.getvalue())))
    assert np.array_equal(np.asarray(decode(turned.getvalue())), expected)


CHATTER = """
import sys
from hvd_eurosat.data.images import BadImageError, decode
for path in sys.argv[1:]:
    try:
        decode(open(path, "rb").read())
    except BadImageError:
        print("bad")
"""


def test_pillow_keeps_quiet(tmp_path: Path) -> None:
    """Neither its warnings nor what libtiff and libjpeg write of damaged files is for the user."""
    for kind in ("tiff_deflate", "jpeg", "tiff_lzw"):
        stream = io.BytesIO()
        Image.fromarray(PIXELS[..., :3]).save(stream, "TIFF", compression=kind)
        data = bytearray(stream.getvalue())
        (tmp_path / f"{kind}-cut").write_bytes(data[:-200])
        data[300:340] = bytes(40)
        (tmp_path / f"{kind}-damaged").write_bytes(data)
    (tmp_path / "bands").write_bytes(banded(8, 0))
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", CHATTER, *files], capture_output=True, text=True, check=True)
    assert "bad" in done.stdout
    assert done.stderr == ""


# --- all bad files of a tree at once


def test_train_names_all_bad_files_of_all_splits(grow: Grow, encode: Encode, alone: World) -> None:
    root = grow("data", split_counts("A", "B"))
    (root / "train" / "A" / "A_1.jpg").write_bytes(encode(1, mode="L"))  # the first, from which the size is taken
    (root / "valid" / "B" / "grey.jpg").write_bytes(encode(2, mode="L"))
    (root / "test" / "A" / "notes.txt").write_text("words")
    os.mkfifo(root / "test" / "B" / "pipe.jpg")
    (root / "test" / "B" / "link.jpg").symlink_to("nowhere")
    with pytest.raises(UserError) as error:
        open_images(alone, open_tree(root), SPLITS, Data(), Data())
    said = str(error.value)
    assert said.startswith(f"5 of 22 files of {root} cannot be used (python -m hvd_eurosat.prepare --source {root} ")
    assert (
        f"2 files: mode L (grey); 8-bit RGB is wanted (prepare --convert makes it so): {root}/train/A/A_1.jpg, " in said
    )
    for reason in (
        "notes.txt: not a readable",
        "pipe.jpg: not a regular file",
        "link.jpg: cannot be read (No such file",
    ):
        assert reason in said
