"""What a data tree is: which files are images, which folders are splits and classes.

The one rule of prepare, train, evaluate and predict, for folders, zips and tars alike.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from hvd_eurosat.data.listing import Listing, by_folders, some
from hvd_eurosat.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp"))
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SPLITS = ("train", "valid", "test")
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Files:
    """The names of a tree that must be images, sorted, and those of files outside the folders of images.

    depth: in how many folders the images lie that lie in the fewest. lost: how many of those outside are images.
    """

    images: tuple[str, ...]
    beside: tuple[str, ...]
    depth: int
    lost: int

    def notes(self, where: str) -> Iterator[str]:
        """A line on those beside, if there are any."""
        if self.beside:
            files = _count(self.beside)
            lost = f" ({self.lost:,} of them images)" if self.lost else ""
            yield f"{where}: left out {files}{lost} outside the folders of images: {some(self.beside)}"


@dataclass(frozen=True, slots=True)
class Item:
    """One file: its name in the source, the split it is already in (or None), its class and its name there.

    Folders in a class folder belong to it: Forest/old/1.jpg is old_1.jpg of Forest.
    """

    path: str
    split: str | None
    label: str
    name: str


@dataclass(frozen=True)
class Layout:
    """items: the files that should be images. classes: all class folders seen, sorted, empty ones too.

    splits: the folders of the splits, none where the items are not split. notes: what was left out.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def split(self) -> bool:
        """Whether the items are split already."""
        return bool(self.splits)


def find_files(listing: Listing) -> Files:
    """Which files must be images. Raises UserError where there are none.

    By name or content an image must be one; so must any other file within the folders of images, that is the folders as
    deep as the least deep image's, beside one that has images. Outside of these others are left out. Where there are
    folders of all three splits, images outside of them are left out as well.
    """
    every = {name for name in listing.files if _is_image(name, listing)}
    if not every:
        raise _no_images(listing)
    homes = _homes_of_splits(every)
    images = every if len(homes) != 1 else {name for name in every if _is_in_split(name, homes[0])}
    depth = min(name.count("/") for name in images)
    around = {_around(name, depth) for name in images}
    within = {name for name in listing.files if name.count("/") >= depth and _around(name, depth) in around} | images
    if len(homes) == 1:
        within = {name for name in within if _is_in_split(name, homes[0])}
    outside = listing.files.keys() - within
    inner, outer = (tuple(sorted(names, key=by_folders)) for names in (within, outside))
    return Files(inner, outer, depth, len(outside & every))


def lay_out(listing: Listing, least: int = 2) -> Layout:
    """The splits, classes and images of a tree, which may lie in any number of single folders.

    Raises UserError, which names the path, for what fits no such tree, or has fewer classes than `least`. Where `least`
    is 0, it may also be a folder of images alone: these have no class, and "" for a label.
    """
    where, files = listing.where, find_files(listing)
    homes = _homes_of_splits(files.images)
    if len(homes) > 1:
        raise _several("splits", homes, listing)
    depth = files.depth
    if depth == 0 and least == 0 and not any("/" in name for name in files.images):
        notes = (*listing.notes(), *files.notes(where))
        return Layout(tuple(Item(name, None, "", name) for name in files.images), (), (), notes)
    if depth == 0:
        raise _no_classes(files, listing, "")
    around = {_around(name, depth) for name in files.images}
    empty = {name for name in listing.folders if name.count("/") == depth - 1 and _around(name, depth) in around}
    classes = sorted({name.split("/")[depth - 1] for name in (*files.images, *empty)})
    if {name.casefold() for name in classes} <= SPLIT_FOLDERS.keys():
        if len(around) > 1:
            raise _splits_inside(classes, around, listing)
        raise _no_classes(files, listing, f" in {_folders(classes)}")
    _check_capitals(classes, where)
    level = _split_level(around, listing)
    if len(classes) < least:
        raise _no_classes(files, listing, "", classes[0])
    _check_depth(files, set(classes), level, listing)
    labels = {label: label for label in classes}  # of a million items, not a million strings
    items: list[Item] = []
    joined: dict[tuple[str | None, str, str], str] = {}
    deep = any(path.count("/") > depth for path in files.images)
    for path in files.images:
        parts = path.split("/")
        split = None if level is None else SPLIT_FOLDERS[parts[level].casefold()]
        item = Item(path, split, labels[parts[depth - 1]], "_".join(parts[depth:]))
        other = joined.setdefault((split, item.label, item.name), path) if deep else path
        if other != path:
            raise UserError(f"{where}: {other} and {path} would both be {item.name} of {item.label}: rename one")
        items.append(item)
    notes = (*listing.notes(), *files.notes(where))
    splits = sorted({"/".join(names[: level + 1]) for names in around}) if level is not None else []
    return Layout(tuple(items), tuple(classes), tuple(splits), notes)


def _is_image(name: str, listing: Listing) -> bool:
    """By its suffix or, where that says nothing, by its first bytes."""
    if os.path.splitext(name)[1].lower() in SUFFIXES:
        return True
    start = listing.peek(listing.files[name])
    is_bmp = start[:2] == b"BM" and start[6:10] == bytes(4)  # two letters begin a text, too
    return is_bmp or start.startswith(MAGIC) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")


def _around(name: str, depth: int) -> tuple[str, ...]:
    """The folders around the class folder of a file."""
    return tuple(name.split("/")[: max(0, depth - 1)])


