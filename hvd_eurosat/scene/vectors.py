"""A map as polygons of equal class, in GeoJSON (RFC 7946: longitudes and latitudes of WGS 84)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
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
AT_ONCE = 1000  # polygons that are worked with together


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
        whole = Rings.of([ring for shape, _ in some for ring in shape["coordinates"]])
        own = Rings(np.minimum(whole.points, ends), whole.starts)
        placed = _placed(cover, own)
        windows, sizes = (abs(rings.signed()).tolist() for rings in (whole, own))
        middles, with_clock = own.middles().astype(int).tolist(), (placed.signed() < 0).tolist()
        points, starts = placed.points.round(DECIMALS).tolist(), [*placed.starts.tolist(), len(placed.points)]
        lines = [points[start:after] for start, after in itertools.pairwise(starts)]
        end = 0
        for shape, value in some:
            first, end = end, end + len(shape["coordinates"])
            column, row = middles[first]
            yield {
                "type": "Feature",
                "properties": {
                    "class": cover.names[int(value)],
                    "windows": round(windows[first] - sum(windows[first + 1 : end])),
                    "hectares": round((sizes[first] - sum(sizes[first + 1 : end])) * ground[row][column] / HECTARE, 2),
                },
                "geometry": {
                    "type": "Polygon",  # against the clock, holes with it
                    "coordinates": [
                        lines[n] if with_clock[n] == (n > first) else lines[n][::-1] for n in range(first, end)
                    ],
                },
            }


@dataclass(frozen=True)
class Rings:
    """Closed lines, all in one array: a call of numpy takes longer than a ring.

    points: float64 [N, 2]; starts: int64 [rings], the place of each ring's first point.
    """

    points: NDArray[np.float64]
    starts: NDArray[np.int64]

    @staticmethod
    def of(rings: list[list[tuple[float, float]]]) -> Rings:
        """From lists of points."""
        starts = np.cumsum([0, *map(len, rings)])[:-1]
        return Rings(np.array(list(itertools.chain.from_iterable(rings)), np.float64), starts)

    @property
    def lasts(self) -> NDArray[np.int64]:
        """The place of each ring's last point, which is where its first one is."""
        return np.append(self.starts[1:], len(self.points)) - 1

    def signed(self) -> NDArray[np.float64]:
        """The area in each ring, [rings]; less than 0 where it goes round with the clock, y upwards."""
        (x_before, y_before), (x, y) = np.roll(self.points, 1, 0).T, self.points.T
        crossed = x_before * y - x * y_before
        crossed[self.starts] = 0
        return np.add.reduceat(crossed, self.starts) / 2

    def middles(self) -> NDArray[np.float64]:
        """The mean of each ring's corners, [rings, 2]."""
        corners = self.lasts - self.starts
        ring = np.repeat(np.arange(len(corners)), corners + 1)
        points = self.points.copy()
        points[self.lasts] = 0
        return np.stack([np.bincount(ring, column) for column in points.T], 1) / corners[:, None]

    def densified(self) -> Rings:
        """With points at every STEP map pixels, the same ones on both sides of an edge."""
        points, every = self.points, np.arange(len(self.points))
        following = np.roll(points, -1, 0)
        following[self.lasts] = points[self.lasts]
        axis = abs(following - points).argmax(1)
        here, there = points[every, axis], following[every, axis]
        first = np.floor(np.minimum(here, there) / STEP) + 1
        more = np.maximum(np.ceil(np.maximum(here, there) / STEP) - first, 0).astype(np.int64)
        places = np.cumsum(more + 1) - (more + 1)  # of the points there were
        of = np.repeat(every, more + 1)
        nth = np.arange(len(of)) - places[of]
        step = np.where(there > here, first - 1, first + more)[of] + np.where(there > here, 1, -1)[of] * nth
        dense, new = points[of], nth > 0
        dense[new, axis[of[new]]] = step[new] * STEP
        return Rings(dense, places[self.starts])


def _placed(cover: LandCover, rings: Rings) -> Rings:
    """In longitudes and latitudes."""
    dense = rings.densified()
    points = np.stack(warp.transform(cover.grid.crs, WGS84, *(cover.transform @ dense.points.T)), 1)
    longitudes = points[:, 0]
    spans = np.maximum.reduceat(longitudes, dense.starts) - np.minimum.reduceat(longitudes, dense.starts)
    over = np.repeat(spans > 180, dense.lasts - dense.starts + 1)  # the date line: there they go on beyond 180
    longitudes[over] %= 360
    return Rings(points, dense.starts)
