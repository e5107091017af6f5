"""What the numbers in a network's images are: bands, how they became grey, size on the ground, how they spread."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

EUROSAT_CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the quantiles
SAMPLED = 1000  # images are enough to know them by


class Inputs(BaseModel):
    """The images that a network takes.

    name: of the rule, for people. bands: in the network's order. stretch: the digital numbers (reflectance x 10,000)
    that became 1 and 255 of `grey`; None for pictures of which only that is known. level: of the Sentinel-2 product.
    gsd: metres on the ground from pixel to pixel. quantiles: of the training images, at LEVELS, for each band.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bands: tuple[str, ...]
    unit: Literal["grey"] = "grey"
    dtype: Literal["uint8"] = "uint8"
    stretch: tuple[float, float] | None = None
    level: Literal["L1C", "L2A"] | None = None
    gsd: float | None = None
    quantiles: tuple[tuple[float, ...], ...] | None = None

    def measured(self, images: NDArray[np.uint8]) -> Inputs:
        """With the quantiles of images uint8 [N, S, S, bands]."""
        pixels = images.reshape(-1, images.shape[-1])
        below = [np.bincount(band, minlength=256).cumsum() for band in pixels.T]
        quantiles = [np.searchsorted(counts, np.multiply(LEVELS, len(pixels))).tolist() for counts in below]
        return self.model_copy(update={"quantiles": tuple(map(tuple, quantiles))})


PICTURES = Inputs(name="8-bit RGB pictures as they are", bands=("red", "green", "blue"))
# The stretch was measured on 100 patches of which the digital numbers are known, too; the quantiles on 1,000.
EUROSAT = Inputs(
    name="EuroSAT RGB, known by its ten classes",
    bands=("B04", "B03", "B02"),
    stretch=(0, 2750),
    level="L1C",
    gsd=10,
    quantiles=((24, 30, 46, 75, 114, 193, 254), (43, 52, 73, 91, 114, 164, 218), (64, 70, 82, 98, 119, 157, 208)),
)


def inputs_of(classes: Collection[str]) -> Inputs:
    """Those of a set of class folders: EuroSAT's, known by its ten classes, or 8-bit RGB pictures."""
    return EUROSAT if sorted(classes) == sorted(EUROSAT_CLASSES) else PICTURES
