"""`prepare` through its command line: sources good and bad, the split, and that it all happens or nothing."""

import hashlib
import inspect
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import TiffImagePlugin

from hvd_eurosat.data.images import decode
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.listing import list_folder
from hvd_eurosat.data.packed import pack
from hvd_eurosat.data.sample import generate
from hvd_eurosat.data.split import sizes, split_class
from hvd_eurosat.data.splits import Wish
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.prepare import main
from tests.unit.conftest import EUROSAT, Encode, Grow, Run, left, manifest, needs_eurosat, zipped

REPOSITORY = Path(__file__).parents[2]
CLASSES = {"Forest": 20, "River": 30, "SeaLake": 4}

Capture = pytest.CaptureFixture[str]


# --- sources, split and results


def test_a_tree_becomes_a_split_tree_of_the_same_bytes(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    status, stdout, _ = run(source)
    assert status == 0
    assert stdout.splitlines()[-1] == "54 images: 47 train / 4 valid / 3 test"
    out = tmp_path / "out"
    images = [path for split in SPLITS for path in (out / split).rglob("*.jpg")]
    assert len(images) == 54
    assert all(path.read_bytes() == (source / path.parent.name / path.name).read_bytes() for path in images)
    found = manifest(out)
    assert found["counts"] == {
        "train": {"Forest": 18, "River": 27, "SeaLake": 2},
        "valid": {"Forest": 1, "River": 2, "SeaLake": 1},
        "test": {"Forest": 1, "River": 1, "SeaLake": 1},
    }
    assert (found["name"], found["synthetic"], found["image_size"]) == ("photos", False, 64)
    assert (found["seed"], found["ratios"], found["skipped"]) == (0, [94, 5, 1], [])
    assert found["digest"] == hashlib.sha256((out / "files.sha256").read_bytes()).hexdigest()
    subprocess.run(["sha256sum", "--check", "--quiet", "files.sha256"], cwd=out, check=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "files.sha256",
        "manifest.json",
        "test",
        "train",
        "valid",
    ]
    tree = open_tree(out)
    assert tree.classes == ("Forest", "River", "SeaLake")
    assert len(tree.files("train")) == len(tree.labels("train")) == 47
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3000, (2820, 150, 30)), (2500, (2350, 125, 25)), (2000, (1880, 100, 20)), (200, (188, 10, 2)), (3, (1, 1, 1))],
)
def test_sizes_of_the_documented_classes(count: int, expected: tuple[int, int, int]) -> None:
    assert sizes(count, (Fraction(94), Fraction(5), Fraction(1))) == expected


def test_halves_round_up(run: Run, grow: Grow, tmp_path: Path) -> None:
    assert run(grow("a", {"A": 6, "B": 10}), "--ratios", "50,25,25")[0] == 0
    assert manifest(tmp_path / "out")["counts"] == {
        "train": {"A": 2, "B": 4},
        "valid": {"A": 2, "B": 3},
        "test": {"A": 2, "B": 3},
    }


