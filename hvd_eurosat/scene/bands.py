"""Which band is in which file of a scene: by its name."""

from __future__ import annotations

import re

from hvd_eurosat.data.bands import COMMON, TOKEN, of_token

UNNAMED = "-"
_LANDSAT = re.compile(r"^L[COETM]\d\d_", re.I)
_METRES = re.compile(r"(?<![A-Za-z0-9])([1-9]0)m(?![A-Za-z0-9])", re.I)


def of_file(stem: str) -> str | None:
    """The band in the name of a file of one band, such as T32TPS_20230701T101031_B04_10m.

    Landsat's bands have the same names and are others.
    """
    if _LANDSAT.match(stem):
        return None
    if common := COMMON.get(stem.lower()):
        return common
    found = list(TOKEN.finditer(stem))
    return of_token(found[-1]) if found else None


def metres_of_file(stem: str) -> int | None:
    """The resolution in the name of a file of an L2A product."""
    found = _METRES.search(stem)
    return int(found[1]) if found else None


def without_band(stem: str) -> str:
    """The name of a file of one band without band and resolution: the same for all files of a scene."""
    return _METRES.sub("", TOKEN.sub("", stem)).strip("_-. ")
