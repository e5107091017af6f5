"""A class-folder tree with train/ valid/ test/, as `prepare` writes it or a user unzipped it."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hvd_eurosat.data.images import BadImageError, decode
from hvd_eurosat.errors import UserError

SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
CHECKSUMS = "files.sha256"
PREPARE = "python -m hvd_eurosat.prepare"


class Skipped(BaseModel):
    """A file of the source that was left out, and why."""

    file: str
    reason: str


class Manifest(BaseModel):
    """manifest.json of a prepared folder; seed and ratios are null where the source was already split."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    name: str
    synthetic: bool
    classes: tuple[str, ...]
    image_size: int
    counts: dict[str, dict[str, int]]
    seed: int | None
    ratios: tuple[float, ...] | None
    digest: str
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Tree:
    """The images under root, by split and class.

    digest: names this data, 64 hexadecimal digits. image_size: side in pixels that every image must have, without a
    manifest that of the first training image; None where that one is not square or no image.
    checksums: each file's sha256 (empty where unknown) by its path, in the order of (split, class, name).
    """

    root: Path
    classes: tuple[str, ...]
    digest: str
    synthetic: bool
    image_size: int | None
    checksums: dict[str, str] = field(repr=False)

    def files(self, split: str) -> list[str]:
        """Paths below root, with forward slashes, ordered by class and name."""
        return [path for path in self.checksums if path.startswith(f"{split}/")]

    def labels(self, split: str) -> NDArray[np.int64]:
        """int64 [N]: the index in `classes` of each of files(split)."""
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[path.split("/")[1]] for path in self.files(split)], dtype=np.int64)


def open_tree(root: Path) -> Tree:
    """The tree at root, from its manifest or, without one, from its folders and their first image.

    Raises UserError where the folder is missing, not split, empty, of one class, or its splits' classes differ.
    """
    try:
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


def ignored(name: str) -> bool:
    """Whether a file or folder of this name is some system's litter rather than data."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


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
    if manifest and manifest.ratios:
        parts = ":".join(f"{part:g}" for part in manifest.ratios)
        how = f"{parts} by prepare, at random by seed {manifest.seed}"
    else:
        how = "as the images came"
    return f"{how} (digest {tree.digest[:12]})"


def _prepared(root: Path) -> Tree:
    manifest = read_manifest(root)
    text = (root / CHECKSUMS).read_bytes()
    checksums = {line[66:]: line[:64] for line in text.decode(errors="replace").splitlines()}
    folders = {f"{split}/{label}" for split in SPLITS for label in manifest.classes}
    whole = {path.rpartition("/")[0] for path in checksums} == folders
    if not whole or hashlib.sha256(text).hexdigest() != manifest.digest:
        raise UserError(f"{root / CHECKSUMS} does not fit {MANIFEST} beside it: prepare the data again")
    return Tree(root, manifest.classes, manifest.digest, manifest.synthetic, manifest.image_size, _ordered(checksums))


def _unzipped(root: Path) -> Tree:
    missing = [f"{split}/" for split in SPLITS if not (root / split).is_dir()]
    if missing:
        raise UserError(f"{root} has no {' '.join(missing)}: split it with {PREPARE} --source {root} --out DIR")
    checksums: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    listing = hashlib.sha256()
    for split in SPLITS:
        counts[split] = {}
        for folder in _entries(root / split):
            if not folder.is_dir():
                continue
            files = [entry for entry in _entries(folder) if not entry.is_dir()]
            counts[split][folder.name] = len(files)
            for file in files:
                path = f"{split}/{folder.name}/{file.name}"
                status = file.stat()
                listing.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"))
                checksums[path] = ""
    classes = check_classes(counts, str(root))
    ordered = _ordered(checksums)
    first = next(path for path in ordered if path.startswith(f"{SPLITS[0]}/"))
    return Tree(root, classes, listing.hexdigest(), False, _side(root / first), ordered)


def _side(path: Path) -> int | None:
    try:
        width, height = decode(path.read_bytes()).size
    except BadImageError:  # whoever needs its pixels says so
        return None
    return width if width == height else None


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not ignored(entry.name)), key=lambda entry: entry.name)


def _ordered(checksums: dict[str, str]) -> dict[str, str]:
    return dict(sorted(checksums.items(), key=lambda item: item[0].split("/")))
