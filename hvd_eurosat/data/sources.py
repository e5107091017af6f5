"""Where images come from: a zip, a class-folder tree, the synthetic sample, or the network."""

import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PureWindowsPath

from hvd_eurosat.data.images import BadImageError
from hvd_eurosat.data.sample import draw_scene, generate
from hvd_eurosat.data.tree import ignored
from hvd_eurosat.errors import RunError, UserError

MAX_BYTES = 64 << 20  # of one image file
MAX_RATIO = 200  # bytes that one compressed byte of a zip may become ...
MIN_SUSPECT = 1 << 20  # ... in members over this size: small flat images compress better than that
MAX_DEPTH = 4  # top folder / split / class / image
SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
WHERE = "get EuroSAT_RGB.zip from https://zenodo.org/records/7711810 and give it with --source EuroSAT_RGB.zip"


@dataclass(frozen=True)
class Item:
    """One file: its path in the source, the split it is already in (or None), its class and its own name."""

    path: str
    split: str | None
    label: str
    name: str


@dataclass(frozen=True)
class Layout:
    """items: the files that should be images. classes: all class folders seen, sorted, empty ones too.

    split: whether the items are split already.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    split: bool


@dataclass(frozen=True)
class Source:
    """read: the bytes of the file at an item's path, from any thread. It raises BadImageError.

    extras: other files that come with it, by name.
    """

    name: str
    synthetic: bool
    layout: Layout
    read: Callable[[str], bytes]
    extras: Mapping[str, bytes] = field(default_factory=dict)


@contextmanager
def open_source(spec: str, seed: int) -> Iterator[Source]:
    """The source that spec names: "sample" (drawn with seed), "download", a zip file or a folder.

    Raises UserError for what is not there, not safe or not laid out in class folders, RunError for a failed download.
    """
    path = Path(spec)
    if spec == "sample":
        yield _sample(seed)
    elif spec == "download":
        with tempfile.TemporaryDirectory(prefix="eurosat-") as folder:
            yield _folder(_download(Path(folder)), "EuroSAT_RGB")
    elif _is_folder(path):
        yield _folder(path, path.resolve().name)
    else:
        with _open_zip(path) as archive:
            yield _zip(archive, path)


def lay_out(paths: Collection[str], where: str) -> Layout:
    """The class folders and images among a tree's paths ("Forest/1.jpg"; a folder's own ends in "/").

    The classes may lie below one top folder of any name, and below train/, valid/ (or val/) and test/.
    Raises UserError, which names the path, for what fits no such tree.
    """
    parted = [(path, parts) for path in paths if not any(map(ignored, parts := path.split("/")))]
    tops = {parts[0] for _, parts in parted if len(parts) > 1}
    depth = max((len(parts) for _, parts in parted), default=0)
    top = 1 if len(tops) == 1 and depth > 2 and not tops & SPLIT_FOLDERS.keys() else 0
    inner = {parts[top] for _, parts in parted if len(parts) > top + 1}
    presplit = inner <= SPLIT_FOLDERS.keys() and bool(inner)
    if presplit and {SPLIT_FOLDERS[name] for name in inner} != {"train", "valid", "test"}:
        raise UserError(f"{where} has {', '.join(sorted(inner))} but not all of train/, valid/ and test/")
    items: list[Item] = []
    classes: set[str] = set()
    for path, parts in parted:
        _check_name(path)
        below = parts[top + presplit :]
        if len(below) > 2:
            raise UserError(f"{where}: {path} lies deeper than a class folder")
        if len(below) == 2:
            split = SPLIT_FOLDERS[parts[top]] if presplit else None
            label, name = below
            classes.add(label)
            if name:
                items.append(Item(path, split, label, name))
        elif path.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(f"{where}: {path} lies outside the class folders")
    if not items:
        raise UserError(f"{where} has no images in class folders")
    if len(classes) < 2:
        raise UserError(f"{where} has one class only, {', '.join(classes)}: there is nothing to tell apart")
    return Layout(tuple(items), tuple(sorted(classes)), presplit)


def _is_folder(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        kinds = "it is a zip file, a folder, `sample` or `download`"
        raise UserError(f"cannot read --source {path} ({error.strerror}): {kinds}") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISDIR(mode)
    raise UserError(f"--source {path} is neither a zip file nor a folder")


def _check_name(path: str) -> None:
    if not path.isprintable() or "\\" in path:
        raise UserError(f"unusable file name {path!r}: it has control characters, backslashes or no valid encoding")


def _sample(seed: int) -> Source:
    files = dict(generate(seed=seed))
    return Source("sample", True, lay_out(files, "the sample"), files.__getitem__, draw_scene(seed))


def _folder(root: Path, name: str) -> Source:
    def read(path: str) -> bytes:
        try:
            status = (root / path).stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a regular file")
            if status.st_size > MAX_BYTES:
                raise BadImageError(f"{status.st_size:,} bytes; {MAX_BYTES:,} is the most")
            return (root / path).read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read ({error.strerror})") from None

    return Source(name, False, lay_out(list(_walk(root)), str(root)), read)


def _walk(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        below = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not ignored(name)]
        yield from (f"{(below / name).as_posix()}/" for name in folders)
        yield from ((below / name).as_posix() for name in files)
        if len(below.parts) >= MAX_DEPTH:
            folders.clear()


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


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
        raise UserError(f"{path} is not a whole zip file ({error}): was its download cut short?") from None


def _zip(archive: zipfile.ZipFile, path: Path) -> Source:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        flaw = "is there twice" if member.filename in members else _flaw(member)
        if flaw:
            raise UserError(f"{path} is not safe to unpack: {member.filename!r} {flaw}")
        members[member.filename] = member
    total, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if total > max(MIN_SUSPECT, MAX_RATIO * packed):  # members may lie over one another
        raise UserError(f"{path} is not safe to unpack: its {packed:,} bytes would become {total:,}")

    def read(name: str) -> bytes:
        member = members[name]
        try:
            with archive.open(member) as file:
                data = file.read(member.file_size + 1)
        except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
            raise BadImageError(f"does not unpack ({error})") from None
        if len(data) != member.file_size:
            raise BadImageError(f"unpacks to another size than its {member.file_size:,} bytes")
        return data

    return Source(path.stem, False, lay_out(members, str(path)), read)


def _flaw(member: zipfile.ZipInfo) -> str:
    """What makes a zip's member unsafe, or nothing."""
    name, size, packed = member.filename, member.file_size, max(1, member.compress_size)
    folders = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(member.external_attr >> 16)
    flaws = {
        "is an absolute path": name.startswith("/") or bool(PureWindowsPath(name).drive),
        "has `..`, `.` or nothing for a folder": not {"", ".", ".."}.isdisjoint(folders),
        "is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "is encrypted": bool(member.flag_bits & 1),
        # The other methods may take any amount of memory for one step.
        "is not compressed by deflate": member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        f"would unpack to {size:,} bytes; {MAX_BYTES:,} is the most": size > MAX_BYTES,
        f"would grow {size // packed:,} times; {MAX_RATIO} is the most": size > max(MIN_SUSPECT, MAX_RATIO * packed),
    }
    return next((flaw for flaw, found in flaws.items() if found), "")
