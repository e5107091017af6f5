"""The files of a tree, in a folder or an archive: their names, and what is litter among them.

Names are in Unicode's NFC and have forward slashes, however the source spells them.
"""

import os
import re
import shlex
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvd_eurosat.errors import UserError

PREPARE = "python -m hvd_eurosat.prepare"
PACKED = ".packed"
OWN = re.compile(rf"{re.escape(PACKED)}|\..*\.partial-[0-9a-f]{{8}}")  # ours, which is nobody's litter
UNUSABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))  # Unicode's categories of controls, broken characters and line ends
SHOWN = 10  # names in a list
# What Windows, macOS, Linux, network drives and notebooks leave among files, with all hidden names; then what they and
# GIS programs leave beside a file, by the file's name and an ending.
LITTER = re.compile(
    r"\..*|desktop\.ini|ehthumbs(_vista)?\.db|thumbs\.db(:encryptable)?|icon[\r\uf00d]|picasa\.ini|zbthumbnail\.info"
    r"|@eadir|@synoresource|@recycle|@recently-snapshot|#recycle|#snapshot|\$recycle\.bin|system volume information"
    r"|wpsettings\.dat|found\.\d{3}|lost\+found|lost\.dir|network trash folder|temporary items|__macosx|__pycache__"
    r"|~\$.*",
    re.IGNORECASE,
)
COMPANION = re.compile(
    r".+([:\uf03a]zone\.identifier|@syno(eastream|resource)|\.aux\.xml|\.(ovr|tfw|tifw|jgw|jpgw|pgw|pngw|wld))",
    re.IGNORECASE,
)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is some system's litter rather than data."""
    return bool(LITTER.fullmatch(name) or COMPANION.fullmatch(name))


def normal(name: str) -> str:
    """The name in Unicode's NFC: macOS may write `ê` as two characters, other systems write one."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that lines of text cannot hold. Other spaces than ours, and joiners, they can."""
    if name.isascii() and name.isprintable():  # as a million are
        return
    if not UNUSABLE.isdisjoint(map(unicodedata.category, name)):
        flaw = "it has control characters or no valid encoding"
        raise UserError(f"{where}: unusable file name {name!a}: {flaw}: rename it")


