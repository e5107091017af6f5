"""Archives as people make them: names in every spelling, every method, zips and tars, and what to do with the rest."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_eurosat.data import sources
from tests.unit.conftest import Encode, Grow, Run, left, manifest, zipped

CLASSES = {"Forêt": 4, "Mer": 4}
Members = Callable[..., dict[bytes, bytes]]


def bare_zip(
    path: Path, members: dict[bytes, bytes], flags: int = 0, method: int = 0, extra: bytes = b"", disk: int = 0
) -> Path:
    """A zip of stored members, byte by byte, for zipfile writes no such names, flags and methods."""
    body, directory = io.BytesIO(), io.BytesIO()
    for name, content in members.items():
        field = extra.replace(b"CRC", struct.pack("<I", zlib.crc32(name)))
        common = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, zlib.crc32(content), len(content), len(content),
                             len(name), len(field))  # fmt: skip
        directory.write(
            b"PK\1\2" + b"\x14\0" + common + struct.pack("<HHHII", 0, disk, 0, 0, body.tell()) + name + field
        )
        body.write(b"PK\3\4" + common + name + field + content)
    start, size, count = body.tell(), directory.tell(), len(members)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)
    path.write_bytes(body.getvalue() + directory.getvalue() + end)
    return path


@pytest.fixture
def members(encode: Encode) -> Members:
    """members(encoding): eight images of two classes by their names' bytes."""

    def made(encoding: str, form: str = "NFC", separator: str = "/") -> dict[bytes, bytes]:
        names = [f"Top{separator}{label}{separator}{n}.jpg" for label in CLASSES for n in range(4)]
        return {unicodedata.normalize(form, name).encode(encoding): encode(n) for n, name in enumerate(names)}

    return made


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("flags", [0, 1 << 11])
def test_names_in_utf8_with_and_without_the_flag(
    tmp_path: Path, members: Members, run: Run, form: str, flags: int
) -> None:
    archive = bare_zip(tmp_path / "mac.zip", members("utf-8", form), flags)
    status, _, said = run(archive)
    assert (status, said) == (0, "")
    assert manifest(tmp_path / "out")["classes"] == ["Forêt", "Mer"]
    assert (tmp_path / "out" / "train" / "Forêt").is_dir()


def test_names_in_another_encoding_are_not_guessed(tmp_path: Path, members: Members, run: Run) -> None:
    archive = bare_zip(tmp_path / "dos.zip", members("cp850"))
    status, _, said = run(archive)
    assert (status, said.count("\n"), "unsafe" in said, "not safe" in said) == (2, 1, False, False)
    assert "dos.zip does not say how the name" in said
    assert "unzip -O" in said


def test_names_of_info_zip(tmp_path: Path, encode: Encode) -> None:
    """The name in UTF-8 stands in an extra field, if it is of that name."""
    text = b"Top/For\xc3\xaat/0.jpg"
    extra = struct.pack("<HHB", 0x7075, 5 + len(text), 1) + b"CRC" + text
    named = {"Top/Forêt/0.jpg".encode("cp850"): encode(0)}
    archive = bare_zip(tmp_path / "info.zip", named, extra=extra)
    with zipfile.ZipFile(archive) as opened:
        assert sources._name(opened.infolist()[0], archive) == "Top/Forêt/0.jpg"


def test_backslashes_are_folders(tmp_path: Path, members: Members, run: Run) -> None:
    assert run(bare_zip(tmp_path / "windows.zip", members("utf-8", separator="\\")))[0] == 0
    assert manifest(tmp_path / "out")["classes"] == ["Forêt", "Mer"]
    climbing = bare_zip(tmp_path / "climbing.zip", {b"Forest\\..\\..\\x.jpg": b""})
    assert "climbing.zip is not safe to unpack" in run(climbing, out="out2")[2]


def test_folders_of_no_name_are_odd_and_not_unsafe(tmp_path: Path, members: Members, run: Run) -> None:
    names = {b"./" + name.replace(b"/", b"/.//"): content for name, content in members("utf-8").items()}
    assert run(bare_zip(tmp_path / "odd.zip", {b"./": b"", **names}))[0] == 0
    assert manifest(tmp_path / "out")["classes"] == ["Forêt", "Mer"]


@pytest.mark.parametrize(
    ("flags", "method", "said"),
    [
        (0, 9, "is compressed by Deflate64, not Deflate: unpack it and give the folder"),
        (0, 12, "is compressed by bzip2"),
        (0, 14, "is compressed by LZMA"),
        (0, 93, "is compressed by Zstandard"),
        (0, 77, "is compressed by method 77"),
        (1, 0, "is encrypted: unpack it with its password"),
        (1, 99, "is encrypted with AES"),
    ],
)
def test_methods_that_are_not_read(
    tmp_path: Path, members: Members, run: Run, flags: int, method: int, said: str
) -> None:
    status, _, stderr = run(bare_zip(tmp_path / "odd.zip", members("utf-8"), flags, method))
    assert (status, stderr.count("\n"), said in stderr, "safe" in stderr) == (2, 1, True, False), stderr
    assert left(tmp_path) == []


