"""A class-folder tree that is split, as `prepare` writes it or a user unzipped it."""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hvd_eurosat.data.bands import check_names
from hvd_eurosat.data.contradictions import linked, status_of
from hvd_eurosat.data.images import BadImageError, decode, read_file
from hvd_eurosat.data.inputs import PICTURES, Inputs, inputs_of
from hvd_eurosat.data.layout import SPLITS, lay_out
from hvd_eurosat.data.listing import PACKED, PREPARE, list_folder, normal
from hvd_eurosat.data.names import Checksums, Names
from hvd_eurosat.errors import UserError

MANIFEST = "manifest.json"
CHECKSUMS = "files.sha256"
AS_THEY_CAME = "as the images came"


class Skipped(BaseModel):
    """A file of the source that was left out, and why."""

    file: str
    reason: str


class Rule(BaseModel):
    """How the images came to their splits.

    kind: as the source had them; each class at random; by lists of names; by place, blocks of `degrees` going whole to
    one split. lists: each list's sha256 by split. name: of published lists. blocks: how many by split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["source", "random", "lists", "place"]
    lists: dict[str, str] = {}
    name: str = ""
    degrees: float | None = None
    blocks: dict[str, int] = {}

    @property
    def is_drawn(self) -> bool:
        """Whether seed and ratios make the split."""
        return self.kind in ("random", "place")


class Manifest(BaseModel):
    """manifest.json of a prepared folder; seed and ratios are null where they did not make the split.

    split: null in folders of before that was noted. converted: files of the source that were made 8-bit RGB, by what
    they were. inputs: what the numbers in the images are; null in folders of before that was noted. extras: the sha256
    of files that are no images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    name: str
    synthetic: bool
    classes: tuple[str, ...]
    image_size: int
    counts: dict[str, dict[str, int]]
    seed: int | None
    ratios: tuple[float, ...] | None
    split: Rule | None = None
    digest: str
    skipped: tuple[Skipped, ...] = ()
    converted: dict[str, tuple[str, ...]] = {}
    inputs: Inputs | None = None
    extras: dict[str, str] = {}


@dataclass(frozen=True)
class Tree:
    """The images under root, by split and class.

    digest: names this data, 64 hexadecimal digits. image_size: side in pixels that every image must have, without a
    manifest that of the first training image; None where that one is not square or no image.
    checksums: each file's sha256 by its name.
    inputs: what the numbers in the images are. places: a file's own path below root, where that is not its name.
    notes: what was left out, a line for each kind. flaws: why files cannot be used, by name, where it is known already.
    """

    root: Path
    classes: tuple[str, ...]
    digest: str
    synthetic: bool
    image_size: int | None
    checksums: Checksums = field(repr=False)
    inputs: Inputs = PICTURES
    places: dict[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    flaws: dict[str, str] = field(default_factory=dict, repr=False)

    def choosing(self, names: Sequence[str]) -> "Tree":
        """With some of its bands, in an order of their own; of no names it is as it was. Raises UserError."""
        if not names:
            return self
        chosen = self.inputs.choosing(check_names(names, "data.bands"), str(self.root), "data.bands asks for")
        return replace(self, inputs=chosen)

    def brought_to(self, wants: Inputs) -> "Tree":
        """As its images are read for a network that wants such inputs. Raises UserError where they cannot be."""
        return replace(self, inputs=self.inputs.brought_to(wants, str(self.root)))

    def path(self, name: str) -> Path:
        """Where the file of this name is."""
        return self.root / self.places.get(name, name)

    def files(self, split: str) -> Names:
        """Names of the split's files, ordered by class and name."""
        return self.checksums.names[self.checksums.part(split)]

    def sums(self, split: str) -> Names:
        """The sha256 of each of files(split), empty where it is not known."""
        return self.checksums.sums[self.checksums.part(split)]

    def labels(self, split: str) -> NDArray[np.int64]:
        """int64 [N]: the index in `classes` of each of files(split)."""
        index, files = {name: i for i, name in enumerate(self.classes)}, self.files(split)
        return np.fromiter((index[path.split("/")[1]] for path in files), np.int64, len(files))


def open_tree(root: Path) -> Tree:
    """The tree at root, from its manifest or, without one, from its folders and their first image.

    Raises UserError where the folder is missing, not split, empty, of one class, or its splits' classes differ.
    """
    try:
        if root.is_file():
            raise UserError(f"{root} is a file: make a folder of what is in it with {preparing(root, None)}")
        if not root.is_dir():
            raise UserError(
                f"no data at {root}: make it with {PREPARE} --source EuroSAT_RGB.zip --out {root}, "
                "or try the synthetic sample with --source sample"
            )
        return _prepared(root) if (root / MANIFEST).exists() else _unzipped(root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None


def check_classes(counts: dict[str, dict[str, int]], where: str) -> tuple[str, ...]:
    """The sorted classes of images counted by split and class.

    Raises UserError, which names the class, unless there are two at least and every split has some of each.
    """
    classes = sorted({label for split in SPLITS for label in counts[split]})
    if not any(n for split in SPLITS for n in counts[split].values()):
        raise UserError(f"{where} holds no images in train/, valid/ and test/")
    for label in classes:
        for split in SPLITS:
            if not counts[split].get(label):
                raise UserError(f"class {label} has no images in {split}/ of {where}; every split needs every class")
    if len(classes) < 2:
        raise UserError(f"{where} has one class only, {classes[0]}: there is nothing to tell apart")
    return tuple(classes)


def preparing(root: Path, side: int | None) -> str:
    """The command that prepares a folder, whose images have `side` pixels, if that is known."""
    size = "" if side in (None, 64) else f" --image-size {side}"
    return f"{PREPARE} --source {shlex.quote(str(root))} --out DIR{size}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(root: Path) -> Manifest:
    """The manifest of the prepared folder root. Raises UserError when it is damaged."""
    path = root / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path} is damaged ({where + ': ' if where else ''}{first['msg']}): prepare the data again"
        ) from None


