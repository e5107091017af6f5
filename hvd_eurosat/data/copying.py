"""The images of a source, checked, and copied or linked into a folder by split and class: columns, not objects."""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvd_eurosat.data.contradictions import contradictions
from hvd_eurosat.data.images import BadImageError, decode, decode_any, in_threads, resize
from hvd_eurosat.data.inputs import Inputs, Unit
from hvd_eurosat.data.layout import SPLITS, Item
from hvd_eurosat.data.multispectral import counted, measured, read_bands, read_pixels
from hvd_eurosat.data.processes import in_processes, progress
from hvd_eurosat.data.sources import Source
from hvd_eurosat.data.split import split_class
from hvd_eurosat.data.splits import Wish
from hvd_eurosat.data.tree import Skipped
from hvd_eurosat.errors import UserError

UNSPLIT = ".unsplit"
# What keeps a file from being given a second name: another file system, none that can, too many, not the user's own.
NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES)
HARD, SYMBOLIC = "hard links", "symbolic links"
WRITTEN = "written"
MAY_TRAIN = (SPLITS[0], None)  # the split of an image that is trained on, or may be when it has one


@dataclass(frozen=True)
class Options(Wish):
    """How to prepare, and which split.

    image_size: pixels a side; images of other sizes are refused or, with resize, resized. convert: images of other
    modes are made 8-bit RGB. skip_bad: unusable files, and images that are in two classes, are left out, with a
    warning, instead of refused. inside: the source's folder. bands: of TIFFs, in their order, where nothing else
    says it; unit: of their numbers, likewise. link: to the source's files, instead of copies. jobs: processes.
    """

    image_size: int = 64
    resize: bool = False
    convert: bool = False
    skip_bad: bool = False
    inside: str = ""
    bands: tuple[str, ...] = ()
    unit: Unit | None = None
    link: bool = False
    jobs: int = 1


@dataclass
class Part:
    """What became of some items, by their place among these.

    checksums: uint8 [n, 32]; sizes: width and height in pixels before resizing, uint16 [n, 2]. Of few of them: the
    name, if it is another than the source's; what a picture was before it was converted; why it cannot be used. how:
    the number of each kind of file. greys: of the pictures that may be trained on, how many pixels there are of each
    grey, int64 [3, 256].
    """

    checksums: NDArray[np.uint8]
    sizes: NDArray[np.uint16]
    names: dict[int, str] = field(default_factory=dict)
    was: dict[int, str] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    how: Counter[str] = field(default_factory=Counter)
    greys: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 256), np.int64))

    @staticmethod
    def empty(count: int) -> "Part":
        """Nothing yet of so many items."""
        return Part(np.zeros((count, 32), np.uint8), np.zeros((count, 2), np.uint16))

    def take(self, where: range, other: "Part") -> None:
        """What became of the items at `where`."""
        places = slice(where.start, where.stop)
        self.checksums[places], self.sizes[places] = other.checksums, other.sizes
        for mine, new in ((self.names, other.names), (self.was, other.was), (self.bad, other.bad)):
            mine.update({where[n]: text for n, text in new.items()})
        self.how += other.how
        self.greys += other.greys


