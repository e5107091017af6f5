"""Where on the ground images lie, and the split by place: blocks of ground go whole to train, valid or test."""

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.images import BadImageError, in_threads
from hvd_eurosat.data.layout import SPLITS, Item
from hvd_eurosat.data.sources import Source
from hvd_eurosat.data.split import Ratios, sizes
from hvd_eurosat.errors import UserError

PLACELESS = "it has no coordinates, which --split-by-place needs: GeoTIFFs have them"
SEARCHES, BLOCKS = 20, 10_000  # at most so many searches, of so many blocks together
PASSES = 50  # of a search over the blocks; a few are enough
Place = tuple[float, float]
Block = tuple[int, int]


def places_of(source: Source) -> tuple[dict[str, Place], dict[str, str]]:
    """Longitude and latitude (WGS 84, degrees) of each image's centre by its path, and why others have none."""
    from rasterio import warp
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    centres: dict[str, list[tuple[str, float, float]]] = {}
    places: dict[str, Place] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        found = in_threads(lambda item: _centre(source, item), source.layout.items, "reading coordinates")
        for item, centre in zip(source.layout.items, found, strict=True):
            if centre:
                centres.setdefault(centre[0], []).append((item.path, *centre[1:]))
    for crs, members in centres.items():  # all at once, for a transformation takes long to set up
        paths, x, y = zip(*members, strict=True)
        try:
            longitudes, latitudes = warp.transform(crs, "EPSG:4326", x, y)
        except RasterioError:
            continue
        there = zip(paths, longitudes, latitudes, strict=True)
        places |= {path: (east, north) for path, east, north in there if math.isfinite(east + north)}
    return places, {item.path: PLACELESS for item in source.layout.items if item.path not in places}


def _centre(source: Source, item: Item) -> tuple[str, float, float] | None:
    """The reference system of a GeoTIFF as WKT, and the coordinates in it of its centre."""
    import rasterio
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    try:
        data = source.read(item.path)
        quiet = rasterio.Env(CPL_LOG=os.devnull)  # libtiff's chatter
        with quiet, rasterio.MemoryFile(data) as file, file.open(driver="GTiff") as raster:
            if not raster.crs or raster.transform.is_identity:
                return None
            to, column, row = raster.transform, raster.width / 2, raster.height / 2
            x, y = to.a * column + to.b * row + to.c, to.d * column + to.e * row + to.f
            return raster.crs.to_wkt(), x, y
    except (BadImageError, RasterioError, CPLE_BaseError, ValueError):  # damaged, or no GeoTIFF
        return None


def share_out(
    items: Sequence[Item], places: Mapping[str, Place], degrees: float, ratios: Ratios, seed: int
) -> tuple[dict[str, str], dict[str, int]]:
    """The split by path of each image that has a place, and the number of blocks by split.

    Images of one block share a split. Blocks in the seed's order are searched for splits near the ratios, in all and
    in each class. Raises UserError where a split would lack a class.
    """
    blocks: dict[Block, list[Item]] = {}
    for item in items:
        if item.path in places:
            east, north = places[item.path]
            blocks.setdefault((math.floor(east / degrees), math.floor(north / degrees)), []).append(item)
    classes = sorted({item.label for item in items if item.path in places})
    order = sorted(blocks, key=lambda block: hashlib.sha256(f"{seed}/{block[0]}/{block[1]}".encode()).digest())
    counts = np.zeros((len(order), len(classes)), np.int64)
    for number, block in enumerate(order):
        labels = Counter(item.label for item in blocks[block])
        counts[number] = [labels[label] for label in classes]
    chosen = _choose(counts, ratios) if order else np.zeros(0, np.int64)
    for number, label in enumerate(classes):
        where = set(chosen[counts[:, number] > 0].tolist())
        if len(where) < len(SPLITS):
            lacking = next(split for n, split in enumerate(SPLITS) if n not in where)
            held = f"class {label} lies in {np.count_nonzero(counts[:, number]):,} of the {len(order):,} blocks"
            raise UserError(
                f"{held} of {degrees:g} degrees, and {lacking} gets none: give --split-by-place smaller ones"
            )
    splits = {item.path: SPLITS[n] for n, block in zip(chosen, order, strict=True) for item in blocks[block]}
    return splits, {split: int((chosen == n).sum()) for n, split in enumerate(SPLITS)}


def _choose(counts: NDArray[np.int64], ratios: Ratios) -> NDArray[np.int64]:
    """The split of each block, int64 [B]: the best of some searches. counts: images by block and class [B, C]."""
    wanted = np.array([sizes(int(count), ratios) for count in counts.sum(0)]).T
    many = len(counts)
    searches = max(1, min(SEARCHES, BLOCKS // many))
    found = [_search(counts, wanted, np.roll(np.arange(many), n * many // searches)) for n in range(searches)]
    return min(found, key=lambda one: one[0])[1]


def _search(
    counts: NDArray[np.int64], wanted: NDArray[np.int64], order: NDArray[np.intp]
) -> tuple[int, NDArray[np.int64]]:
    """How far the splits [B] that are found are from those wanted [splits, C], and they.

    All blocks begin in train. One after the other goes where that brings the splits' counts nearest to those wanted,
    until none moves; then again, where a split that lacks a class weighs more than all else.
    """
    chosen = np.zeros(len(counts), np.int64)
    have = np.zeros_like(wanted)
    have[0] = counts.sum(0)
    moves = np.eye(len(SPLITS), dtype=np.int64)[:, :, None]
    heavy = 6 * int(counts.sum()) ** 2 + 1
    for weight in (0, heavy):
        for _ in range(PASSES):
            before = chosen.copy()
            for block in order:
                here, count = chosen[block], counts[block]
                have[here] -= count
                cost = _cost(have + moves * count, wanted, weight)
                chosen[block] = here if cost[here] == cost.min() else cost.argmin()
                have[chosen[block]] += count
            if (chosen == before).all():
                break
    return int(_cost(have, wanted, heavy)), chosen


def _cost(have: NDArray[np.int64], wanted: NDArray[np.int64], weight: int) -> NDArray[np.int64]:
    """How far counts [..., splits, classes] are from those wanted: squares of images."""
    apart = have - wanted
    squares = (apart**2).sum((-2, -1)) + (apart.sum(-1) ** 2).sum(-1)
    return np.asarray(squares + weight * (have == 0).sum((-2, -1)))
