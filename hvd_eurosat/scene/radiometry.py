"""How a scene's numbers become the grey values that a network knows. What cannot be known is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.inputs import LEVELS, Inputs
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.product import Metadata

QUANTIFICATION = 10_000  # digital numbers for a reflectance of 1
MOST_REFLECTANCE = 2.0  # of snow and of glint
PIECE = 1 << 20  # numbers at a time
LOW, HIGH = LEVELS.index(0.05), LEVELS.index(0.95)
FAR = 0.5  # of a scene's pixels, outside the middle nine tenths of the training images'
Pixels = NDArray[Any]


@dataclass(frozen=True)
class Band:
    """What a file says of the numbers of a band: value x scale + offset, where it gives these, is reflectance."""

    name: str
    dtype: np.dtype[Any]
    scale: float = 1.0
    offset: float = 0.0

    @property
    def is_grey(self) -> bool:
        """Whether these are 8-bit pixels."""
        return self.dtype == np.uint8


@dataclass(frozen=True)
class Rule:
    """For each band the file's numbers that become grey 1 and 255, None where they are grey values already.

    source: where that is known from. offsets: the digital numbers of reflectance 0, where they are those.
    """

    limits: tuple[tuple[float, float], ...] | None
    source: str
    offsets: tuple[float, ...] | None = None

    def __call__(self, values: Pixels, band: int) -> NDArray[np.uint8]:
        """Grey values of a band's numbers: clip(round(1 + 254 x (v - black) / (white - black)), 1, 255), uint8.

        Any shape. What is not finite becomes 1.
        """
        if self.limits is None:
            return values.astype(np.uint8, copy=False)
        black, white = self.limits[band]
        if values.dtype in (np.uint8, np.int8, np.uint16, np.int16):  # a table is quicker
            table = _table(values.dtype, black, white)
            return np.take(table, values.view(f"u{values.itemsize}"), mode="wrap")  # a mode that checks nothing
        flat, grey = values.reshape(-1), np.empty(values.size, np.uint8)
        for start in range(0, flat.size, PIECE):
            grey[start : start + PIECE] = _grey(flat[start : start + PIECE], black, white)
        return grey.reshape(values.shape)

    def facts(self, bands: Sequence[Band]) -> dict[str, object]:
        """For map.json: source, offset and stretch, the latter two by band or None."""
        named = [band.name for band in bands]
        return {
            "source": self.source,
            "offset": self.offsets and dict(zip(named, self.offsets, strict=True)),
            "stretch": self.limits and {name: list(pair) for name, pair in zip(named, self.limits, strict=True)},
        }


@lru_cache(maxsize=64)
def _table(dtype: np.dtype[Any], black: float, white: float) -> NDArray[np.uint8]:
    """The grey of each number, at its bits' place."""
    limits = np.iinfo(dtype)
    return np.roll(_grey(np.arange(limits.min, limits.max + 1), black, white), int(limits.min))


def _grey(values: Pixels, black: float, white: float) -> NDArray[np.uint8]:
    scaled = 1 + 254 * (values.astype(np.float64) - black) / (white - black)
    return np.rint(np.clip(np.nan_to_num(scaled, nan=1, posinf=1, neginf=1), 1, 255)).astype(np.uint8)