def test_zip64(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", CLASSES)
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        for file in source.rglob("*.jpg"):
            with archive.open(file.relative_to(source).as_posix(), "w", force_zip64=True) as member:
                member.write(file.read_bytes())
    assert run(tmp_path / "large.zip")[0] == 0


def test_parts_of_a_zip_are_to_be_joined(tmp_path: Path, members: Members, run: Run) -> None:
    last = bare_zip(tmp_path / "photos.zip", members("utf-8"), disk=1)
    assert "photos.zip is one part of a zip of several: join them with `zip -s 0" in run(last)[2]
    last.write_bytes(last.read_bytes()[1000:])  # what it says of its beginning lies in the first part
    (tmp_path / "photos.z01").write_bytes(b"")
    assert "join them with `zip -s 0" in run(last)[2]
    (tmp_path / "photos.zip.001").write_bytes(b"PK\3\4")
    assert "photos.zip.001 is one part of photos.zip: join the parts with `cat" in run(tmp_path / "photos.zip.001")[2]


def test_an_archive_in_an_archive_or_a_folder_is_named(tmp_path: Path, grow: Grow, run: Run) -> None:
    inner = zipped(tmp_path / "inner.zip", grow("photos", CLASSES))
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(inner, "data/inner.zip")
    said = run(tmp_path / "outer.zip")[2]
    assert "outer.zip has no images but data/inner.zip: unpack that and give what was in it" in said
    (tmp_path / "downloads").mkdir()
    inner.rename(tmp_path / "downloads" / "inner.zip")
    assert "downloads has no images but inner.zip" in run(tmp_path / "downloads")[2]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07\1\0", "RAR"), (b"\xfd7zXZ\0", "compressed by xz")],
)
def test_other_archives_are_named(tmp_path: Path, run: Run, content: bytes, kind: str) -> None:
    (tmp_path / "data.zip").write_bytes(content + bytes(1000))
    status, _, said = run(tmp_path / "data.zip")
    assert (status, kind in said, "unpack it" in said) == (2, True, True)


def tarred(path: Path, source: Path, top: str, mode: Any) -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(source, top)
    return path


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2")])
@pytest.mark.parametrize("top", [".", "data/photos"])
def test_tars(tmp_path: Path, grow: Grow, run: Run, ending: str, mode: str, top: str) -> None:
    source = grow("photos", CLASSES)
    assert run(source, out="expected")[0] == 0
    status, _, said = run(tarred(tmp_path / f"photos.{ending}", source, top, mode))
    assert (status, said) == (0, "")
    assert manifest(tmp_path / "out")["digest"] == manifest(tmp_path / "expected")["digest"]
    assert manifest(tmp_path / "out")["name"] == "photos"


def test_bad_tars(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", CLASSES)
    whole = tarred(tmp_path / "whole.tgz", source, "photos", "w:gz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    assert "cut.tgz is not a whole tar file" in run(tmp_path / "cut.tgz")[2]

    def made(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"") -> str:
        with tarfile.open(tmp_path / "bad.tar", "w") as archive:
            archive.add(source, "photos")
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", len(content)
            archive.addfile(member, io.BytesIO(content))
        status, _, said = run(tmp_path / "bad.tar")
        assert (status, said.count("\n")) == (2, 1)
        return said

    assert "not safe to unpack" in made("../x.jpg")
    assert "not safe to unpack" in made("/etc/x.jpg")
    assert "not safe to unpack" in made("photos/Mer/x.jpg", content=bytes(65 << 20))
    assert "is a link or a special file: pack it with `tar -h`" in made("photos/Mer/x.jpg", tarfile.SYMTYPE)
    assert "is a link or a special file" in made("photos/Mer/x.jpg", tarfile.FIFOTYPE)
    assert "is there twice" in made("photos/Mer/Mer_1.jpg", content=encode(1))
    assert left(tmp_path) == []


def test_hard_links_in_a_tar_are_files(tmp_path: Path, grow: Grow, run: Run) -> None:
    """tar writes the second name of a file as a link to the first."""
    source = grow("photos", CLASSES)
    os.link(source / "Mer" / "Mer_1.jpg", source / "Mer" / "Mer_0.jpg")
    archive = tarred(tmp_path / "photos.tar", source, ".", "w")
    with tarfile.open(archive) as file:
        assert any(member.islnk() for member in file)
    assert run(source, out="expected")[0] == run(archive)[0] == 0
    assert manifest(tmp_path / "out")["digest"] == manifest(tmp_path / "expected")["digest"]


def test_a_tar_that_grows_without_measure(tmp_path: Path, run: Run) -> None:
    with tarfile.open(tmp_path / "bomb.tgz", "w:gz") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{'AB'[number % 2]}/{number}.jpg")
            member.size = 5_000_000
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    assert "not safe to unpack" in run(tmp_path / "bomb.tgz")[2]


def test_one_folder_of_several_is_picked(tmp_path: Path, grow: Grow, run: Run) -> None:
    """As the error says."""
    grow("all", {f"{top}/{label}": 4 for top in ("rgb", "ms") for label in CLASSES})
    as_zip, as_tar = zipped(tmp_path / "all.zip", tmp_path / "all"), tmp_path / "all.tar"
    tarred(as_tar, tmp_path / "all", "all", "w")
    for archive, top in ((tmp_path / "all", ""), (as_zip, ""), (as_tar, "all/")):
        out = f"out-{archive.suffix}"
        assert (
            f"has class folders in several folders, {top}ms/, {top}rgb/: say which is meant" in run(archive, out=out)[2]
        )
        assert run(archive, "--inside", f"{top}ms", out=out)[0] == 0
    assert "has no files in nothing/" in run(tmp_path / "all", "--inside", "nothing", out="other")[2]


def test_links_in_a_zip(tmp_path: Path, grow: Grow, run: Run) -> None:
    archive = zipped(tmp_path / "photos.zip", grow("photos", CLASSES))
    link = zipfile.ZipInfo("Mer/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, b"Mer_1.jpg")
    said = run(archive)[2]
    assert "'Mer/link.jpg' is a link or a special file: pack what it leads to" in said
    assert "safe" not in said
