"""How a scene's numbers become those that a network knows. What cannot be known is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.inputs import LEVELS, REFLECTANCE, Inputs
from hvd_eurosat.data.multispectral import grey
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.product import Metadata

QUANTIFICATION = 10_000  # digital numbers for a reflectance of 1
MOST_REFLECTANCE = 2.0  # of snow and of glint
PIECE = 1 << 15  # numbers at a time, so that what is made of them in between stays in the core's cache
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
class Said:
    """All that says what a scene's numbers are.

    product: the metadata of the product that it is of; offset, stretch: what the user says; sample: numbers of the
    scene, [bands, N].
    """

    path: str
    bands: Sequence[Band]
    product: Metadata | None
    offset: float | None
    stretch: tuple[float, float] | None
    sample: Pixels

    @property
    def kinds(self) -> str:
        """The dtypes of the bands."""
        return ", ".join(sorted({str(band.dtype) for band in self.bands}))


@dataclass(frozen=True)
class Rule:
    """For each band the file's numbers that become grey 1 and 255, None where they are what the network takes already.

    source: where that is known from. offsets: the digital numbers of reflectance 0, where they are those. dtype: of
    what a network takes; of uint16 the limits become 0 and 10,000, which is reflectance 0 and 1.
    """

    limits: tuple[tuple[float, float], ...] | None
    source: str
    offsets: tuple[float, ...] | None = None
    dtype: Literal["uint8", "uint16"] = "uint8"

    def __call__(self, values: Pixels, band: int) -> Pixels:
        """What a network takes for a band's numbers: `grey`, uint8, or reflectance x 10,000, uint16. Any shape."""
        taken = np.empty(values.shape, self.dtype)
        self.into(taken, values, band)
        return taken

    def into(self, taken: Pixels, values: Pixels, band: int) -> None:
        """The same, put into an array of that shape and dtype, which is contiguous."""
        if self.limits is None:
            taken[...] = values
            return
        black, white = self.limits[band]
        has_table = values.dtype in (np.uint8, np.int8, np.uint16, np.int16)  # which is quicker
        table = _table(values.dtype, black, white, self.dtype) if has_table else None
        numbers, to = values.reshape(-1), taken.reshape(-1)
        for start in range(0, numbers.size, PIECE):
            some = slice(start, start + PIECE)
            if table is None:
                to[some] = CONVERTED[self.dtype](numbers[some], black, white)
            else:  # by the mode that checks nothing
                np.take(table, numbers[some].view(f"u{values.itemsize}"), mode="wrap", out=to[some])

    def facts(self, bands: Sequence[Band]) -> dict[str, object]:
        """For map.json: source, offset and stretch, the latter two by band or None."""
        named = [band.name for band in bands]
        return {
            "source": self.source,
            "offset": self.offsets and dict(zip(named, self.offsets, strict=True)),
            "stretch": self.limits and {name: list(pair) for name, pair in zip(named, self.limits, strict=True)},
        }


@lru_cache(maxsize=64)
def _table(dtype: np.dtype[Any], black: float, white: float, taken: str) -> Pixels:
    """What each number becomes, at its bits' place."""
    limits = np.iinfo(dtype)
    return np.roll(CONVERTED[taken](np.arange(limits.min, limits.max + 1), black, white), int(limits.min))


def _reflectance(values: Pixels, zero: float, one: float) -> Pixels:
    """Reflectance x 10,000, uint16, of numbers of which two are reflectance 0 and 1. What is not finite becomes 0."""
    scaled = QUANTIFICATION * (values.astype(np.float64) - zero) / (one - zero)
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0, posinf=0, neginf=0), 0, 65535)).astype(np.uint16)


CONVERTED = {"uint8": grey, "uint16": _reflectance}


def decide(said: Said, wants: Inputs) -> Rule:
    """The rule for a scene's bands. Raises UserError, which names the flag that would tell, where it is not known."""
    if wants.dtype == "uint8":
        return _to_grey(said, wants)
    if said.stretch is not None:
        raise UserError(f"--stretch is for networks that take grey values; this one takes {wants.unit}")
    if wants.unit != REFLECTANCE:
        if said.offset is not None or said.kinds != "uint16":
            raise UserError(
                f"the network takes {wants.unit} (uint16) as they were in its files: leave --offset out, and give "
                f"such a scene; {said.path} holds {said.kinds}"
            )
        return Rule(None, f"{wants.unit} as they are", dtype="uint16")
    if any(band.is_grey for band in said.bands):
        raise UserError(f"{said.path} has 8-bit bands, and the network takes {wants.unit}: give the digital numbers")
    whole = wants.model_copy(update={"stretch": (0.0, float(QUANTIFICATION))})
    return replace(_to_grey(said, whole), dtype="uint16")


def _to_grey(said: Said, wants: Inputs) -> Rule:
    """As `decide`, by wants.stretch."""
    bands, path, offset = said.bands, said.path, said.offset
    if said.stretch is not None:
        return _by_stretch(len(bands), offset, said.stretch)
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
            f"{path} holds {said.kinds}, and the network knows {wants.name}: "
            "--stretch LOW,HIGH says which numbers become black and white"
        )
    if offset is not None:
        if offset < 0:
            raise UserError(f"--offset {offset:g}: give {-offset:g}, what the numbers carry (the metadata's, negated)")
        quantification = said.product.quantification if said.product else QUANTIFICATION
        return _from_digital([offset] * len(bands), quantification, wants, "--offset")
    if said.product is not None:
        return _by_product(bands, said.product, wants, path)
    if any((band.scale, band.offset) != (1, 0) for band in bands):
        limits = [[(dn / QUANTIFICATION - band.offset) / band.scale for dn in wants.stretch] for band in bands]
        return Rule(tuple((low, high) for low, high in limits), "reflectance, by the scale and offset in the file")
    if all(band.dtype.kind == "f" for band in bands):
        return _by_values(wants, said.sample, path)
    raise UserError(
        f"{path} holds {said.kinds} without metadata that say what the numbers are: give --offset 1000 "
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


def _by_values(wants: Inputs, sample: Pixels, path: str) -> Rule:
    finite = sample[np.isfinite(sample)]
    if finite.size and np.quantile(finite, 0.99) > MOST_REFLECTANCE:
        raise UserError(
            f"{path} holds numbers such as {np.quantile(finite, 0.5):,.4g}, which are no reflectance (0 to 1): "
            "give --offset 0 (or 1000) if they are digital numbers, else --stretch LOW,HIGH"
        )
    low, high = wants.stretch or (0.0, 0.0)
    limits = (low / QUANTIFICATION, high / QUANTIFICATION)
    return Rule((limits,) * len(sample), "reflectance, as floating-point numbers of 0 to 1")


def unlike(taken: Pixels, wants: Inputs) -> str | None:
    """How far a scene's numbers as a network takes them, [bands, N], lie from the training images'; None where not."""
    if wants.quantiles is None or not taken.size:
        return None
    found, most = [], " of 255" if wants.dtype == "uint8" else ""
    for name, values, quantiles in zip(wants.bands, taken, wants.quantiles, strict=True):
        medians = f"(median {np.median(values):.0f}{most}, theirs {quantiles[LEVELS.index(0.5)]:.0f})"
        found.append(((values < quantiles[LOW]).mean(), "darker", name, medians))
        found.append(((values > quantiles[HIGH]).mean(), "brighter", name, medians))
    share, word, name, medians = max(found)
    if share <= FAR:
        return None
    return f"{share:.0%} of the pixels are {word} in {name} than 95 % of those of the training images {medians}"