def _split_level(around: set[tuple[str, ...]], listing: Listing) -> int | None:
    """Which of the folders around the classes names the split: its number, None where none does. Raises UserError."""
    columns = list(zip(*around, strict=True))
    named = [n for n, names in enumerate(columns) if all(name.casefold() in SPLIT_FOLDERS for name in names)]
    level = next((n for n in reversed(named) if len(set(columns[n])) == len(around)), None)
    if level is None:
        if len(around) > 1:
            raise _several("class folders", sorted(around), listing)
        return None
    folders = sorted(columns[level])
    splits = [SPLIT_FOLDERS[folder.casefold()] for folder in folders]
    twice = next((split for split in SPLITS if splits.count(split) > 1), None)
    if twice:
        raise UserError(f"{listing.where} has {_folders(folders)}, of which two would be {twice}/: rename one")
    if len(splits) < len(SPLITS):
        chosen = min(splits, key=SPLITS.index)  # train, where there is one
        one = next(names for names in sorted(around) if SPLIT_FOLDERS[names[level].casefold()] == chosen)
        raise UserError(
            f"{listing.where} has {_folders(folders)} but not all of train/, valid/ and test/: add what is missing, "
            f"or split one of them anew with {listing.preparing('/'.join(one[: level + 1]))}"
        )
    return level


def _homes_of_splits(images: Iterable[str]) -> list[tuple[str, ...]]:
    """The least deep folders in which there are folders of images for all three splits."""
    found: dict[tuple[str, ...], set[str]] = {}
    for folders in {tuple(name.split("/")[:-1]) for name in images}:
        for n, folder in enumerate(folders[:-1]):
            if folder.casefold() in SPLIT_FOLDERS:
                found.setdefault(folders[:n], set()).add(SPLIT_FOLDERS[folder.casefold()])
    whole = [home for home, splits in found.items() if len(splits) == len(SPLITS)]
    return sorted(home for home in whole if len(home) == min(map(len, whole)))


def _is_in_split(name: str, home: tuple[str, ...]) -> bool:
    parts = name.split("/")
    n = len(home)
    return tuple(parts[:n]) == home and len(parts) > n + 1 and parts[n].casefold() in SPLIT_FOLDERS


def _several(what: str, folders: Sequence[tuple[str, ...]], listing: Listing) -> UserError:
    names = ["/".join(folder) for folder in folders]
    choice = f"say which is meant with {listing.choosing(names[0])}"
    return UserError(f"{listing.where} has {what} in several folders, {some(f'{name}/' for name in names)}: {choice}")


def _splits_inside(splits: list[str], around: set[tuple[str, ...]], listing: Listing) -> UserError:
    folders = ["/".join(names) for names in sorted(around)]
    outer = f"class folders belong into the splits, as in {splits[0]}/{folders[0].rpartition('/')[2]}/"
    return UserError(f"{listing.where} has {_folders(splits)} in {some(f'{name}/' for name in folders)}: {outer}")


def _no_classes(files: Files, listing: Listing, places: str, only: str = "") -> UserError:
    """Why the least deep folders of images are no class folders: images lie beside folders of others, or are all."""
    loose = ""
    if any(name.count("/") > files.depth for name in files.images):
        first = next(name for name in files.images if name.count("/") == files.depth and _is_image(name, listing))
        loose = f"{first} lies outside the class folders"
    if only:
        unless = f", unless {loose}" if loose else ""
        return UserError(f"{listing.where} has one class only, {only}: there is nothing to tell apart{unless}")
    if loose:
        return UserError(f"{listing.where}: {loose}: move it into one, or elsewhere")
    return UserError(f"{listing.where} has images{places} but no class folders there: make one for each class")


def _check_capitals(classes: Sequence[str], where: str) -> None:
    """Raise UserError for classes that differ in capitals alone: on many systems they are one folder."""
    known: dict[str, str] = {}
    for name in classes:
        other = known.setdefault(name.lower(), name)
        if other != name:
            alike = f"{where} has class folders that differ in capitals alone, {_folders((other, name))}"
            raise UserError(f"{alike}: rename one, or put its images into the other")


def _check_depth(files: Files, classes: set[str], level: int | None, listing: Listing) -> None:
    """A class folder may hold folders where it holds images itself. Raises UserError."""
    depth = files.depth
    splits = sorted(name for name in classes if name.casefold() in SPLIT_FOLDERS and level is None)
    having = {name.rpartition("/")[0] for name in files.images if name.count("/") == depth}
    for name in files.images:
        parts = name.split("/")
        inner = parts[depth:-1]
        if inner and "/".join(parts[:depth]) not in having and parts[depth - 1] in splits:
            loose = next(name for name in files.images if name.split("/")[depth - 1] not in splits)
            raise UserError(f"{listing.where}: {loose} lies outside the class folders, beside {_folders(splits)}")
        if inner and "/".join(parts[:depth]) not in having:
            between = f"is {parts[depth - 1]} its class, or {inner[0]}?"
            raise UserError(f"{listing.where}: {name} lies deeper than a class folder: {between}")
        if set(inner) & classes - {parts[depth - 1]}:
            raise UserError(f"{listing.where}: {name} lies in the folders of two classes")


def _no_images(listing: Listing) -> UserError:
    packed = [name for name in sorted(listing.files) if name.casefold().endswith(ARCHIVES)]
    if packed:
        return UserError(f"{listing.where} has no images but {some(packed)}: unpack that and give what was in it")
    others = f"; it has {_count(listing.files)}: {some(sorted(listing.files))}" if listing.files else ""
    litter = f"; what is no data in it: {some(sorted(listing.litter))}" if listing.litter else ""
    return UserError(f"{listing.where} has no images (JPEG, PNG, TIFF, WebP, BMP){others}{litter}")


def _folders(names: Iterable[str]) -> str:
    return ", ".join(f"{name}/" for name in names)


def _count(files: Collection[str]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files):,} files"
