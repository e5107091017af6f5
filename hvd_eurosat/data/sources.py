"""Where images come from: a zip, a tar, a class-folder tree, the synthetic sample, or the network."""

import bz2
import errno
import gzip
import io
import os
import re
import stat
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from rich.console import Console

from hvd_eurosat.data.images import MAX_BYTES, BadImageError, read_file
from hvd_eurosat.data.layout import Layout, lay_out
from hvd_eurosat.data.listing import Listing, list_folder, list_names
from hvd_eurosat.data.sample import draw_scene, generate
from hvd_eurosat.errors import RunError, UserError

MAX_RATIO = 200  # bytes that one compressed byte of an archive may become ...
MIN_SUSPECT = 1 << 20  # ... in members over this size: small flat images compress better than that
GENERATED, FETCHED = "sample", "download"
WHERE = "get EuroSAT_RGB.zip from https://zenodo.org/records/7711810 and give it with --source EuroSAT_RGB.zip"
UNPACK = "unpack it and give the folder"
# APPNOTE.TXT 6.3.10, section 4.4.5. Of these only stored and deflated members are read: the others may take any amount
# of memory for one step, or Python cannot read them.
METHODS = {
    1: "Shrink", 6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd",
}  # fmt: skip
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED, UTF8, AES = 1, 1 << 11, 99  # bits of a member's flags, and a method
UNICODE_PATH = 0x7075  # Info-ZIP's extra field: version, CRC-32 of the name, the name in UTF-8
OTHER_ARCHIVES = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
}


@dataclass(frozen=True)
class Source:
    """read: the bytes of the file at an item's path, from any thread. It raises BadImageError.

    extras: other files that come with it, by name. locate: the file at an item's path, where that stays.
    """

    name: str
    synthetic: bool
    layout: Layout
    read: Callable[[str], bytes]
    extras: Mapping[str, bytes] = field(default_factory=dict)
    locate: Callable[[str], Path] | None = None


@contextmanager
def open_source(spec: str, seed: int, inside: str = "") -> Iterator[Source]:
    """The source that spec names: "sample" (drawn with seed), "download", a zip, a tar or a folder.

    inside: the folder in it that holds the data, "" for all. Raises UserError for what is not there, not safe or not
    laid out in class folders, RunError for a failed download.
    """
    path = Path(spec)
    if spec == GENERATED:
        files = dict(generate(seed=seed))
        source = _source("sample", list_names(files, "the sample", files.__getitem__), inside, files.__getitem__, True)
        yield replace(source, extras=draw_scene(seed))
    elif spec == FETCHED:
        with tempfile.TemporaryDirectory(prefix="eurosat-") as folder:
            yield replace(_folder(_download(Path(folder)), "EuroSAT_RGB", inside), locate=None)
    elif _is_folder(path):
        yield _folder(path, path.resolve().name, inside)
    else:
        with _open(path) as file:
            if _is_zip(file, path):
                yield _zip(file, path, inside)
            else:
                with _uncompressed(file, path) as tar:
                    yield _tar(tar, path, inside)


def stays(spec: str) -> bool:
    """Whether the files of what spec names stay where they are, as a folder's do. Raises UserError as open_source."""
    return spec not in (GENERATED, FETCHED) and _is_folder(Path(spec))


def _source(name: str, listing: Listing, inside: str, read: Callable[[str], bytes], synthetic: bool = False) -> Source:
    listing = listing.inside(inside) if inside else listing
    spelt = _spelt(listing)
    return Source(name, synthetic, lay_out(listing), lambda path: read(spelt.get(path, path)))


def _spelt(listing: Listing) -> dict[str, str]:
    """The source's own spelling of names where that is another, so that of a million names not all are kept twice."""
    return {name: own for name, own in listing.files.items() if name != own}


