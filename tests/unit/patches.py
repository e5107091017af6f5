"""Small multispectral sets as people have them: GeoTIFFs of noise in class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.unit.scenes import write_raster

SIDE = 16


def noise(seed: int, bands: int, dtype: str = "uint16", side: int = SIDE) -> NDArray[np.generic]:
    """Pixels [bands, side, side], each band about a number of its own."""
    most = 255 if dtype == "uint8" else 9000
    middle = np.linspace(most / 10, most / 2, bands)[:, None, None]
    drawn = np.random.default_rng(seed).normal(middle, middle / 4, (bands, side, side))
    return drawn.clip(1, most).astype(dtype)


def grow_bands(
    root: Path,
    classes: Sequence[str],
    bands: int,
    dtype: str = "uint16",
    count: int = 3,
    side: int = SIDE,
    **options: object,
) -> Path:
    """So many patches of each class, the first as tiles, others as strips. options: of write_raster."""
    for number in range(len(classes) * count):
        label, tiled = classes[number // count], {"tiled": True, "blockxsize": 16, "blockysize": 16}
        path = root / label / f"{label}_{number % count}.tif"
        write_raster(path, noise(number, bands, dtype, side), **(tiled if number % count == 0 else {}), **options)
    return root
