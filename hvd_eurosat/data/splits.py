"""Splits that are not drawn image by image: by lists of names, published or one's own, and by place on the ground."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from hvd_eurosat.data.layout import SPLITS, SUFFIXES, Item
from hvd_eurosat.data.listing import normal, some
from hvd_eurosat.data.places import places_of, share_out
from hvd_eurosat.data.sources import Source
from hvd_eurosat.data.split import Ratios
from hvd_eurosat.data.tree import Rule, Skipped
from hvd_eurosat.errors import RunError, UserError

# The lists of EuroSATSpatial and EuroSAT, for train, valid and test: torchgeo, torchgeo/datasets/eurosat.py.
TORCHGEO = "https://hf.co/datasets/torchgeo/eurosat/resolve/1ce6f1bfb56db63fd91b6ecc466ea67f2509774c/"
PUBLISHED = {
    "spatial": {
        "eurosat-spatial-train.txt": "2db7d455afb8dcbca898ea19a00f1f90c091734efdbba89e22aaf24056da243f",
        "eurosat-spatial-val.txt": "6c758477604b7057a0fd990d7f6327b63b99a6725aac11a6a9d0174a7fdd8f0b",
        "eurosat-spatial-test.txt": "de22dec83d350cac3b3e4ca8e285cb6733c81ab94bf5bcf9213a567993402452",
    },
    "random": {
        "eurosat-train.txt": "1c1d2e855f95deee605a3d992f914d113fddbecf422ec61648057d029a37d695",
        "eurosat-val.txt": "b385741f31daa9f1250cf1e1fe03adfab394e1172e0693df40141af004f60330",
        "eurosat-test.txt": "cf37948894c12bd953930ff54ee9b7abf0b31478abb8d25fd2c6c721db74c592",
    },
}
SECONDS = 60  # that a server may be silent
MAX_BYTES = 1 << 30  # of a list


@dataclass(frozen=True)
class Wish:
    """Which split is wanted.

    split: the published one of this name; split_lists: files of names for train, valid and test; split_by_place: the
    side in degrees of the blocks that go whole to one split. With none of these, the source's own or one at random.
    seed and ratios (train, valid, test) make a split at random or by place.
    """

    seed: int = 0
    ratios: Ratios = (Fraction(94), Fraction(5), Fraction(1))
    split: str = ""
    split_lists: tuple[Path, ...] = ()
    split_by_place: float | None = None


@dataclass(frozen=True)
class Names:
    """A list of names: the file as it was given, its bytes' sha256, and the names in it."""

    file: str
    sha256: str
    names: tuple[str, ...]


def lists_for(wish: Wish) -> list[Names]:
    """The lists for train, valid and test that are wanted, fetched where they are published; none if none are.

    Raises UserError for a file that is no list, RunError for a failed download.
    """
    if wish.split:
        return [_fetched(file, wish.split) for file in PUBLISHED[wish.split]]
    return [_read(path) for path in wish.split_lists]


def arrange(source: Source, spec: str, wish: Wish, lists: Sequence[Names]) -> tuple[Source, Rule, list[Skipped]]:
    """The source with its images in the splits that are wanted, the rule that did it, and images without a place.

    Raises UserError for lists that do not name each image once, and blocks that cannot be shared out.
    """
    layout = source.layout
    flaws: dict[str, str] = {}
    if lists:
        rule = Rule(kind="lists", lists={split: one.sha256 for split, one in zip(SPLITS, lists, strict=True)})
        rule = rule.model_copy(update={"name": _published(lists)})
        splits = by_lists(layout.items, lists, spec)
    elif wish.split_by_place:
        places, flaws = places_of(source)
        splits, blocks = share_out(layout.items, places, wish.split_by_place, wish.ratios, wish.seed)
        rule = Rule(kind="place", degrees=wish.split_by_place, blocks=blocks)
    else:
        return source, Rule(kind="source" if layout.split else "random"), []
    items = tuple(replace(item, split=splits[item.path]) for item in layout.items if item.path in splits)
    skipped = [Skipped(file=file, reason=reason) for file, reason in flaws.items()]
    return replace(source, layout=replace(layout, items=items, splits=SPLITS)), rule, skipped