def _is_folder(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        kinds = "it is a zip, a tar, a folder, `sample` or `download`"
        raise UserError(f"cannot read --source {path} ({error.strerror}): {kinds}") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISDIR(mode)
    raise UserError(f"--source {path} is neither an archive nor a folder")


def _folder(root: Path, name: str, inside: str) -> Source:
    console = Console(stderr=True)
    with console.status(f"listing {root}") if console.is_terminal else nullcontext():
        listing = list_folder(root)
        listing = listing.inside(inside) if inside else listing
        spelt = _spelt(listing)
        layout = lay_out(listing)

    def locate(path: str) -> Path:
        return root / spelt.get(path, path)

    return Source(name, False, layout, lambda path: read_file(locate(path)), locate=locate)


def _download(folder: Path) -> Path:
    try:
        from torchvision.datasets import EuroSAT
    except ImportError:
        raise UserError(f"--source download needs torchvision; without it, {WHERE}") from None
    try:
        EuroSAT(str(folder), download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise RunError(f"cannot download EuroSAT ({error}): {WHERE}") from None
    return folder / "eurosat"


# --- archives


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        yield _own_place(file)


class _OwnPlace(io.RawIOBase):
    """An open file with a place of its own to read at: processes that are forked share that of the file itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place = file, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: os.fstat(self._file.fileno()).st_size}
        place = start[whence] + offset
        if place < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._file.fileno(), [buffer], self._place)
        self._place += count
        return count


def _own_place(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_OwnPlace(file))


def _is_zip(file: BinaryIO, path: Path) -> bool:
    """By the content. Raises UserError for another archive."""
    start = file.read(512)
    file.seek(0)
    other = next((kind for magic, kind in OTHER_ARCHIVES.items() if start.startswith(magic)), None)
    if other:
        raise UserError(f"{path} is {other}, which is not read: {UNPACK}")
    if re.fullmatch(r"\.0\d\d", path.suffix):
        whole = path.with_suffix("")
        raise UserError(f"{path} is one part of {whole.name}: join the parts with `cat {whole.name}.* > {whole.name}`")
    return not (start.startswith((b"\x1f\x8b", b"BZh")) or start[257:262] == b"ustar" or path.suffix == ".tar")


def _zip(file: BinaryIO, path: Path, inside: str) -> Source:
    archive = _open_zip(file, path)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = _name(member, path)
        if not name:
            continue
        flaw = _danger(name, member.file_size, member.compress_size)
        if flaw:
            raise UserError(f"{path} is not safe to unpack: {name!r} {flaw}")
        flaw = "is there twice" if name in members and not name.endswith("/") else _unread(member)
        if flaw:
            raise UserError(f"{path} cannot be used as it is: {name!r} {flaw}")
        members[name] = member
    _check_total(sum(member.file_size for member in archive.infolist()), path)

    def read(name: str) -> bytes:
        member = members[name]
        try:
            with archive.open(member) as opened:
                data = opened.read(member.file_size + 1)
        except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
            raise BadImageError(f"does not unpack ({error})") from None
        if len(data) != member.file_size:
            raise BadImageError(f"unpacks to another size than its {member.file_size:,} bytes")
        return data

    def peek(name: str) -> bytes:
        try:
            with archive.open(members[name]) as opened:
                return opened.read(12)
        except Exception:  # as above
            return b""

    return _source(path.stem, list_names(members, str(path), peek), inside, read)


def _open_zip(file: BinaryIO, path: Path) -> zipfile.ZipFile:
    parts = f"is one part of a zip of several: join them with `zip -s 0 {path} --out whole.zip`"
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
        if "multiple disks" in str(error) or path.with_suffix(".z01").exists():
            raise UserError(f"{path} {parts}") from None
        raise UserError(f"{path} is not a whole zip file ({error}): was its download cut short?") from None
    if any(member.volume for member in archive.infolist()):
        raise UserError(f"{path} {parts}")
    return archive


def _name(member: zipfile.ZipInfo, path: Path) -> str:
    """A member's name as it was meant: macOS writes UTF-8 without saying so, and some Windows programs backslashes."""
    name = member.filename
    if not member.flag_bits & UTF8 and not name.isascii():
        try:
            raw = member.orig_filename.encode("cp437")
            name = _unicode_path(member.extra, raw) or raw.decode()
        except ValueError:
            cure = "unpack it with its encoding, such as `unzip -O cp850` or -O gbk, and give the folder"
            raise UserError(f"{path} does not say how the name {name!r} is encoded: {cure}") from None
    return _plain(name.replace("\\", "/"))


def _plain(name: str) -> str:
    """Without folders that are `.` or nothing, which some programs write; "" for the archive's own folder."""
    plain = "/".join(part for part in name.split("/") if part not in ("", "."))
    return f"{'/' * name.startswith('/')}{plain}{'/' * name.endswith('/')}" if plain else ""


def _unicode_path(extra: bytes, raw: bytes) -> str:
    """The name in Info-ZIP's extra field, "" where there is none of this name."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and body[:1] == b"\1" and body[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return body[5:].decode()
    return ""


def _danger(name: str, size: int, packed: int) -> str:
    """What makes an archive's member unsafe, or nothing. packed: its compressed bytes."""
    flaws = {
        "is an absolute path": name.startswith("/") or bool(PureWindowsPath(name).drive),
        "has `..` for a folder": ".." in name.split("/"),
        f"would unpack to {size:,} bytes; {MAX_BYTES:,} is the most": size > MAX_BYTES,
        f"would grow {size // max(1, packed):,} times; {MAX_RATIO} is the most": (
            size > max(MIN_SUSPECT, MAX_RATIO * max(1, packed))
        ),
    }
    return next((flaw for flaw, found in flaws.items() if found), "")


def _unread(member: zipfile.ZipInfo) -> str:
    """What keeps a zip's member from being read, and what to do; or nothing."""
    kind, method = stat.S_IFMT(member.external_attr >> 16), member.compress_type
    if method == AES or member.flag_bits & ENCRYPTED:
        return f"is encrypted{' with AES' if method == AES else ''}: unpack it with its password and give the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file: pack what it leads to (zip follows links unless told -y)"
    if method not in READ_METHODS:
        return f"is compressed by {METHODS.get(method, f'method {method}')}, not Deflate: {UNPACK}"
    return ""


def _check_total(total: int, path: Path) -> None:
    """Raise UserError where an archive would grow beyond measure."""
    packed = path.stat().st_size
    if total > max(MIN_SUSPECT, MAX_RATIO * packed):  # members may lie over one another
        raise UserError(f"{path} is not safe to unpack: its {packed:,} bytes would become {total:,}")


@contextmanager
def _uncompressed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """A tar's own bytes; of a compressed one from a temporary file, for its members are read in any order."""
    start = file.read(3)
    file.seek(0)
    if start[:2] != b"\x1f\x8b" and start != b"BZh":
        yield file
        return
    packed = gzip.GzipFile(fileobj=file) if start[:2] == b"\x1f\x8b" else bz2.BZ2File(file)
    with tempfile.TemporaryFile(prefix="eurosat-") as whole:
        try:
            while piece := packed.read(1 << 20):
                whole.write(piece)
                _check_total(whole.tell(), path)
            whole.flush()
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:
                room = f"{tempfile.gettempdir()} (TMPDIR)"
                raise RunError(f"no room to unpack {path} in {room}: {error.strerror}") from None
            raise _not_whole(path, error) from None
        yield _own_place(whole)


def _tar(file: BinaryIO, path: Path, inside: str) -> Source:
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it is read as long as the file is open)
        every = archive.getmembers()
    except Exception as error:  # tarfile lets through whatever damaged bytes lead it to
        raise _not_whole(path, error) from None
    members: dict[str, tarfile.TarInfo] = {}
    for member in every:
        name = _plain(member.name)
        if not name:
            continue
        flaw = _danger(name, member.size, member.size)
        if flaw:
            raise UserError(f"{path} is not safe to unpack: {name!r} {flaw}")
        if member.islnk():  # a second name of a file that is in the archive, which tar writes unasked
            member = members.get(_plain(member.linkname), member)
        if not member.isfile() and not member.isdir():
            cure = "pack it with `tar -h`, which follows links"
            raise UserError(f"{path} cannot be used as it is: {name!r} is a link or a special file: {cure}")
        if name in members and member.isfile():
            raise UserError(f"{path} cannot be used as it is: {name!r} is there twice")
        members[f"{name}/" if member.isdir() else name] = member
    _check_total(sum(member.size for member in members.values()), path)
    lock = threading.Lock()  # the members share one file

    def read(name: str, size: int = -1) -> bytes:
        try:
            with lock:
                opened = archive.extractfile(members[name])
                return opened.read(size) if opened else b""
        except Exception as error:  # as above
            raise BadImageError(f"does not unpack ({error})") from None

    def peek(name: str) -> bytes:
        try:
            return read(name, 12)
        except BadImageError:
            return b""

    return _source(path.stem.removesuffix(".tar"), list_names(members, str(path), peek), inside, read)


def _not_whole(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a whole tar file ({error}): was its download cut short?")
