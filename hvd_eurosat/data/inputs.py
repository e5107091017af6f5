"""What the numbers in a network's images are: bands, how they became grey, size on the ground, how they spread."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hvd_eurosat.data.bands import EUROSAT13, RGB, canonical, places
from hvd_eurosat.errors import UserError

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
Unit = Literal["grey", "reflectance x 10,000", "digital numbers"]
UNITS: tuple[Unit, ...] = get_args(Unit)
GREY, REFLECTANCE, DIGITAL_NUMBERS = UNITS
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the quantiles
SAMPLED = 1000  # images are enough to know them by


class Inputs(BaseModel):
    """The images that a network takes.

    name: of the rule, for people. bands: in the network's order. stretch: the digital numbers (reflectance x 10,000)
    that became 1 and 255 of `grey`; None for pictures of which only that is known. level: of the Sentinel-2 product.
    gsd: metres on the ground from pixel to pixel. quantiles: of the training images, at LEVELS, for each band; mean and
    std likewise, in the same unit. file: the bands of TIFFs in their order, () of pictures, which are RGB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bands: tuple[str, ...]
    unit: Unit = "grey"
    dtype: Literal["uint8", "uint16"] = "uint8"
    stretch: tuple[float, float] | None = None
    level: Literal["L1C", "L2A"] | None = None
    gsd: float | None = None
    quantiles: tuple[tuple[float, ...], ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    file: tuple[str, ...] = ()

    @property
    def is_rgb(self) -> bool:
        """Whether these are 8-bit red, green and blue, for which ImageNet's normalisation is meant."""
        return self.dtype == "uint8" and tuple(map(canonical, self.bands)) == RGB

    @property
    def places(self) -> tuple[int, ...]:
        """Of the bands in a file."""
        return places(self.bands, self.file or RGB, "the file", "is wanted")

    @property
    def is_whole(self) -> bool:
        """Whether they are all bands of a file, in its order."""
        return self.places == tuple(range(len(self.file or RGB)))

    @property
    def is_stretched(self) -> bool:
        """Whether 16-bit files become grey."""
        return bool(self.file) and self.stretch is not None

    @property
    def scale(self) -> float:
        """What a number is divided by before data.mean and data.std: 8-bit pixels are 0 to 1."""
        return 255.0 if self.dtype == "uint8" else 1.0

    def choosing(self, names: Sequence[str], where: str, why: str) -> Inputs:
        """Some of the bands, in an order of their own. Raises UserError for one that is not there."""
        at = places(names, self.bands, where, why)
        by_band = {key: getattr(self, key) for key in ("bands", "quantiles", "mean", "std")}
        return self.model_copy(update={key: of and tuple(of[n] for n in at) for key, of in by_band.items()})

    def brought_to(self, wants: Inputs, where: str) -> Inputs:
        """As what images of these are read for a network, by the names of its bands.

        Raises UserError where a band is missing, or the numbers are of another unit that no rule leads to.
        """
        chosen = self.choosing(wants.bands, where, "the network was trained with")
        if (chosen.unit, chosen.dtype) == (wants.unit, wants.dtype):
            return chosen
        if chosen.unit == REFLECTANCE and wants.unit == "grey" and wants.stretch:
            rule = {"unit": "grey", "dtype": "uint8", "stretch": wants.stretch}
            return chosen.model_copy(update={**rule, "quantiles": None, "mean": None, "std": None})
        known = f"the network was trained on {wants.unit} ({wants.dtype})"
        is_told = (chosen.unit, wants.unit) == (DIGITAL_NUMBERS, REFLECTANCE)
        cure = f": if they are that, prepare them with --unit {shlex.quote(REFLECTANCE)}" if is_told else ""
        raise UserError(f"{where} holds {chosen.unit} ({chosen.dtype}), and {known}{cure}")

    def in_unit(self, unit: Unit, where: str) -> Inputs:
        """The same where a user says their unit. Raises UserError where that contradicts what is known."""
        if not self.file:
            raise UserError(f"--unit is for TIFFs of bands, and {where} is taken for RGB: --bands names bands")
        if (self.unit, unit) == (DIGITAL_NUMBERS, REFLECTANCE):
            return self.model_copy(update={"unit": unit})
        if self.unit != unit:
            only = ", and only 8-bit numbers are grey" if unit == GREY else ""
            raise UserError(f"--unit says {unit}, and {where} holds {self.unit}: {self.name}, {self.dtype}{only}")
        return self

    def normalisation(self, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """data.mean and data.std by default: ImageNet's of RGB, else those of the training images. Raises UserError."""
        if self.is_rgb:
            return IMAGENET_MEAN, IMAGENET_STD
        if self.mean is None or self.std is None:
            raise UserError(f"{where} has no statistics of {', '.join(self.bands)}: give data.mean and data.std")
        return tuple(m / self.scale for m in self.mean), tuple(s / self.scale or 1.0 for s in self.std)

    def measured(self, images: NDArray[Any]) -> Inputs:
        """With the quantiles of images [N, S, S, bands], unless prepare has measured all of them."""
        if self.mean is not None:
            return self
        pixels = images.reshape(-1, images.shape[-1])
        below = [np.bincount(band, minlength=256).cumsum() for band in pixels.T]
        quantiles = [np.searchsorted(counts, np.multiply(LEVELS, len(pixels))).tolist() for counts in below]
        return self.model_copy(update={"quantiles": tuple(map(tuple, quantiles))})

    def picture(self, images: NDArray[Any]) -> NDArray[np.uint8]:
        """For people to look at: images [..., bands] as uint8 [..., 3], in true colours where there are such bands.

        Numbers of 16 bits are stretched as the training images spread.
        """
        at = {canonical(name): n for n, name in enumerate(self.bands)}
        shown = [at[name] for name in RGB] if all(name in at for name in RGB) else [0, len(at) // 2, len(at) - 1]
        chosen = images if shown == list(range(images.shape[-1])) else images[..., shown]
        if self.dtype == "uint8":
            return chosen
        spread = np.array(self.quantiles or [(0.0, 10_000.0)] * len(at))[shown]
        dark, bright = spread[:, 0].min(), spread[:, -1].max()
        scaled = 255 * (chosen.astype(np.float32) - dark) / max(bright - dark, 1)
        grey: NDArray[np.uint8] = scaled.clip(0, 255).round().astype(np.uint8)
        return grey


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
EUROSAT_MS = Inputs(
    name="EuroSAT's 13 bands, known by its ten classes",
    bands=EUROSAT13,
    unit=REFLECTANCE,
    dtype="uint16",
    level="L1C",
    gsd=10,
    file=EUROSAT13,
)


def inputs_of(classes: Collection[str]) -> Inputs:
    """Those of a set of class folders: EuroSAT's, known by its ten classes, or 8-bit RGB pictures."""
    return EUROSAT if sorted(classes) == sorted(EUROSAT_CLASSES) else PICTURES


def inputs_of_bands(classes: Collection[str], bands: tuple[str, ...], dtype: Literal["uint8", "uint16"]) -> Inputs:
    """Those of TIFFs with these bands, in the files' order."""
    if dtype == "uint16" and bands == EUROSAT13 and inputs_of(classes) is EUROSAT:
        return EUROSAT_MS
    unit = GREY if dtype == "uint8" else DIGITAL_NUMBERS
    return Inputs(name=f"{len(bands)} bands by name", bands=bands, unit=unit, dtype=dtype, file=bands)