def decide(
    bands: Sequence[Band],
    wants: Inputs,
    product: Metadata | None,
    offset: float | None,
    stretch: tuple[float, float] | None,
    sample: NDArray[Any],
    path: str,
) -> Rule:
    """The rule for a scene's bands.

    offset, stretch: what the user says. sample: numbers of the scene, [bands, N]. Raises UserError, which names the
    flag that would tell, where it cannot be known.
    """
    if stretch is not None:
        return _by_stretch(len(bands), offset, stretch)
    kinds = {str(band.dtype) for band in bands}
    if all(band.is_grey for band in bands):
        if offset is not None:
            raise UserError(
                f"--offset is for digital numbers; {path} has 8-bit grey values, which are taken as they are"
            )
        return Rule(None, "8-bit values as they are")
    if any(band.is_grey for band in bands):
        raise UserError(f"{path} has 8-bit bands and others: give those of one kind")
    if wants.stretch is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(kinds))}, and the network knows {wants.name}: "
            "--stretch LOW,HIGH says which numbers become black and white"
        )
    if offset is not None:
        if offset < 0:
            raise UserError(f"--offset {offset:g}: give {-offset:g}, what the numbers carry (the metadata's, negated)")
        quantification = product.quantification if product else QUANTIFICATION
        return _from_digital([offset] * len(bands), quantification, wants, "--offset")
    if product is not None:
        return _by_product(bands, product, wants, path)
    if any((band.scale, band.offset) != (1, 0) for band in bands):
        limits = [[(dn / QUANTIFICATION - band.offset) / band.scale for dn in wants.stretch] for band in bands]
        return Rule(tuple((low, high) for low, high in limits), "reflectance, by the scale and offset in the file")
    if all(band.dtype.kind == "f" for band in bands):
        return _by_values(wants, sample, path)
    raise UserError(
        f"{path} holds {', '.join(sorted(kinds))} without metadata that say what the numbers are: give --offset 1000 "
        "for digital numbers of a product of January 2022 or later (baseline 04.00), --offset 0 for those of an older "
        "one or with the offset taken off, or --stretch LOW,HIGH"
    )


def _by_stretch(bands: int, offset: float | None, stretch: tuple[float, float]) -> Rule:
    low, high = stretch
    if offset is not None:
        raise UserError("--stretch is of the file's own numbers: leave --offset out")
    if not (np.isfinite([low, high]).all() and low < high):
        raise UserError(f"--stretch {low:g},{high:g}: the first must be less than the second")
    return Rule(((low, high),) * bands, "--stretch")


def _from_digital(offsets: Sequence[float], quantification: float, wants: Inputs, source: str) -> Rule:
    """Of digital numbers, reflectance = (DN - offset) / quantification."""
    scale = quantification / QUANTIFICATION
    low, high = wants.stretch or (0.0, 0.0)
    return Rule(
        tuple((offset + low * scale, offset + high * scale) for offset in offsets), source, tuple(map(float, offsets))
    )


def _by_product(bands: Sequence[Band], product: Metadata, wants: Inputs, path: str) -> Rule:
    offsets = product.offsets or {}
    if missing := [band.name for band in bands if band.name not in offsets]:
        raise UserError(
            f"{path}: its metadata (baseline {product.baseline}) say no offset of {', '.join(missing)}: "
            "give --offset 1000, or 0 where it is taken off"
        )
    source = f"metadata of the {product.level} product, baseline {product.baseline}"
    return _from_digital([offsets[band.name] for band in bands], product.quantification, wants, source)


def _by_values(wants: Inputs, sample: NDArray[Any], path: str) -> Rule:
    finite = sample[np.isfinite(sample)]
    if finite.size and np.quantile(finite, 0.99) > MOST_REFLECTANCE:
        raise UserError(
            f"{path} holds numbers such as {np.quantile(finite, 0.5):,.4g}, which are no reflectance (0 to 1): "
            "give --offset 0 (or 1000) if they are digital numbers, else --stretch LOW,HIGH"
        )
    low, high = wants.stretch or (0.0, 0.0)
    limits = (low / QUANTIFICATION, high / QUANTIFICATION)
    return Rule((limits,) * len(sample), "reflectance, as floating-point numbers of 0 to 1")


def unlike(grey: NDArray[np.uint8], wants: Inputs) -> str | None:
    """How far the scene's grey values, uint8 [bands, N], lie from the training images'; None where they do not."""
    if wants.quantiles is None or not grey.size:
        return None
    found = []
    for name, values, quantiles in zip(wants.bands, grey, wants.quantiles, strict=True):
        medians = f"(median {np.median(values):.0f} of 255, theirs {quantiles[LEVELS.index(0.5)]:.0f})"
        found.append(((values < quantiles[LOW]).mean(), "darker", name, medians))
        found.append(((values > quantiles[HIGH]).mean(), "brighter", name, medians))
    share, word, name, medians = max(found)
    if share <= FAR:
        return None
    return f"{share:.0%} of the pixels are {word} in {name} than 95 % of those of the training images {medians}"
