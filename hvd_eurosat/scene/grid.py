"""Where pixels lie on the ground."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from affine import Affine
from rasterio import warp
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from hvd_eurosat.errors import UserError

WGS84 = CRS.from_epsg(4326)
MAJOR, FLATTENING = 6378137.0, 1 / 298.257223563  # of WGS 84's ellipsoid, in metres
TRUE_SCALE = 0.02  # how far a projection's metres may be from the ground's
MOST_FINER, MOST_COARSER = 16, 100


@dataclass(frozen=True)
class Grid:
    """Pixels of a raster: pixel (column, row) has its upper left corner at transform @ (column, row) of crs."""

    crs: CRS | None
    transform: Affine
    width: int
    height: int

    def agrees(self, other: Grid) -> bool:
        """Whether the other's pixels are the same, to a hundredth of a pixel over the whole raster."""
        if (self.crs, self.width, self.height) != (other.crs, other.width, other.height):
            return False
        return self._corners_within(other, 0.01)

    def covers(self, other: Grid) -> bool:
        """Whether both, of one CRS, have their corners at the same places, to a pixel and a half of the coarser."""
        return self._corners_within(other, 1.5) or other._corners_within(self, 1.5)

    def _corners_within(self, other: Grid, pixels: float) -> bool:
        to_pixels = ~self.transform @ other.transform
        for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = to_pixels @ (column * other.width, row * other.height)
            if max(abs(x - column * self.width), abs(y - row * self.height)) > pixels:
                return False
        return True


def grid_of(dataset: object) -> Grid:
    """That of an open dataset of rasterio."""
    return Grid(dataset.crs, dataset.transform, dataset.width, dataset.height)  # type: ignore[attr-defined]


def ground_distances(grid: Grid) -> tuple[float, float] | None:
    """Metres on the ground from pixel to pixel, along a row and down a column, in the middle of the grid.

    None where the CRS does not say where on Earth that is.
    """
    if grid.crs is None:
        return None
    column, row = grid.width / 2, grid.height / 2
    points = [grid.transform @ at for at in ((column, row), (column + 1, row), (column, row + 1))]
    try:
        longitudes, latitudes = warp.transform(grid.crs, WGS84, *zip(*points, strict=True))
    except (CPLE_BaseError, CRSError, RasterioError):
        return None
    if not np.isfinite([*longitudes, *latitudes]).all() or np.abs(latitudes).max() > 90:
        return None
    # The lengths of a degree, from the ellipsoid's radii of curvature (Snyder 1987, equations 4-18 and 4-20).
    eccentricity, sine = FLATTENING * (2 - FLATTENING), math.sin(math.radians(latitudes[0]))
    normal = MAJOR / math.sqrt(1 - eccentricity * sine**2)
    meridian = normal * (1 - eccentricity) / (1 - eccentricity * sine**2)
    east = [math.radians(value - longitudes[0]) * normal * math.sqrt(1 - sine**2) for value in longitudes]
    north = [math.radians(value - latitudes[0]) * meridian for value in latitudes]
    distances = math.hypot(east[1], north[1]), math.hypot(east[2], north[2])
    return distances if min(distances) > 0 else None


def resampled(grid: Grid, metres: float, path: str) -> Grid:
    """The grid of so many metres on the ground, in the same CRS where its units are metres of the ground, else in UTM.

    Raises UserError where that cannot be.
    """
    distances, crs = ground_distances(grid), grid.crs
    if distances is None or crs is None:
        raise UserError(f"{path} says no place on Earth, so --resolution cannot be had: leave it out")
    if not max(distances) / MOST_FINER <= metres <= min(distances) * MOST_COARSER:
        raise UserError(
            f"--resolution {metres:g}: {path} has pixels of {distances[0]:.3g} x {distances[1]:.3g} m; "
            f"from a {MOST_FINER}th to {MOST_COARSER} times that is possible"
        )
    turn = grid.transform
    unit = crs.linear_units_factor[1] if crs.is_projected else 0.0
    lengths = math.hypot(turn.a, turn.d) * unit, math.hypot(turn.b, turn.e) * unit
    true = all(abs(length / ground - 1) < TRUE_SCALE for length, ground in zip(lengths, distances, strict=True))
    step = metres / unit if true else metres
    if true and turn.b == turn.d == 0 and turn.a > 0 > turn.e:
        width, height = grid.width * turn.a / step, grid.height * -turn.e / step
        transform = Affine(step, 0, turn.c, 0, -step, turn.f)
        return Grid(crs, transform, max(1, math.ceil(width - 0.01)), max(1, math.ceil(height - 0.01)))
    crs = crs if true else _utm(grid)
    return _around(grid, crs, step)


def _around(grid: Grid, crs: CRS, step: float) -> Grid:
    """The north-up grid in another CRS that holds all of a grid, its corner at whole steps."""
    along = np.linspace(0, 1, 33)
    edges = [(t, s) for t in along for s in (0, 1)] + [(s, t) for t in along for s in (0, 1)]
    points = [grid.transform @ (column * grid.width, row * grid.height) for column, row in edges]
    xs, ys = warp.transform(grid.crs, crs, *zip(*points, strict=True))
    left, top = math.floor(min(xs) / step + 0.01), math.ceil(max(ys) / step - 0.01)
    right, bottom = math.ceil(max(xs) / step - 0.01), math.floor(min(ys) / step + 0.01)
    return Grid(crs, Affine(step, 0, left * step, 0, -step, top * step), right - left, top - bottom)


def _utm(grid: Grid) -> CRS:
    """The zone of the grid's middle."""
    x, y = grid.transform @ (grid.width / 2, grid.height / 2)
    (longitude,), (latitude,) = warp.transform(grid.crs, WGS84, [x], [y])
    zone = int((longitude + 180) // 6) % 60 + 1
    return CRS.from_epsg((32600 if latitude >= 0 else 32700) + zone)
