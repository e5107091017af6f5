"""Images in any files and folders, labelled by class folders or not."""

from __future__ import annotations

import os
import shlex
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.data.contradictions import linked, status_of
from hvd_eurosat.data.images import BadFilesError, BadImageError, Crop, decode, in_threads, read_file, to_array
from hvd_eurosat.data.inputs import Inputs
from hvd_eurosat.data.layout import Layout, find_files, lay_out
from hvd_eurosat.data.listing import Listing, by_folders, check_name, is_litter, list_folder, normal
from hvd_eurosat.data.multispectral import load_bands, shaped
from hvd_eurosat.errors import UserError

BY_NAME = "or name images and folders themselves: --input a.png b/, or --list FILE"
FAR_LARGER = 4  # times the side that the network was shown: it hardly knows what it sees


@dataclass(frozen=True)
class Images:
    """The files that must be images, by the names that predictions have.

    notes: what was left out, in lines. flaws: why files cannot be used, by name, where that is known already.
    """

    paths: dict[str, Path]
    notes: tuple[str, ...] = ()
    flaws: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """What was found out about files while they were read: reasons by number, and sizes of scenes by number."""

    bad: dict[int, str] = field(default_factory=dict)
    scenes: dict[int, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def before(images: Images) -> Seen:
        """What is known before any file is read."""
        return Seen({number: images.flaws[name] for number, name in enumerate(images.paths) if name in images.flaws})


def find_images(places: Sequence[Path], listed: Sequence[str] = ()) -> Images:
    """The images in files and folders, sorted by name: the path below its folder, or its own.

    A folder holds class folders, split or not, or images alone. listed: more files, which are named as they are
    written, without a first slash. Raises UserError where there are none, or two of one name, or for a folder whose
    images lie in another way.
    """
    found: dict[str, Path] = {}
    named = Listing("the input", lambda spelling: b"")
    parts = [_images(place, named) for place in places]
    pairs = [*(pair for part in parts for pair in part.paths.items()), *_listed(listed, named)]
    notes = [*named.notes(), *(note for part in parts for note in part.notes)]
    flaws = {name: flaw for part in parts for name, flaw in part.flaws.items()}
    for name, path in pairs:
        check_name(name, "the input")
        if found.get(name) == path:
            raise UserError(f"{path} is named twice: name it once")
        if name in found:
            both = f"both {found[name]} and {path} would be {name} among the predictions"
            raise UserError(f"{both}: give their folder, or a --list of files, which are named by their paths")
        found[name] = path
    if not found:
        raise UserError(f"no image is left; {'; '.join(notes)}")
    for name, path in found.items():
        for folder in found.keys() & set(map(str, Path(name).parents)):
            raise UserError(f"{found[folder]} would be an image and the folder of {path} among the predictions")
    return Images(dict(sorted(found.items(), key=lambda item: by_folders(item[0]))), tuple(notes), flaws)


def find_labelled(folder: Path) -> tuple[Images, list[str]]:
    """The images of a folder and the class of each by its folder; none where no image lies in one. Raises UserError."""
    listing = _listing(folder)
    layout = lay_out(listing, least=0)
    if layout.split:
        raise UserError(f"{folder} is split: give one of {', '.join(str(folder / split) for split in layout.splits)}")
    return _laid_out(folder, listing, layout), [item.label for item in layout.items if layout.classes]


def _images(place: Path, named: Listing) -> Images:
    if not place.exists():
        raise UserError(f"no image at {place}: neither a folder nor a file")
    if _is_left_out(Path(place.name) if place.is_dir() else place, named):
        return Images({})
    if not place.is_dir():
        return Images({normal(place.name): place})
    listing = _listing(place)
    find_files(listing)  # where there are none, the cure below does not help
    try:
        layout = lay_out(listing, least=0)
    except UserError as error:
        raise UserError(f"{error}; {BY_NAME}") from None
    return _laid_out(place, listing, layout)


def _listing(folder: Path) -> Listing:
    return list_folder(folder, f"--input {shlex.quote(f'{folder}/')}")


def _laid_out(folder: Path, listing: Listing, layout: Layout) -> Images:
    paths = {item.path: folder / listing.files[item.path] for item in layout.items}
    flaws = linked(layout.items, {name: status_of(path) for name, path in paths.items()})
    return Images(paths, layout.notes, flaws)


def _is_left_out(path: Path, named: Listing) -> bool:
    """Whether a shell's star or `find` named litter, which is counted; what is hidden was named by somebody."""
    litter = next((part for part in path.parts if is_litter(part) and not part.startswith(".")), None)
    if litter:
        named.leave_out(litter)
    return litter is not None


def _listed(lines: Sequence[str], named: Listing) -> Iterator[tuple[str, Path]]:
    for line in lines:
        if _is_left_out(Path(line), named):
            continue
        name = normal(line)
        if Path(line).is_dir():
            raise UserError(
                f"--list: {line} is a folder: list files (find {shlex.quote(line)} -type f), or give --input"
            )
        if os.path.normpath(name) not in (name, name.removeprefix("./")):
            raise UserError(f"--list: {line} is no plain path: write {os.path.normpath(name)}")
        yield name.removeprefix("./").lstrip("/"), Path(line)  # HDF5 drops the first slash as well


def class_numbers(labels: Sequence[str], names: Sequence[str], classes: Sequence[str], where: str) -> NDArray[np.int64]:
    """int64 [N]: the classes of images, by their names. Raises UserError for one that is none of `classes`."""
    index = {normal(name): i for i, name in enumerate(classes)}
    for name, label in zip(names, labels, strict=True):
        if label not in index:
            raise UserError(
                f"{where}: {name} lies in no folder of a class; the checkpoint knows {', '.join(classes)} "
                f"(hvd_eurosat.predict takes images without classes)"
            )
    return np.array([index[label] for label in labels], dtype=np.int64)


def file_batches(
    files: Sequence[Path],
    data: Data,
    inputs: Inputs,
    batch_size: int,
    device: torch.device,
    shard: int,
    shards: int,
    seen: Seen,
    skip: bool = False,
    resizes: bool = True,
) -> Generator[Batch, None, None]:
    """The images in batches of one fixed size, read as `inputs`, without labels.

    Shard i of n gets every n-th batch, from the i-th on. Threads decode the next batches meanwhile. A bad image, and
    one of another size than data.image_size unless it `resizes` them, is noted in `seen`; it is black where such are
    skipped, else no batches come after it. So are the sizes of scenes, which are far larger than the images that the
    network was trained on.
    """
    crop, wanted = Crop.of(data), None if resizes else data.image_size
    black = np.zeros((data.image_size, data.image_size, len(inputs.bands)), inputs.dtype)

    def pixels(number: int) -> NDArray[Any]:
        if number in seen.bad:
            return black
        try:
            content = read_file(files[number])
            if inputs.file:
                bands = load_bands(content, inputs, wanted)
                note(number, (bands.shape[1], bands.shape[0]))
                return shaped(bands, data.image_size, crop)
            image = decode(content, wanted)
            note(number, image.size)
            array = to_array(image, data.image_size, crop)
            return array if inputs.is_whole else np.ascontiguousarray(array[..., inputs.places])
        except BadImageError as error:
            seen.bad[number] = str(error)
            return black

    def note(number: int, size: tuple[int, int]) -> None:
        if is_scene(size, data):
            seen.scenes[number] = size

    starts = range(shard * batch_size, len(files), shards * batch_size)
    mine = [number for first in starts for number in range(len(files))[first : first + batch_size]]
    decoded = in_threads(pixels, mine, "predicting", ahead=2 * batch_size)
    for first in starts:
        arrays = list(islice(decoded, batch_size))
        if seen.bad and not skip:
            continue  # for the names of all the others
        images = torch.from_numpy(np.stack(arrays)).to(device)
        images = images.float() if images.dtype == torch.uint16 else images
        real = len(images)
        places = torch.arange(batch_size, device=device).clamp(max=real - 1)
        weights, labels = (torch.arange(batch_size, device=device) < real).float(), torch.zeros_like(places)
        yield Batch(first + places, images.index_select(0, places).permute(0, 3, 1, 2), labels, weights, real)


def is_scene(size: tuple[int, int], data: Data) -> bool:
    """Whether an image is far larger than those that the network was trained on."""
    return min(size) >= FAR_LARGER * (data.resize or data.center_crop or data.image_size)


def agree_on_bad(world: World, seen: Seen, files: Sequence[Path], skip: bool) -> Seen:
    """What all ranks have seen, on each. Collective. Raises SharedError for bad files unless they are skipped."""
    every = world.gather(seen)
    bad = dict(sorted((number, reason) for one in every for number, reason in one.bad.items()))
    scenes = dict(sorted((number, size) for one in every for number, size in one.scenes.items()))
    flaws = {str(files[number]): reason for number, reason in bad.items()}
    where = "the input"

    def judge() -> None:
        if flaws and not skip:
            raise BadFilesError(flaws, len(files), where, "--skip-bad leaves them out")
        if len(flaws) == len(files):
            raise BadFilesError(flaws, len(files), where, "so there is nothing to do")

    world.together(judge)
    return Seen(bad, scenes)
