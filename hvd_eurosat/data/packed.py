"""Decoded images as one memory-mapped array per split, built once and shared by every process of a host."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.images import WHOLE, BadFilesError, BadImageError, Crop, decode, in_threads, read_file
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.listing import PACKED
from hvd_eurosat.data.multispectral import read_pixels
from hvd_eurosat.data.tree import Tree, preparing, sha256_of
from hvd_eurosat.errors import RunError, UserError

if TYPE_CHECKING:  # prepare needs no configuration
    from hvd_eurosat.config.schema import Data

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Packed:
    """A split's images: uint8 or uint16 [N, size, size, bands], mapped copy-on-write; labels: int64 [N].

    files: N names. checksum: the sha256 of the packed file, as it was written.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    files: Sequence[str]
    checksum: str = ""


def pack(
    tree: Tree,
    split: str,
    image_size: int,
    cache_dir: Path | None,
    crop: Crop = WHOLE,
    tick: Callable[[], None] = lambda: None,
) -> Path:
    """The path of the split's packed .npy file, which is built first when it is missing.

    It holds uint8 or uint16 [N, image_size, image_size, bands], as tree.inputs says, in the order of tree.files(split);
    a .json beside it holds shape and sha256. Several hosts may build on one file system: each writes a file of its own
    and renames it. `tick` is called after each image.
    Raises BadFilesError, which names all bad images, UserError for a changed one and for a folder that cannot be
    written, RunError for a full disk.
    """
    folder = cache_dir or tree.root / PACKED
    crop = Crop(side=crop.side) if crop.resize == tree.image_size else crop  # the same pixels have one name
    cropped = "" if crop == WHOLE else f"-{crop.resize}-{crop.side}"
    path = folder / f"{tree.digest[:16]}-{split}-{image_size}{cropped}{_chosen(tree)}.npy"
    files = tree.files(split)
    flawed = any(name.startswith(f"{split}/") for name in tree.flaws)
    if path.exists() and path.with_suffix(".json").exists() and not flawed:
        return path
    shape = (len(files), image_size, image_size, len(tree.inputs.bands))
    partial = folder / f".{path.stem}.{secrets.token_hex(8)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksum = _write(partial, tree, split, shape, crop, tick)
        if path.exists() and path.with_suffix(".json").exists():  # another job's, which it may have mapped
            return path
        partial.replace(path)
        # The description comes last: where it stands, the array is whole.
        partial.write_text(json.dumps({"shape": shape, "sha256": checksum}) + "\n")
        partial.replace(path.with_suffix(".json"))
    except OSError as error:
        if error.errno in DISK_FULL:
            size = f"{np.prod(shape) * np.dtype(tree.inputs.dtype).itemsize / 1e6:,.1f} MB"
            raise RunError(f"no room for {path} ({size}): {error.strerror}; try --data.cache_dir DIR") from None
        raise UserError(
            f"cannot write packed images in {folder} ({error.strerror}): give --data.cache_dir DIR"
        ) from None
    finally:
        with suppress(OSError):  # the error that led here is the one to tell
            partial.unlink()
    return path


def open_packed(
    tree: Tree,
    split: str,
    image_size: int,
    cache_dir: Path | None,
    crop: Crop = WHOLE,
    tick: Callable[[], None] = lambda: None,
) -> Packed:
    """The split's packed images, built when missing (see pack).

    Raises RunError for a packed file that is not as it was written; its content is left to verify_packed.
    """
    path = pack(tree, split, image_size, cache_dir, crop, tick)
    files = tree.files(split)
    images = _map(path)
    inputs = tree.inputs
    if images.shape != (len(files), image_size, image_size, len(inputs.bands)) or images.dtype != inputs.dtype:
        raise _damaged(path)
    return Packed(images, tree.labels(split), files, str(_recorded(path).get("sha256")))


def verify_packed(path: Path) -> None:
    """Raises RunError unless the packed file at path has the shape and sha256 recorded beside it."""
    images = _map(path)
    try:
        checksum = sha256_of(path)
    except OSError:
        raise _damaged(path) from None
    if _recorded(path) != {"shape": list(images.shape), "sha256": checksum}:
        raise _damaged(path)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError):
        raise _damaged(path) from None