def by_lists(items: Sequence[Item], lists: Sequence[Names], where: str) -> dict[str, str]:
    """The split by path of each image, from the lists for train, valid and test.

    A name may have folders, of which those from the class on count, and the suffix of another format of the image.
    Raises UserError for names of no image, of several, and of one image twice; and for images in no list.
    """
    by_stem: dict[str, list[Item]] = {}
    for item in items:
        by_stem.setdefault(_parts(item.path)[-1], []).append(item)
    splits: dict[str, str] = {}
    twice: dict[str, str] = {}
    for split, names in zip(SPLITS, lists, strict=True):
        unknown = []
        for name in names.names:
            found = _named(name, by_stem)
            if len(found) > 1:
                raise UserError(f"{names.file}: {name} may be {some(item.path for item in found)}: name its folder too")
            if not found:
                unknown.append(name)
            elif found[0].path in splits:
                twice[found[0].path] = names.file
            else:
                splits[found[0].path] = split
        if unknown:
            raise UserError(f"{names.file} names {len(unknown):,} images that {where} has not: {some(unknown)}")
    if twice:
        first = dict(zip(SPLITS, (names.file for names in lists), strict=True))
        said = (f"{path} (in {first[splits[path]]} and {file})" for path, file in twice.items())
        raise UserError(f"the lists name {len(twice):,} images of {where} more than once: {some(said)}")
    if left := [item.path for item in items if item.path not in splits]:
        raise UserError(f"{len(left):,} of {len(items):,} images of {where} are in no list: {some(left)}")
    return splits


def _named(name: str, by_stem: dict[str, list[Item]]) -> list[Item]:
    """The images that a name may mean; of several, that of the very file name if there is one."""
    parts = _parts(name)
    found = [item for item in by_stem.get(parts[-1], ()) if _agree(parts, _from_class(item))]
    if len(found) > 1:
        file = normal(name).replace("\\", "/").rpartition("/")[2]
        exact = [item for item in found if item.path.rpartition("/")[2] == file]
        found = exact or found
    return found


def _agree(some_parts: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two paths end alike, as far as both go."""
    shared = min(len(some_parts), len(others))
    return some_parts[-shared:] == others[-shared:]


def _from_class(item: Item) -> list[str]:
    parts = _parts(item.path)
    folders = parts[:-1]
    return parts[len(folders) - 1 - folders[::-1].index(item.label) :]


def _parts(name: str) -> list[str]:
    """Folders and name without the suffix of an image."""
    parts = [part for part in normal(name).replace("\\", "/").split("/") if part not in ("", ".")] or [""]
    stem, suffix = os.path.splitext(parts[-1])
    return [*parts[:-1], stem if suffix.lower() in SUFFIXES else parts[-1]]


def _read(path: Path) -> Names:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror}") from None
    return _names(str(path), data)


def _names(file: str, data: bytes) -> Names:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        lines = []
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(data) > MAX_BYTES:
        raise UserError(f"{file} is no list of names, one on each line of a text in UTF-8")
    return Names(file, hashlib.sha256(data).hexdigest(), names)


def _fetched(file: str, split: str) -> Names:
    """A published list. Raises RunError where it cannot be fetched, or is another than that."""
    files = ", ".join(PUBLISHED[split])
    cure = f"get {files} from {TORCHGEO.replace('/resolve/', '/tree/')} and give them with --split-lists"
    try:
        with urlopen(f"{TORCHGEO}{file}", timeout=SECONDS) as answer:
            data = answer.read(MAX_BYTES)
    except (OSError, HTTPException) as error:
        raise RunError(f"cannot download {file} ({error}): {cure}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != PUBLISHED[split][file]:
        wanted = PUBLISHED[split][file]
        raise RunError(f"{file} came with the sha256 {found[:8]}…, not torchgeo's {wanted[:8]}…: {cure}")
    return _names(file, data)


def _published(lists: Iterable[Names]) -> str:
    """The name of published lists, "" of others."""
    found = [one.sha256 for one in lists]
    return next((f"torchgeo's {name}" for name, files in PUBLISHED.items() if list(files.values()) == found), "")
