"""A map as polygons of equal class, in GeoJSON (RFC 7946: longitudes and latitudes of WGS 84)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio import features, warp

from hvd_eurosat.scene.grid import WGS84
from hvd_eurosat.scene.parts import NONE
from hvd_eurosat.scene.result import HECTARE, LandCover
from hvd_eurosat.training.files import replacing

GEOJSON = "map.geojson"
STEP = 16  # map pixels at most between two points of an edge, which bends where the CRS does
GROWTH = 1.2
DECIMALS = 7  # of degrees: a centimetre
AT_ONCE = 1000  # polygons that are placed on Earth together: a call of GDAL takes longer than a ring
Ring = NDArray[np.float64]


def write_polygons(cover: LandCover, out: Path, min_area: float) -> None:
    """map.geojson, where areas below `min_area` hectares have gone to the largest neighbour of another class."""
    if cover.grid.crs is None:
        return  # no place on Earth
    ground = cover.pixel_square_metres(cover.classes.shape[0] / 2)
    classes = _sieved(cover.classes, math.ceil(min_area * HECTARE / ground[len(ground) // 2]))
    with replacing(out / GEOJSON) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(_features(cover, classes)):
            file.write(b",\n" if number else b"\n")
            file.write(json.dumps(feature).encode())
        file.write(b"\n]}\n")


def _sieved(classes: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Polygons of fewer pixels go, the smallest first: GDAL leaves one all of whose neighbours are as small."""
    size, most = 2, min(pixels, classes.size - 1)  # GDAL takes no more
    while size <= most:
        classes = features.sieve(classes, size=size, mask=classes != NONE)
        size = max(size + 1, min(most, math.ceil(GROWTH * size)))
    return classes


def _features(cover: LandCover, classes: NDArray[np.uint8]) -> Iterator[dict[str, Any]]:
    """One for each polygon."""
    ends = np.array(cover.windows.ends)[::-1]
    ground = [cover.pixel_square_metres(row) for row in range(len(classes))]
    shapes = features.shapes(classes, mask=classes != NONE)  # in (column, row)
    while some := list(itertools.islice(shapes, AT_ONCE)):
        whole = [[np.array(ring) for ring in shape["coordinates"]] for shape, _ in some]
        own = [[np.minimum(ring, ends) for ring in rings] for rings in whole]
        placed = _placed(cover, [ring for rings in own for ring in rings])
        for (_, value), windows, rings in zip(some, whole, own, strict=True):
            column, row = rings[0][:-1].mean(0).astype(int)
            yield {
                "type": "Feature",
                "properties": {
                    "class": cover.names[int(value)],
                    "windows": round(_area(windows)),
                    "hectares": round(_area(rings) * ground[row][column] / HECTARE, 2),
                },
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [_wound(next(placed), is_hole=n > 0) for n in range(len(rings))],
                },
            }


def _area(rings: list[Ring]) -> float:
    """Of the first without the others, which are its holes."""
    sizes = [abs(_signed(ring)) for ring in rings]
    return sizes[0] - sum(sizes[1:])


def _signed(ring: Ring) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def _placed(cover: LandCover, rings: list[Ring]) -> Iterator[Ring]:
    """Each ring in longitudes and latitudes."""
    pieces = [_densified(ring) for ring in rings]
    points = warp.transform(cover.grid.crs, WGS84, *(cover.transform @ np.concatenate(pieces).T))
    for ring in np.split(np.stack(points, 1), np.cumsum([len(piece) for piece in pieces])[:-1]):
        if np.ptp(ring[:, 0]) > 180:  # across the date line, where they go on beyond 180
            ring[:, 0] %= 360
        yield ring


def _wound(ring: Ring, is_hole: bool) -> list[list[float]]:
    """Against the clock, holes with it."""
    if (_signed(ring) < 0) != is_hole:
        ring = ring[::-1]
    found: list[list[float]] = ring.round(DECIMALS).tolist()
    return found


def _densified(ring: Ring) -> Ring:
    """With points at every STEP map pixels, the same ones on both sides of an edge."""
    pieces = []
    for start, end in itertools.pairwise(ring):
        axis = int(abs(end - start).argmax())
        low, high = sorted((start[axis], end[axis]))
        between = np.arange(math.floor(low / STEP) + 1, math.ceil(high / STEP)) * STEP
        more = np.repeat(start[None], len(between), 0)
        more[:, axis] = between if end[axis] > start[axis] else between[::-1]
        pieces += [start[None], more]
    return np.concatenate([*pieces, ring[-1:]])