def _write(path: Path, tree: Tree, split: str, shape: tuple[int, ...], crop: Crop, tick: Callable[[], None]) -> str:
    """Writes the .npy file and returns its sha256."""
    size = shape[1]
    native = native_size(tree)
    files, sums = tree.files(split), tree.sums(split)

    def read(number: int) -> bytes | BadImageError:
        name = files[number]
        if name in tree.flaws:
            return BadImageError(tree.flaws[name])
        try:
            return _pixels(tree, name, sums[number], native, size, crop)
        except BadImageError as error:
            return error

    header, kind = BytesIO(), np.dtype(tree.inputs.dtype).str
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    digest, flaws = hashlib.sha256(header.getvalue()), dict[str, str]()
    # Not through a memory map: there a full disk is a bus error.
    with path.open("xb") as file:
        file.write(header.getvalue())
        for number, pixels in enumerate(in_threads(read, range(len(files)), f"packing {split}")):
            tick()
            if isinstance(pixels, BadImageError):
                flaws[str(tree.path(files[number]))] = str(pixels)
            elif not flaws:
                digest.update(pixels)
                file.write(pixels)
        if flaws:
            raise BadFilesError(flaws, len(files), str(tree.root), _cure(tree, native))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pixels(tree: Tree, name: str, checksum: str, native: int, size: int, crop: Crop) -> bytes:
    data = read_file(tree.path(name))
    if checksum and hashlib.sha256(data).hexdigest() != checksum:
        raise UserError(f"{tree.path(name)} has changed since it was prepared: prepare the data again")
    return read_pixels(data, tree.inputs, native, size, crop).tobytes()


def _chosen(tree: Tree) -> str:
    """What a packed file's name says of bands that are not simply those of the files."""
    inputs = tree.inputs
    if inputs.is_whole and not inputs.is_stretched:
        return ""
    reading = json.dumps([inputs.bands, inputs.dtype, inputs.stretch])
    return f"-{hashlib.sha256(reading.encode()).hexdigest()[:8]}"


def _cure(tree: Tree, side: int) -> str:
    if tree.checksums.are_known:
        return "prepare the data again"
    return f"{preparing(tree.root, side)} --skip-bad leaves them out"


def resolve_size(tree: Tree, data: Data) -> Data:
    """The section with the side that its images have in place of an image_size of 0. Raises UserError."""
    if data.image_size:
        return data
    size = data.center_crop or data.resize or native_size(tree)
    if not 32 <= size <= 1024:
        raise UserError(f"the images of {tree.root} have {size}x{size} pixels: give a data.image_size of 32 to 1024")
    return data.model_copy(update={"image_size": size})


def resolve_normalisation(tree: Tree, data: Data) -> Data:
    """The section with the default mean and std of the tree's bands where it gives none. Raises UserError."""
    mean, std = data.mean, data.std
    if not (mean and std):
        default = tree.inputs.normalisation(str(tree.root))
        mean, std = mean or default[0], std or default[1]
    bands = tree.inputs.bands
    for key, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != len(bands):
            raise UserError(f"data.{key} has {len(numbers)} numbers for {len(bands)} bands: {', '.join(bands)}")
    return data.model_copy(update={"mean": mean, "std": std})


def native_size(tree: Tree) -> int:
    """The side in pixels that all images of the tree must have: that of the first good square. Raises UserError."""
    if tree.image_size is not None:
        return tree.image_size
    flaws: dict[str, str] = {}
    for name in tree.files(SPLITS[0]):
        try:
            width, height = decode(read_file(tree.path(name))).size
        except BadImageError as error:
            flaws[str(tree.path(name))] = str(error)
            continue
        if width == height:
            return width
        reason = f"{width}x{height} pixels; squares are wanted (prepare --resize makes them so)"
        flaws[str(tree.path(name))] = reason
    raise BadFilesError(flaws, len(flaws), str(tree.root), _cure(tree, 64))


def _map(path: Path) -> NDArray[Any]:
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise _damaged(path) from None
    if images.dtype not in (np.uint8, np.uint16) or path.stat().st_size != images.offset + images.nbytes:
        raise _damaged(path)
    return images  # type: ignore[no-any-return]


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged: delete it, and it is built anew")