class Copies:
    """The images of a source in a folder, by number in the order of its items.

    found: what became of them; there: bool [N], which are in the folder; counted: bool [N], which are in the greys of
    `found`, if they are pictures; labels: int32 [N], places in `classes`; splits: int8 [N], places in SPLITS, or -1.
    """

    def __init__(self, items: Sequence[Item], classes: Sequence[str], folder: Path) -> None:
        self.items, self.classes, self.folder = items, classes, folder
        index = {label: n for n, label in enumerate(classes)}
        of_split: dict[str | None, int] = {None: -1}
        of_split.update({split: n for n, split in enumerate(SPLITS)})
        self.labels = np.fromiter((index[item.label] for item in items), np.int32, len(items))
        self.splits = np.fromiter((of_split[item.split] for item in items), np.int8, len(items))
        self.found = Part.empty(len(items))
        self.there = np.ones(len(items), bool)
        self.counted = np.fromiter((item.split in MAY_TRAIN for item in items), bool, len(items))

    def __len__(self) -> int:
        """How many are in the folder."""
        return int(self.there.sum())

    def name(self, number: int) -> str:
        """The file's own name."""
        return self.found.names.get(number) or self.items[number].name

    def path(self, number: int) -> str:
        """Where it is, below the folder."""
        split = self.splits[number]
        return f"{UNSPLIT if split < 0 else SPLITS[split]}/{self.items[number].label}/{self.name(number)}"

    def groups(self) -> list[list[int]]:
        """Those of which there are several with the same bytes, together; each group, and the groups, by path."""
        numbers = np.flatnonzero(self.there)
        begins = np.ascontiguousarray(self.found.checksums[:, :8]).view(np.uint64)[numbers, 0]  # tells nearly all apart
        order = np.argsort(begins)
        same = np.flatnonzero(np.diff(begins[order]) == 0)
        groups: dict[bytes, list[int]] = {}
        for number in numbers[order[np.union1d(same, same + 1)]].tolist():
            groups.setdefault(self.found.checksums[number].tobytes(), []).append(number)
        found = [group for group in groups.values() if len(group) > 1]
        for group in found:
            group.sort(key=lambda number: self.items[number].path)
        return sorted(found, key=lambda group: self.items[group[0]].path)

    def unusable(self) -> list[Skipped]:
        """What could not be used, and why, by file."""
        bad = [Skipped(file=self.items[number].path, reason=reason) for number, reason in self.found.bad.items()]
        return sorted(bad, key=lambda one: one.file)

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Removes some from the folder."""
        self.uncount(numbers)
        for number in numbers:
            (self.folder / self.path(number)).unlink()
        self.there[list(numbers)] = False

    def uncount(self, numbers: Iterable[int]) -> None:
        """Takes those that were counted out of the greys again."""
        again = [number for number in numbers if self.counted[number]]

        def greys(number: int) -> NDArray[np.int64]:
            return _greys(decode((self.folder / self.path(number)).read_bytes()))

        for one in in_threads(greys, again, "measuring"):
            self.found.greys -= one
        self.counted[again] = False

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of images by split and class, of all classes."""
        each = {}
        for n, split in enumerate(SPLITS):
            numbers = np.bincount(self.labels[self.there & (self.splits == n)], minlength=len(self.classes))
            each[split] = dict(zip(self.classes, numbers.tolist(), strict=True))
        return each

    def lines(self) -> Iterator[str]:
        """Those of files.sha256, in the order of the paths; some folders' at a time."""
        folders = self.splits.astype(np.int64) * len(self.classes) + self.labels
        numbers = np.flatnonzero(self.there)
        numbers = numbers[np.argsort(folders[numbers], kind="stable")]
        ends = np.flatnonzero(np.diff(folders[numbers])) + 1
        blocks = [block for block in np.split(numbers, ends) if len(block)]
        for block in sorted(blocks, key=lambda block: self.path(int(block[0])).rpartition("/")[0] + "/"):
            paths = {self.path(number): number for number in block.tolist()}
            yield "".join(f"{self.found.checksums[paths[path]].tobytes().hex()}  {path}\n" for path in sorted(paths))


def copy(source: Source, folder: Path, options: Options, inputs: Inputs) -> Copies:
    """Checks each image and writes it below folder, or a link to it, into its split's or the unsplit class folder.

    Those that cannot be used are not there. Raises UserError where two would have one name.
    """
    layout = source.layout
    for split in SPLITS if layout.split else (UNSPLIT,):
        for label in layout.classes:
            (folder / split / label).mkdir(parents=True)
    copies = Copies(layout.items, layout.classes, folder)

    def work(numbers: range) -> Part:
        part = Part.empty(len(numbers))
        for place, number in enumerate(numbers):
            item = copies.items[number]
            try:
                data, was, size, picture = _checked(source.read(item.path), options, inputs)
            except BadImageError as error:
                part.bad[place] = str(error)
                continue
            if was is not None:
                part.names[place] = f"{Path(item.name).stem}.png"
            if was:
                part.was[place] = was
            origin = source.locate(item.path) if options.link and was is None and source.locate else None
            path = folder / (item.split or UNSPLIT) / item.label / (part.names.get(place) or item.name)
            try:
                part.how[_put(data, path, origin)] += 1
            except FileExistsError:
                said = f"another image of its class would be called {path.name} too: rename one"
                raise UserError(f"{item.path}: {said}") from None
            part.checksums[place] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            part.sizes[place] = size
            if picture is not None and item.split in MAY_TRAIN:
                part.greys += _greys(picture)
        return part

    with closing(in_processes(work, len(layout.items), "checking images", options.jobs)) as parts:
        for numbers, part in parts:
            copies.found.take(numbers, part)
    for which in (copies.there, copies.counted):
        which[list(copies.found.bad)] = False
    return copies