def split_of(tree: Tree) -> str:
    """How the images came to their splits, in words, and the digest that names them."""
    try:
        manifest = read_manifest(tree.root) if (tree.root / MANIFEST).exists() else None
    except UserError:
        manifest = None
    return f"{_how(manifest) if manifest else AS_THEY_CAME} (digest {tree.digest[:12]})"


def _how(manifest: Manifest) -> str:
    rule = manifest.split or Rule(kind="random" if manifest.ratios else "source")
    drawn = f"{':'.join(f'{part:g}' for part in manifest.ratios or ())} by prepare"
    digests = ", ".join(f"{split} {sha256[:8]}" for split, sha256 in rule.lists.items())
    return {
        "source": AS_THEY_CAME,
        "random": f"{drawn}, at random by seed {manifest.seed}",
        "lists": f"by {f'{rule.name} lists' if rule.name else f'lists of names, sha256 {digests}'}",
        "place": f"{drawn}, by place, in whole blocks of {rule.degrees} degrees by seed {manifest.seed}",
    }[rule.kind]


def _prepared(root: Path) -> Tree:
    manifest = read_manifest(root)
    text = (root / CHECKSUMS).read_bytes()
    checksums = Checksums.of_lines(text)
    folders = {f"{split}/{label}" for split in SPLITS for label in manifest.classes}
    whole = {path.rpartition("/")[0] for path in checksums} == folders
    if not whole or hashlib.sha256(text).hexdigest() != manifest.digest:
        raise UserError(f"{root / CHECKSUMS} does not fit {MANIFEST} beside it: prepare the data again")
    checksums = checksums.sorted()
    places: dict[str, str] = {}
    if not text.isascii():
        places = _spellings(root)
        checksums = checksums if all(path == normal(path) for path in checksums) else checksums.respelt(normal)
    classes = tuple(map(normal, manifest.classes))
    inputs = manifest.inputs or inputs_of(classes)
    return Tree(root, classes, manifest.digest, manifest.synthetic, manifest.image_size, checksums, inputs, places)


def _spellings(root: Path) -> dict[str, str]:
    """The files below root by their names in NFC: a copy made by way of macOS may spell them in NFD."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != PACKED]
        paths = (os.path.relpath(os.path.join(folder, name), root) for name in files)
        found.update({normal(path): path for path in paths if not path.isascii()})
    return found


def _unzipped(root: Path) -> Tree:
    listing = list_folder(root, f"--data.root {shlex.quote(f'{root}/')}")
    layout = lay_out(listing)
    if not layout.split:
        side = _side(root / listing.files[layout.items[0].path])
        raise UserError(f"{root} has no train/ valid/ test/: split it with {preparing(root, side)}")
    statuses = {item.path: status_of(root / listing.files[item.path]) for item in layout.items}
    contradictory = linked(layout.items, statuses)
    items = {f"{item.split}/{item.label}/{item.name}": item for item in layout.items}
    digest = hashlib.sha256()
    counts: dict[str, dict[str, int]] = {split: dict.fromkeys(layout.classes, 0) for split in SPLITS}
    checksums = Checksums.of(dict.fromkeys(items, ""))
    for name in (name for split in SPLITS for name in checksums.names[checksums.part(split)]):
        split, label, _ = name.split("/")
        counts[split][label] += 1
        status = statuses[items[name].path]
        digest.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    classes = check_classes(counts, str(root))
    own = {name: listing.files[item.path] for name, item in items.items()}
    places = {name: path for name, path in own.items() if name != path}
    flaws = {name: contradictory[item.path] for name, item in items.items() if item.path in contradictory}
    inputs = inputs_of(classes)
    tree = Tree(root, classes, digest.hexdigest(), False, None, checksums, inputs, places, layout.notes, flaws)
    return replace(tree, image_size=_side(tree.path(tree.files(SPLITS[0])[0])))


def _side(path: Path) -> int | None:
    try:
        width, height = decode(read_file(path)).size
    except BadImageError:  # whoever needs its pixels says so
        return None
    return width if width == height else None