def test_the_split_depends_on_the_seed_alone(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    zips = [zipped(tmp_path / f"{n}.zip", source, "EuroSAT_RGB/", order=n) for n in range(2)]
    zips.append(zipped(tmp_path / "2750.zip", source, "2750/"))
    zips.append(zipped(tmp_path / "bare.zip", source))
    digests = []
    for number, origin in enumerate([source, *zips]):
        assert run(origin, out=f"out{number}")[0] == 0
        digests.append(manifest(tmp_path / f"out{number}")["digest"])
    assert len(set(digests)) == 1
    assert run(source, "--seed", 1, out="other")[0] == 0
    assert manifest(tmp_path / "other")["digest"] != digests[0]
    assert manifest(tmp_path / "other")["counts"] == manifest(tmp_path / "out0")["counts"]


def test_litter_is_ignored(tmp_path: Path, grow: Grow, run: Run) -> None:
    archive = zipped(tmp_path / "photos.zip", grow("photos", CLASSES), "2750/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("2750/Forest/", b"")
        for name in (
            "2750/Forest/.DS_Store",
            "2750/Forest/Thumbs.db",
            "__MACOSX/2750/Forest/._Forest_1.jpg",
            "LICENSE",
        ):
            file.writestr(name, b"litter")
    assert run(archive)[0] == 0
    assert len(open_tree(tmp_path / "out").checksums) == 54


@pytest.mark.parametrize("top", ["", "top/"])
@pytest.mark.parametrize("valid", ["valid", "val"])
def test_a_source_that_is_split_keeps_its_split(tmp_path: Path, grow: Grow, run: Run, top: str, valid: str) -> None:
    counts = {f"{top}{split}/{label}": n for split, n in (("train", 2), (valid, 3), ("test", 1)) for label in "AB"}
    grow("photos", counts)
    status, _, stderr = run(tmp_path / "photos")
    assert (status, "keeps its split" in stderr) == (0, True)
    found = manifest(tmp_path / "out")
    assert found["counts"] == {split: {"A": n, "B": n} for split, n in (("train", 2), ("valid", 3), ("test", 1))}
    assert (found["seed"], found["ratios"]) == (None, None)


def test_the_sample(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 pictures, which take 15 s: a tenth of each class is drawn here."""
    assert inspect.signature(generate).parameters["per_class"].default == 200
    monkeypatch.setattr("hvd_eurosat.data.sources.generate", partial(generate, 20))
    assert run("sample")[1].splitlines()[-1] == "200 images: 180 train / 10 valid / 10 test"
    assert open_tree(tmp_path / "out").synthetic


def test_a_download_without_network_says_where_to_get_the_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    status, stdout, stderr = run("download")
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert "--source EuroSAT_RGB.zip" in stderr
    assert left(tmp_path) == []


DIGEST = "4918da0d044b54d54157e4a5bfecf4403d5507db32e07088e31d4eff6043b244"  # of EuroSAT RGB, which all figures are of


@pytest.mark.long
@needs_eurosat
def test_the_real_zip(tmp_path: Path, run: Run) -> None:
    status, stdout, _ = run(EUROSAT)
    assert status == 0
    assert stdout.splitlines()[-1] == "27,000 images: 25,380 train / 1,350 valid / 270 test"
    assert manifest(tmp_path / "out")["digest"] == DIGEST
    counts = manifest(tmp_path / "out")["counts"]
    assert isinstance(counts, dict)
    assert [counts[split]["Forest"] for split in SPLITS] == [2820, 150, 30]
    assert [counts[split]["River"] for split in SPLITS] == [2350, 125, 25]
    assert [counts[split]["Pasture"] for split in SPLITS] == [1880, 100, 20]
    assert main(["--verify", str(tmp_path / "out")]) == 0


@needs_eurosat
def test_the_split_of_the_real_zip() -> None:
    """Of all its images, by their names and bytes; none is decoded or written."""
    lines = []
    with zipfile.ZipFile(EUROSAT) as archive:
        images = {name.rpartition("/")[2]: name for name in archive.namelist() if name.endswith(".jpg")}
        for label in {name.rpartition("_")[0] for name in images}:
            names = [name for name in images if name.startswith(f"{label}_")]
            for split, drawn in split_class(label, names, Wish.ratios, Wish.seed).items():
                for name in drawn:
                    lines.append((f"{split}/{label}/{name}", hashlib.sha256(archive.read(images[name])).hexdigest()))
    listing = "".join(f"{checksum}  {path}\n" for path, checksum in sorted(lines))
    assert hashlib.sha256(listing.encode()).hexdigest() == DIGEST


@needs_eurosat
def test_a_piece_of_the_real_zip(tmp_path: Path, run: Run) -> None:
    """Every 54th of its images."""
    with zipfile.ZipFile(EUROSAT) as whole, zipfile.ZipFile(tmp_path / "piece.zip", "w") as piece:
        for name in [name for name in whole.namelist() if name.endswith(".jpg")][::54]:
            piece.writestr(name, whole.read(name))
    status, stdout, _ = run(tmp_path / "piece.zip")
    assert status == 0
    assert stdout.splitlines()[-1].startswith("500 images: ")
    assert main(["--verify", str(tmp_path / "out")]) == 0


# --- copies


def splits_of(out: Path) -> dict[str, set[str]]:
    """The splits that each distinct image is in, by its checksum."""
    found: dict[str, set[str]] = {}
    for path, checksum in open_tree(out).checksums.items():
        found.setdefault(checksum, set()).add(path.split("/")[0])
    return found


@pytest.mark.parametrize("options", [(), ("--resize", "--image-size", 32)])
def test_copies_stay_together(tmp_path: Path, grow: Grow, run: Run, options: Sequence[object]) -> None:
    """Whichever of the names comes first; the counts are those of the originals, doubled."""
    source = grow("photos", CLASSES)
    assert "warning" not in run(source, *options, out="out-before")[2]
    originals = sorted(source.rglob("*.jpg"))
    for number, path in enumerate(originals):
        shutil.copy(path, path.with_name(f"{'Az'[number % 2]}_{path.name}"))
    status, stdout, stderr = run(source, *options)
    assert (status, stdout.splitlines()[-1][:10]) == (0, "108 images")
    assert f"warning: 54 of 108 images of {source} are copies of others; copies share a split\n" in stderr
    assert all(len(splits) == 1 for splits in splits_of(tmp_path / "out").values())
    counts = manifest(tmp_path / "out")["counts"]
    before = manifest(tmp_path / "out-before")["counts"]
    assert counts == {split: {label: 2 * n for label, n in of.items()} for split, of in before.items()}  # type: ignore[attr-defined]


def test_copies_across_a_split_that_is_kept(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", {f"{split}/{label}": 3 for split in SPLITS for label in "AB"})
    shutil.copy(source / "train" / "A" / "A_1.jpg", source / "test" / "A" / "new.jpg")
    shutil.copy(source / "train" / "B" / "B_1.jpg", source / "test" / "B" / "new.jpg")
    shutil.copy(source / "valid" / "B" / "B_1.jpg", source / "test" / "B" / "newer.jpg")
    shutil.copy(source / "valid" / "B" / "B_2.jpg", source / "valid" / "B" / "new.jpg")
    status, _, stderr = run(source)
    warning = f"warning: 3 images of {source} are in several splits: 2 in train and test, 1 in valid and test\n"
    assert (status, stderr) == (0, f"{warning}note: {source} is split already and keeps its split\n")
    assert manifest(tmp_path / "out")["counts"]["test"] == {"A": 4, "B": 5}  # type: ignore[index]


@pytest.mark.parametrize("presplit", [False, True])
def test_an_image_of_two_classes_is_refused_or_left_out(tmp_path: Path, grow: Grow, run: Run, presplit: bool) -> None:
    counts = {f"{split}/{label}": 3 for split in SPLITS for label in "AB"} if presplit else {"A": 9, "B": 9}
    source = grow("photos", counts)
    first, second = ("train/A/A_1.jpg", "test/B/new.jpg") if presplit else ("A/A_1.jpg", "B/new.jpg")
    shutil.copy(source / first, source / second)
    status, _, stderr = run(source)
    assert (status, left(tmp_path)) == (2, [])
    assert stderr.startswith(f"error: 2 of 19 files of {source} cannot be used (--skip-bad leaves them out):")
    reasons = [f"{a}: the same image as {b} of another class" for a, b in ((first, second), (second, first))]
    assert all(reason in stderr for reason in reasons)
    status, stdout, stderr = run(source, "--skip-bad")
    assert (status, stdout.splitlines()[-1][:9]) == (0, "17 images")
    assert all(reason in stderr for reason in reasons)
    assert {entry["file"] for entry in manifest(tmp_path / "out")["skipped"]} == {first, second}  # type: ignore[attr-defined]
    assert main(["--verify", str(tmp_path / "out")]) == 0


# --- bad images


def png(width: int, height: int, depth: int, pixels: bytes = b"") -> bytes:
    """A PNG of RGB pixels in `depth` bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def tiff(bands: int, **more: int) -> bytes:
    """A 64x64 TIFF of 16-bit bands, as EuroSAT_MS has with 13, and with more tags (t322=... for tag 322)."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    size = 64 * 64 * bands * 2
    tags[256], tags[257], tags[258], tags[259], tags[262] = 64, 64, (16,) * bands, 1, 1
    tags[273], tags[277], tags[278], tags[279], tags[284] = 1000, bands, 64, size, 1
    for name, value in more.items():
        tags[int(name[1:])] = value
    return (b"II*\0\x08\0\0\0" + tags.tobytes(8)).ljust(1000, b"\0") + bytes(size)


def bad(kind: str, encode: Encode) -> bytes:
    makers: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: encode(1)[:-400],
        "text": lambda: b"no image at all\n" * 50,
        "empty": lambda: b"",
        "header only": lambda: encode(1)[:30],
        "16-bit": lambda: png(64, 64, 16, bytes(64 * (1 + 64 * 6))),
        "16-bit TIFF": lambda: tiff(3, t262=2),
        "tiled TIFF": lambda: tiff(3, t262=2, t259=8, t322=65536, t323=10000, t324=1000, t325=24576),
        "16-bit grey": lambda: encode(1, kind="PNG", mode="I;16"),
        "grey": lambda: encode(1, mode="L"),
        "CMYK": lambda: encode(1, mode="CMYK"),
        "palette": lambda: encode(1, kind="PNG", mode="P"),
        "RGBA": lambda: encode(1, kind="PNG", mode="RGBA"),
        "GIF": lambda: encode(1, kind="GIF"),
        "63x64": lambda: encode(1, (63, 64)),
        "128x64": lambda: encode(1, (128, 64)),
        "13 bands": lambda: tiff(13),
        "bomb": lambda: png(10_000, 10_000, 8),
        "great bomb": lambda: png(60_000, 60_000, 8),
    }
    return makers[kind]()


BAD = {
    "truncated": "does not decode",
    "text": "not a readable JPEG, PNG, TIFF, WebP or BMP image",
    "empty": "0 bytes",
    "header only": "not a readable",
    "16-bit": "16 bits a channel",
    "16-bit TIFF": "16 bits a channel",
    "tiled TIFF": "a TIFF in tiles of 65536x10000 pixels; 4096 a side is the most",
    "16-bit grey": "16 bits a channel",
    "grey": "mode L (grey); 8-bit RGB is wanted (prepare --convert makes it so)",
    "CMYK": "mode CMYK (CMYK);",
    "palette": "mode P (palette);",
    "RGBA": "mode RGBA (alpha);",
    "GIF": "not a readable JPEG, PNG, TIFF, WebP or BMP image but a GIF image",
    "63x64": "63x64 pixels; 64x64 is wanted",
    "128x64": "128x64 pixels; 64x64 is wanted",
    "13 bands": "a TIFF of 13 bands, of which nobody can tell the red, green and blue: prepare --bands names them",
    "bomb": "its header claims 10000x10000 pixels; 4096 a side is the most (map takes whole scenes)",
    "great bomb": "its header claims more than",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_stops_it_or_is_left_out(tmp_path: Path, grow: Grow, encode: Encode, run: Run, kind: str) -> None:
    source = grow("photos", CLASSES)
    (source / "River" / "bad.jpg").write_bytes(bad(kind, encode))
    status, stdout, stderr = run(source)
    assert (status, stdout) == (2, "")
    assert "1 of 55 files" in stderr
    assert f"River/bad.jpg: {BAD[kind]}" in stderr.replace("it does", "does").replace("the file is empty (", "")
    assert left(tmp_path) == []
    status, stdout, stderr = run(source, "--skip-bad")
    assert status == 0
    assert stdout.splitlines()[-1].startswith("54 images")
    assert "warning: 1 of 55" in stderr
    skipped = manifest(tmp_path / "out")["skipped"]
    assert isinstance(skipped, list)
    assert [entry["file"] for entry in skipped] == ["River/bad.jpg"]


def test_a_file_that_is_no_image_is_refused_by_name(grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    (source / "Forest" / "notes.txt").write_text("trees")
    assert "Forest/notes.txt: not a readable" in run(source)[2]


def test_bad_files_are_counted_and_named_by_their_reasons(grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", CLASSES)
    for number in range(53):
        (source / "River" / f"bad{number:02}.jpg").write_bytes(b"")
    for number in range(2):
        (source / "Forest" / f"grey{number}.png").write_bytes(encode(number, kind="PNG", mode="L"))
    lines = run(source)[2].splitlines()
    assert lines[0].endswith("55 of 109 files of " + str(source) + " cannot be used (--skip-bad leaves them out):")
    assert lines[1].strip().startswith("53 files: the file is empty (0 bytes): River/bad00.jpg, River/bad01.jpg, ")
    assert lines[1].endswith("River/bad49.jpg, … and 3 more")
    assert lines[2].strip().endswith("(prepare --convert makes it so): Forest/grey0.png, Forest/grey1.png")
    assert len(lines) == 3


def test_links_that_lead_nowhere_and_pipes_are_bad_files(grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    (source / "River" / "link.jpg").symlink_to("nowhere.jpg")
    (source / "River" / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(source / "River" / "pipe.jpg")
    stderr = run(source)[2]
    assert "link.jpg: cannot be read (No such file" in stderr
    assert "self.jpg: cannot be read (Too many levels of symbolic links)" in stderr
    assert "pipe.jpg: not a regular file" in stderr


def test_resize_makes_pngs_and_leaves_the_rest_alone(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", CLASSES)
    (source / "River" / "large.jpg").write_bytes(encode(1, (200, 100)))
    (source / "River" / "small.jpg").write_bytes(encode(2, (63, 64)))
    status, _, said = run(source, "--resize")
    squeezed = "the largest from 200x100; squeezed, for they are no squares: 2"
    assert (status, said) == (0, f"note: resized 2 images of {source} to 64x64, {squeezed}\n")
    resized = list((tmp_path / "out").rglob("*.png"))
    assert sorted(path.name for path in resized) == ["large.png", "small.png"]
    assert all(decode(path.read_bytes()).size == (64, 64) for path in resized)
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 54
    (source / "River" / "large.png").write_bytes(encode(3, kind="PNG"))
    assert "River/large." in run(source, "--resize", out="out2")[2]


def test_another_image_size(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", {"A": 3, "B": 3}, size=(32, 32))
    assert "32x32 pixels; 64x64 is wanted" in run(source)[2]
    assert run(source, "--image-size", 32)[0] == 0
    assert open_tree(tmp_path / "out").image_size == 32


# --- sources that are refused


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, "has no images (JPEG, PNG, TIFF, WebP, BMP)"),
        ({"Forest": 5}, "one class only, Forest"),
        ({"Forest": 5, "River": 2}, "class River has 2 usable images"),
        ({"Forest": 5, "River": 0}, "class River has 0 usable images"),
        ({"train/A": 3, "train/B": 3, "test/A": 3, "test/B": 3}, "not all of train/, valid/ and test/"),
        ({"train/A": 3, "train/B": 3}, "not all of train/, valid/ and test/"),
        (
            {"train/A": 3, "train/B": 3, "valid/A": 3, "valid/B": 3, "test/A": 3},
            "class B has no images in test/",
        ),
        (
            {"train/A": 3, "train/B": 3, "valid/A": 3, "valid/B": 3, "valid/C": 1, "test/A": 3, "test/B": 3},
            "class C has no images in train/",
        ),
        ({"x/y/A": 3, "z/y/B": 3}, "in several folders, x/y/, z/y/: say which is meant with --inside x/y"),
    ],
)
def test_trees_that_cannot_be_used(tmp_path: Path, grow: Grow, run: Run, counts: dict[str, int], said: str) -> None:
    (tmp_path / "photos").mkdir()
    status, _, stderr = run(grow("photos", counts))
    assert status == 2
    assert said in stderr
    assert stderr.startswith("error: ")
    assert left(tmp_path) == []


def test_ratios_that_leave_nothing_to_train(grow: Grow, run: Run) -> None:
    assert "leave none of them to train" in run(grow("photos", {"A": 3, "B": 3}), "--ratios", "1,50,49")[2]


def test_images_beside_the_class_folders(grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", CLASSES)
    (source / "lost.jpg").write_bytes(encode(1))
    assert "lost.jpg lies outside the class folders" in run(source)[2]


@pytest.mark.parametrize("name", ["new\nline.jpg", "line\u2028end.jpg", "back\\slash.jpg", b"latin-\xe9.jpg"])
def test_names_that_a_checksum_file_cannot_hold(grow: Grow, encode: Encode, run: Run, name: str | bytes) -> None:
    source = grow("photos", CLASSES)
    (source / "River" / os.fsdecode(name)).write_bytes(encode(1))
    said = run(source)[2]
    assert "unusable file name" in said
    assert said.endswith(": rename it\n")


def test_names_with_spaces_and_joiners_of_other_systems(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    """macOS names a screenshot with a narrow space that does not break; emoji are joined by a character of no width."""
    source = grow("photos", CLASSES)
    for n, name in enumerate(("at 10.00.00\u202fAM.jpg", "no\u00a0break.jpg", "\U0001f468\u200d\U0001f33e.jpg")):
        (source / "River" / name).write_bytes(encode(n))
    assert run(source)[0] == 0
    assert main(["--verify", str(tmp_path / "out")]) == 0


def test_a_source_that_is_not_there(run: Run) -> None:
    status, _, stderr = run("nowhere.zip")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "nowhere.zip" in stderr


def test_unsafe_zips(tmp_path: Path, grow: Grow, run: Run, encode: Encode) -> None:
    image, bomb = encode(1), bytes(20 << 20)
    link = zipfile.ZipInfo("River/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members: list[tuple[str | zipfile.ZipInfo, bytes, int, str]] = [
        ("/etc/Forest/x.jpg", image, zipfile.ZIP_STORED, "absolute path"),
        ("C:/Forest/x.jpg", image, zipfile.ZIP_STORED, "absolute path"),
        ("Forest/../../x.jpg", image, zipfile.ZIP_STORED, "`..`"),
        (link, b"/etc/passwd", zipfile.ZIP_STORED, "link"),
        ("River/River_1.jpg", image, zipfile.ZIP_STORED, "is there twice"),
        ("River/bomb.png", bomb, zipfile.ZIP_DEFLATED, " times; 200 is the most"),
        ("River/bomb.png", bytes(65 << 20), zipfile.ZIP_DEFLATED, "68,157,440 bytes"),
        ("River/x.jpg", image, zipfile.ZIP_BZIP2, "is compressed by bzip2, not Deflate"),
    ]
    source = grow("photos", CLASSES)
    for name, data, method, said in members:
        archive = zipped(tmp_path / "photos.zip", source)
        with zipfile.ZipFile(archive, "a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the duplicate name
            file.writestr(name, data, method)
        status, _, stderr = run(archive)
        assert (status, said in stderr) == (2, True), (name, stderr)
        assert left(tmp_path) == []


@pytest.fixture
def lying(tmp_path: Path, grow: Grow) -> Path:
    return zipped(tmp_path / "photos.zip", grow("photos", CLASSES))


def test_a_zip_that_is_a_bomb_in_all(tmp_path: Path, run: Run) -> None:
    """No member of it is suspect alone."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(40):
            archive.writestr(f"{'AB'[number % 2]}/{number}.jpg", bytes(1_000_000))
    status, _, said = run(tmp_path / "bomb.zip")
    assert status == 2
    assert "bytes would become 40,000,000" in said
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (8, b"\x01", "River/River_1.jpg' is encrypted"),
        (24, struct.pack("<I", 100), "River/River_1.jpg: does not unpack"),
        (24, struct.pack("<I", 1_000_000), "River/River_1.jpg: unpacks to another size"),
        (16, b"\0\0\0\0", "River/River_1.jpg: does not unpack (Bad CRC-32"),
    ],
)
def test_zips_that_lie(lying: Path, run: Run, offset: int, value: bytes, said: str) -> None:
    """offset: from the start of a member's entry in the central directory, where the value is put."""
    data = bytearray(lying.read_bytes())
    start = data.rindex(b"River/River_1.jpg") - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    data[start + offset : start + offset + len(value)] = value
    lying.write_bytes(data)
    status, _, stderr = run(lying)
    assert (status, said in stderr) == (2, True), stderr


def test_truncated_and_damaged_zips_fail_in_words(tmp_path: Path, grow: Grow, run: Run) -> None:
    whole = zipped(tmp_path / "photos.zip", grow("photos", {"A": 4, "B": 4})).read_bytes()
    archive = tmp_path / "damaged.zip"
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        archive.write_bytes(whole[:length])
        status, _, stderr = run(archive)
        assert (status, stderr.count("\n")) == (2, 1)
        assert "not a whole zip file" in stderr
    draw = random.Random(0)
    for _ in range(100):  # any byte may be wrong, the central directory's at the end above all
        data = bytearray(whole)
        for _ in range(3):
            data[-draw.randrange(1, 1500)] = draw.randrange(256)
        archive.write_bytes(data)
        assert run(archive)[0] in (0, 2)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# --- all or nothing


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "hvd_eurosat.prepare", *map(str, arguments)]
    return subprocess.run(words, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, **options)


