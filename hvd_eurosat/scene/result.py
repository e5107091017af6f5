"""A finished map, as all that is written and drawn of it sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from hvd_eurosat.scene.grid import FLATTENING, MAJOR, TRUE_SCALE, Grid, ground_distances
from hvd_eurosat.scene.parts import NONE, Parts
from hvd_eurosat.scene.windows import Block, Windows

HECTARE = 10_000.0  # square metres
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

# Colours by which people know these classes, near to those of CORINE where it has them.
COLOURS = {
    "AnnualCrop": "#f2d56b",
    "Forest": "#1f6b35",
    "HerbaceousVegetation": "#a9c77a",
    "Highway": "#5b5b63",
    "Industrial": "#a64ca6",
    "Pasture": "#6cc24a",
    "PermanentCrop": "#e08a2c",
    "Residential": "#d93a2b",
    "River": "#3fb6e8",
    "SeaLake": "#1f4fa8",
}
OTHERS = (  # for classes of other sets, in order: Paul Tol's "muted", "bright" and "light"
    *("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499"),
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#77aadd", "#ee8866", "#eedd88"),
    *("#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00"),
)


@dataclass(frozen=True)
class LandCover:
    """What each window of a scene is.

    classes: uint8 [rows, columns], NONE where there is none; percents: uint8 [classes, rows, columns]; preview: of the
    scene, uint8 [H, W, 4], of preview_step x preview_step pixels each; tags: what a map can be traced by.
    """

    title: str
    names: tuple[str, ...]
    grid: Grid
    windows: Windows
    classes: Bytes
    percents: Bytes
    preview: Bytes
    preview_step: int
    tags: dict[str, str]

    @property
    def transform(self) -> Affine:
        """From (column, row) of the map to the CRS."""
        return self.windows.transform(self.grid.transform)

    @property
    def colours(self) -> list[str]:
        """#rrggbb of each class."""
        if all(name in COLOURS for name in self.names):
            return [COLOURS[name] for name in self.names]
        return [OTHERS[n % len(OTHERS)] for n in range(len(self.names))]

    @property
    def confidence(self) -> Bytes:
        """Percents of the chosen class, uint8 [rows, columns], NONE where there is none."""
        chosen = np.where(self.classes == NONE, 0, self.classes)
        of_it: Bytes = np.take_along_axis(self.percents, chosen[None].astype(np.intp), 0)[0]
        return of_it

    def pixel_square_metres(self, row: float) -> Floats:
        """The ground of each map pixel in a row, float64 [columns]; 1 where there is no CRS.

        Of projected coordinates in their plane, or on the ground where the plane is far from true, as Web Mercator's;
        of degrees on the ellipsoid.
        """
        crs, turn = self.grid.crs, self.transform
        columns: Floats = np.arange(self.classes.shape[1], dtype=np.float64) + 0.5
        if crs is None:
            return np.ones(len(columns))
        unit = abs(turn.determinant)
        if crs.is_geographic:
            return unit * square_metres_per_square_degree(turn.d * columns + turn.e * (row + 0.5) + turn.f)
        plane = unit * crs.linear_units_factor[1] ** 2
        along, down = ground_distances(Grid(crs, turn @ Affine.translation(0, row), len(columns), 1)) or (plane, 1.0)
        return np.full(len(columns), plane if abs(along * down / plane - 1) < 2 * TRUE_SCALE else along * down)

    def square_metres(self, row: int) -> Floats:
        """The same of each window's own part: less where it was moved in."""
        area = self.pixel_square_metres(row)
        rows, columns = self.classes.shape
        own_rows, own_columns = (end - count + 1 for end, count in zip(self.windows.ends, (rows, columns), strict=True))
        area[-1] *= own_columns
        return area * own_rows if row == rows - 1 else area


def square_metres_per_square_degree(latitudes: Floats) -> Floats:
    """On the ellipsoid of WGS 84: the product of its radii of curvature (Snyder 1987, equations 4-18 and 4-20)."""
    eccentricity, radians = FLATTENING * (2 - FLATTENING), np.radians(latitudes)
    density = (1 - eccentricity) * np.cos(radians) / (1 - eccentricity * np.sin(radians) ** 2) ** 2
    return np.asarray(density * (MAJOR * math.pi / 180) ** 2, np.float64)


@dataclass(frozen=True)
class Area:
    """Of one class (None: of windows without any). share: of all that has a class; confidence: mean, in percent."""

    name: str | None
    windows: int
    hectares: float | None
    share: float | None
    confidence: float | None


def areas(cover: LandCover) -> list[Area]:
    """Of each class, in the order of the network's, and of what has none."""
    counts = np.bincount(cover.classes.ravel(), minlength=NONE + 1)
    trust = np.bincount(cover.classes.ravel(), weights=cover.confidence.ravel(), minlength=NONE + 1)
    ground = np.zeros(NONE + 1)
    for row, classes in enumerate(cover.classes):
        ground += np.bincount(classes, weights=cover.square_metres(row), minlength=NONE + 1)
    total = float(ground[: len(cover.names)].sum())
    known = cover.grid.crs is not None
    found = []
    for number in (*range(len(cover.names)), NONE):
        count, here, is_class = int(counts[number]), float(ground[number]), number != NONE
        found.append(
            Area(
                cover.names[number] if is_class else None,
                count,
                here / HECTARE if known else None,
                here / total if total and is_class else None,
                float(trust[number]) / count if count and is_class else None,
            )
        )
    return found


def assemble(parts: Parts, blocks: Sequence[Block], windows: Windows, classes: int) -> tuple[Bytes, Bytes, Bytes]:
    """Classes, percents and preview of all blocks, in order."""
    rows, columns = windows.shape
    chosen, percents = np.empty((rows, columns), np.uint8), np.empty((classes, rows, columns), np.uint8)
    previews = []
    for block in blocks:
        values, preview = parts.read(block.index)
        here = values.reshape(block.end - block.first, columns, 1 + classes)
        chosen[block.first : block.end] = here[..., 0]
        percents[:, block.first : block.end] = here[..., 1:].transpose(2, 0, 1)
        previews.append(preview)
    return chosen, percents, np.concatenate(previews)
