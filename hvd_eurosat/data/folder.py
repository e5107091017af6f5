"""Images in any files and folders, labelled by class folders or not."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.data.images import BadImageError, Crop, decode, in_threads, to_array
from hvd_eurosat.data.tree import ignored
from hvd_eurosat.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def find_images(places: Sequence[Path]) -> dict[str, Path]:
    """The images in files and folders (with their subfolders) by name, sorted: the path below its folder, or its own.

    Raises UserError where there are none, or two of one name.
    """
    found: dict[str, Path] = {}
    for place in places:
        for name, path in _images(place):
            if not name.isprintable():
                raise UserError(f"unusable file name {name!r}: it has control characters or no valid encoding")
            if name in found:
                raise UserError(f"both {found[name]} and {path} would be {name} among the predictions")
            found[name] = path
    for name, path in found.items():
        for folder in found.keys() & set(map(str, Path(name).parents)):
            raise UserError(f"{found[folder]} would be an image and the folder of {path} among the predictions")
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def _images(place: Path) -> Iterator[tuple[str, Path]]:
    if not place.is_dir():
        if not place.exists() or place.suffix.lower() not in SUFFIXES:
            raise UserError(f"no image at {place}: neither a folder nor a file that ends in {' '.join(SUFFIXES)}")
        yield place.name, place
        return
    paths = [path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    paths = [path for path in paths if not any(map(ignored, path.relative_to(place).parts))]
    if not paths:
        raise UserError(f"no images in {place} ({' '.join(SUFFIXES)})")
    yield from ((path.relative_to(place).as_posix(), path) for path in paths)


def folder_labels(names: Sequence[str], classes: Sequence[str], where: str) -> NDArray[np.int64] | None:
    """int64 [N]: the class of each image by its folder; None where no image lies in one.

    Raises UserError for a folder that is none of the classes.
    """
    if not any("/" in name for name in names):
        return None
    index = {name: i for i, name in enumerate(classes)}
    for name in names:
        if name.split("/")[0] not in index or "/" not in name:
            raise UserError(
                f"{where}: {name} lies in no folder of a class; the checkpoint knows {', '.join(classes)} "
                f"(hvd_eurosat.predict takes images without classes)"
            )
    return np.array([index[name.split("/")[0]] for name in names], dtype=np.int64)


def file_batches(
    files: Sequence[Path],
    data: Data,
    batch_size: int,
    device: torch.device,
    shard: int,
    shards: int,
    resizes: bool = True,
) -> Generator[Batch, None, None]:
    """The images in batches of one fixed size, without labels; shard i of n gets every n-th batch, from the i-th on.

    Threads decode the next batches meanwhile. Raises UserError, which names the file, for a bad image, and for one of
    another size than data.image_size unless it `resizes` them.
    """
    crop, wanted = Crop.of(data), None if resizes else data.image_size

    def pixels(path: Path) -> NDArray[np.uint8]:
        try:
            return to_array(decode(path.read_bytes(), wanted), data.image_size, crop)
        except (OSError, BadImageError) as error:
            raise UserError(f"{path}: {error}") from None

    starts = range(shard * batch_size, len(files), shards * batch_size)
    mine = [path for first in starts for path in files[first : first + batch_size]]
    decoded = in_threads(pixels, mine, "predicting", ahead=2 * batch_size)
    for first in starts:
        images = torch.from_numpy(np.stack(list(islice(decoded, batch_size)))).to(device)
        real = len(images)
        places = torch.arange(batch_size, device=device).clamp(max=real - 1)
        weights, labels = (torch.arange(batch_size, device=device) < real).float(), torch.zeros_like(places)
        yield Batch(first + places, images.index_select(0, places).permute(0, 3, 1, 2), labels, weights, real)