SLOW = """
import time, hvd_eurosat.prepare as verb, hvd_eurosat.data.copying as copying
decode = copying.decode_any
copying.decode_any = lambda *arguments: (time.sleep(0.02), decode(*arguments))[1]
raise SystemExit(verb.main())
"""


@pytest.fixture
def slow(tmp_path: Path, grow: Grow) -> Iterator[subprocess.Popen[str]]:
    """`prepare` on its slow way from tmp_path/photos to tmp_path/out, with some images written."""
    source = grow("photos", {"A": 200, "B": 200})
    words = [sys.executable, "-c", SLOW, "--source", str(source), "--out", str(tmp_path / "out")]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests run in the background
    with subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/.unsplit/*/*.jpg")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        yield process
        process.kill()


def test_killed_half_way_nothing_looks_finished(tmp_path: Path, slow: subprocess.Popen[str], run: Run) -> None:
    slow.kill()
    slow.wait()
    assert not (tmp_path / "out").exists()
    assert len(left(tmp_path)) == 1
    status, _, stderr = run(tmp_path / "photos")
    assert status == 0, stderr
    assert left(tmp_path) == ["out"]


def test_interrupted_it_leaves_nothing(tmp_path: Path, slow: subprocess.Popen[str]) -> None:
    slow.send_signal(signal.SIGINT)
    _, stderr = slow.communicate(timeout=30)
    assert slow.returncode == 130
    assert "Traceback" not in stderr
    assert left(tmp_path) == []


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path, slow: subprocess.Popen[str], run: Run) -> None:
    status, _, stderr = run(tmp_path / "photos")
    assert status == 2
    assert "another prepare is writing" in stderr
    assert slow.poll() is None
    assert len(left(tmp_path)) == 1


def test_an_out_that_is_taken_is_left_alone(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    (tmp_path / "out").mkdir()
    assert run(source)[0] == 0  # an empty folder may be replaced
    before = (tmp_path / "out" / "manifest.json").stat()
    status, _, stderr = run(source)
    assert status == 2
    assert f"{tmp_path / 'out'} exists and is not empty" in stderr
    assert (tmp_path / "out" / "manifest.json").stat() == before
    (tmp_path / "out2").write_text("a file")
    assert run(source, out="out2")[0] == 2


def test_a_place_that_cannot_be_written(grow: Grow) -> None:
    for place in ("/sys/out", "/dev/null/out"):
        done = command("--source", grow(place[1:4], CLASSES), "--out", place)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"error: cannot write {place}: " in done.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, grow: Grow) -> None:
    arguments = ("--source", grow("photos", CLASSES), "--out", tmp_path / "deep" / "er" / "out")
    done = command(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "error: no room for" in done.stderr
    assert not (tmp_path / "deep").exists()


# --- verify and usage


def test_verify_names_what_is_not_as_it_was(tmp_path: Path, grow: Grow, run: Run, capsys: Capture) -> None:
    run(grow("photos", CLASSES))
    out = tmp_path / "out"
    tree = open_tree(out)
    packed = pack(tree, "train", 64, None)
    assert main(["--verify", str(out)]) == 0
    assert "all 54 files and 1 packed arrays" in capsys.readouterr().out
    changed, missing, *_ = tree.files("train")
    with (out / changed).open("ab") as file:
        file.write(b"!")
    (out / missing).unlink()
    (out / "train" / "Forest" / "extra.jpg").write_bytes(b"")
    with packed.open("r+b") as file:
        file.seek(1000)
        file.write(b"!!!")
    assert main(["--verify", str(out)]) == 1
    stderr = capsys.readouterr().err
    for flaw in (
        f"{changed}: changed",
        f"{missing}: missing",
        "Forest/extra.jpg: extra",
        f"{packed} is damaged",
    ):
        assert flaw in stderr
    assert len(stderr.splitlines()) == 5


def test_verify_of_damaged_records(tmp_path: Path, grow: Grow, run: Run, capsys: Capture) -> None:
    source = grow("photos", CLASSES)
    assert main(["--verify", str(source)]) == 2
    run(source)
    out = tmp_path / "out"
    text = (out / "files.sha256").read_text()
    (out / "files.sha256").write_text(text.replace("a", "b", 1))
    assert main(["--verify", str(out)]) == 1
    assert "files.sha256 does not fit manifest.json" in capsys.readouterr().err
    for damaged in ("", "{", "[]", '{"format": 2}', "{}"):
        (out / "manifest.json").write_text(damaged)
        assert main(["--verify", str(out)]) == 1
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1
        assert "manifest.json is damaged" in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--source", "sample"],
        ["--source", "sample", "--out", "x", "--ratios", "1,2"],
        ["--source", "sample", "--out", "x", "--ratios", "94,5,0"],
        ["--source", "sample", "--out", "x", "--ratios", "94,5,nan"],
        ["--source", "sample", "--out", "x", "--seed", "-1"],
        ["--source", "sample", "--out", "x", "--image-size", "0"],
        ["--source", "sample", "--out", "x", "--image-size", "many"],
    ],
)
def test_bad_usage(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


# --- trees that were not made by prepare


def test_a_tree_that_the_user_unzipped(grow: Grow) -> None:
    root = grow("data", {f"{split}/{label}": n for split, n in zip(SPLITS, (4, 2, 1), strict=True) for label in "BA"})
    tree = open_tree(root)
    assert (tree.classes, tree.image_size, tree.synthetic) == (("A", "B"), 64, False)
    assert tree.files("valid") == ["valid/A/A_1.jpg", "valid/A/A_2.jpg", "valid/B/B_1.jpg", "valid/B/B_2.jpg"]
    assert tree.labels("valid").tolist() == [0, 0, 1, 1]
    assert open_tree(root).digest == tree.digest
    os.utime(root / "test" / "A" / "A_1.jpg", (1, 1))
    assert open_tree(root).digest != tree.digest


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (None, "no data at"),
        ({}, "has no images"),
        ({"A": 3, "B": 3}, "split it with python -m hvd_eurosat.prepare --source"),
        ({"train/A": 3, "train/B": 3, "test/A": 1, "test/B": 1}, "not all of train/, valid/ and test/"),
        ({"train/A": 0, "valid/A": 0, "test/A": 0}, "has no images"),
        ({"train/A": 3, "valid/A": 3, "test/A": 3}, "one class only, A"),
        (
            {"train/A": 3, "train/B": 3, "valid/A": 3, "test/A": 3, "test/B": 1},
            "class B has no images in valid/",
        ),
        ({"train/A": 3, "valid/A": 3, "valid/B": 3, "test/A": 3}, "class B has no images in train/"),
    ],
)
def test_trees_that_do_not_open(tmp_path: Path, grow: Grow, counts: dict[str, int] | None, said: str) -> None:
    if counts == {}:
        (tmp_path / "data").mkdir()
    root = tmp_path / "data" if counts is None else grow("data", counts)
    with pytest.raises(UserError, match=re.escape(said)):
        open_tree(root)


def test_an_archive_in_place_of_a_tree(tmp_path: Path, grow: Grow) -> None:
    archive = zipped(tmp_path / "photos.zip", grow("photos", CLASSES))
    said = f"{archive} is a file: make a folder of what is in it with python -m hvd_eurosat.prepare --source {archive} "
    with pytest.raises(UserError, match=re.escape(said)):
        open_tree(archive)
    with pytest.raises(UserError, match="is a file: give a folder"):
        list_folder(archive)