def _put(data: bytes, path: Path, origin: Path | None) -> str:
    """Writes a file, or a link to its origin; which of these. Raises FileExistsError."""
    if origin is None:
        with path.open("xb") as file:
            file.write(data)
        return WRITTEN
    origin = Path(os.path.realpath(origin))
    try:
        os.link(origin, path)
        return HARD
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_HARD_LINK:
            raise
    path.symlink_to(origin)
    return SYMBOLIC


def _checked(
    data: bytes, options: Options, inputs: Inputs
) -> tuple[bytes, str | None, tuple[int, int], Image.Image | None]:
    """The bytes to write, what a picture was that had to become a PNG (None of a file that stays as it is), its size.

    Last the picture in these bytes, None of bands. Raises BadImageError.
    """
    size = options.image_size
    if inputs.file:
        read_bands(data, inputs.file, inputs.dtype, size)
        return data, None, (size, size), None
    image, was = decode_any(data, None if options.resize else size, options.convert)
    if not was and image.size == (size, size):
        return data, None, image.size, image
    png, resized = BytesIO(), resize(image, size)
    resized.save(png, "PNG")
    return png.getvalue(), was, image.size, resized


def _greys(picture: Image.Image) -> NDArray[np.int64]:
    """How many pixels of 8-bit RGB have each grey, [3, 256]."""
    return np.fromiter(picture.histogram(), np.int64, 3 * 256).reshape(3, 256)


def without_contradictions(copies: Copies, groups: Sequence[list[int]]) -> tuple[list[list[int]], list[Skipped]]:
    """Removes images that are in two classes. Returns the other groups, and these."""
    flaws = contradictions([copies.items[number] for number in group] for group in groups)
    kept = []
    for group in groups:
        if copies.items[group[0]].path in flaws:
            copies.leave_out(group)
        else:
            kept.append(group)
    return kept, [Skipped(file=path, reason=reason) for path, reason in flaws.items()]


def split(copies: Copies, groups: Sequence[list[int]], options: Options) -> None:
    """Moves the images from the unsplit folder to their splits, those of a group together. Raises UserError."""
    together = {group[0]: group for group in groups}
    first = copies.there.copy()
    first[[number for group in groups for number in group[1:]]] = False
    with progress("splitting", len(copies)) as advance:
        for n, label in enumerate(copies.classes):
            numbers = {copies.items[i].name: i for i in np.flatnonzero(first & (copies.labels == n)).tolist()}
            drawn = split_class(label, numbers, options.ratios, options.seed)
            for split, names in drawn.items():
                (copies.folder / split / label).mkdir(parents=True)
                for number in (each for name in names for each in together.get(numbers[name], [numbers[name]])):
                    before = copies.folder / copies.path(number)
                    copies.splits[number] = SPLITS.index(split)
                    before.rename(copies.folder / copies.path(number))
            advance(len(numbers))
    shutil.rmtree(copies.folder / UNSPLIT)


def measure(copies: Copies, inputs: Inputs, size: int) -> Inputs:
    """With the statistics of the training images.

    Pictures were counted when they were checked, before their split was drawn. Those that are not trained on, mostly
    few, are decoded again, to be taken out.
    """
    if not inputs.file:
        copies.uncount(np.flatnonzero(copies.splits != 0).tolist())
        return measured(inputs, copies.found.greys)

    def read(number: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
        return read_pixels((copies.folder / copies.path(number)).read_bytes(), inputs, size, size)

    numbers = np.flatnonzero(copies.there & (copies.splits == 0)).tolist()
    return measured(inputs, counted(inputs, in_threads(read, numbers, "measuring")))