@dataclass(frozen=True)
class Listing:
    """The files of a tree without its litter.

    where: the tree as its user named it. files: the source's own spelling by name; folders: their names. peek: the
    first bytes of a file by its spelling. option: how a user chooses one of its folders, up to that folder's name.
    within: the folder of the tree that this is, with a slash. litter: how many of each name; links: the folders that
    are links; loops: those that lead back; twins: folders in two spellings of Unicode.
    """

    where: str
    peek: Callable[[str], bytes] = field(repr=False)
    option: str = "--inside "
    within: str = ""
    files: dict[str, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    litter: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    twins: set[str] = field(default_factory=set)

    def add(self, spelling: str) -> None:
        """Note a file. Raises UserError for a name that cannot be used, or is another's too."""
        name = normal(spelling)
        check_name(name, self.where)
        if "\\" in name:  # which sha256sum writes in another way
            raise UserError(f"{self.where}: unusable file name {name!a}: it has backslashes: rename it")
        if name in self.files:
            both = f"{self.files[name]!a} and {spelling!a}"
            raise UserError(f"{self.where}: {both} are two files of one name, {name}: rename one")
        self.files[name] = spelling

    def leave_out(self, name: str) -> None:
        """Count litter, by its ending where there may be one for each file."""
        if OWN.fullmatch(name):
            return
        companion = None if LITTER.fullmatch(name) else COMPANION.fullmatch(name)
        kind = f"*{companion[1]}" if companion else "._*" if name.startswith("._") else name.strip()
        self.litter[kind] += 1

    def inside(self, folder: str) -> "Listing":
        """What lies in one of its folders. Raises UserError where there is no such folder."""
        start = f"{normal(folder).strip('/')}/"
        files = {name.removeprefix(start): own for name, own in self.files.items() if name.startswith(start)}
        if not files:
            tops = sorted({name.split("/")[0] for name in self.files if "/" in name})
            raise UserError(f"{self.where} has no files in {start}; its folders are {some(tops) or 'none'}")
        below = {name.removeprefix(start) for name in self.folders if name.startswith(start)}
        return replace(self, within=f"{self.within}{start}", files=files, folders=below)

    def choosing(self, folder: str) -> str:
        """What a user adds to a command to choose a folder."""
        return f"{self.option}{shlex.quote(f'{self.within}{folder}')}"

    def preparing(self, folder: str) -> str:
        """The command that splits the images of a folder."""
        return (
            f"{PREPARE} --source {shlex.quote(self.where)} --inside {shlex.quote(f'{self.within}{folder}')} --out DIR"
        )

    def notes(self) -> Iterator[str]:
        """What was left out, and what is not as it seems, a line for each kind."""
        if self.litter:
            counts = [f"{n:,} {name}" for name, n in sorted(self.litter.items())]
            yield f"{self.where}: left out files and folders that are no data: {some(counts)}"
        if self.loops:
            yield f"{self.where}: left out links that lead back to a folder around them: {some(self.loops)}"
        if self.links:
            yield f"{self.where}: followed linked folders: {some(self.links)}"
        if self.twins:
            yield f"{self.where}: folders spelt in two ways of Unicode (NFC, NFD) are one: {some(sorted(self.twins))}"


def list_folder(root: Path, option: str = "--inside ") -> Listing:
    """The files below root, through links too, each folder once on its way down. Raises UserError."""

    def peek(spelling: str) -> bytes:
        try:
            if not stat.S_ISREG((root / spelling).stat().st_mode):
                return b""
            with (root / spelling).open("rb") as file:
                return file.read(12)
        except OSError:
            return b""

    if root.is_file():
        raise UserError(f"{root} is a file: give a folder")
    listing = Listing(str(root), peek, option)
    spelt: dict[str, str] = {}
    try:
        _walk(root, "", (), listing, spelt)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    return listing


def list_names(spellings: Iterable[str], where: str, peek: Callable[[str], bytes]) -> Listing:
    """The files of an archive, whose folders' spellings end in a slash. Raises UserError."""
    listing, spelt, litter = Listing(where, peek), dict[str, str](), set[str]()
    for spelling in spellings:
        parts = spelling.removesuffix("/").split("/")
        first = next((n for n, part in enumerate(parts) if is_litter(part)), None)
        if first is not None:
            litter.add("/".join(parts[: first + 1]))
            continue
        folders = len(parts) if spelling.endswith("/") else len(parts) - 1
        for n in range(folders):
            _add_folder("/".join(parts[: n + 1]), listing, spelt)
        if not spelling.endswith("/"):
            listing.add(spelling)
    for path in litter:
        listing.leave_out(path.rpartition("/")[2])
    return listing


def by_folders(name: str) -> str:
    """The key of names that are sorted folder by folder: a/b comes before a-b, though a slash comes after a hyphen."""
    return name.replace("/", "\0")  # sorts as name.split("/") does, which takes three times the memory


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = [name if name.isprintable() else ascii(name) for name in names]
    more = f", … and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _walk(root: Path, below: str, above: tuple[tuple[int, int], ...], listing: Listing, spelt: dict[str, str]) -> None:
    """The folder `below` root, into the listing; above: the folders around it, by device and inode."""
    status = (root / below).stat()
    here = (*above, (status.st_dev, status.st_ino))
    with os.scandir(root / below) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{below}{entry.name}"
        if is_litter(entry.name):
            listing.leave_out(entry.name)
        elif not _is_folder(entry):
            listing.add(path)
        elif entry.is_symlink() and _identity(entry) in here:
            listing.loops.append(path)
        else:
            listing.links.extend([path] if entry.is_symlink() else [])
            _add_folder(path, listing, spelt)
            _walk(root, f"{path}/", here, listing, spelt)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a bad file, named with the others
        return False


def _identity(entry: "os.DirEntry[str]") -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def _add_folder(spelling: str, listing: Listing, spelt: dict[str, str]) -> None:
    name = normal(spelling)
    listing.folders.add(name)
    if spelt.setdefault(name, spelling).rpartition("/")[2] != spelling.rpartition("/")[2]:
        listing.twins.add(name)
