"""Which band is which: by name, never by position."""

from __future__ import annotations

import re

# As in STAC catalogues.
COMMON = {
    "coastal": "B01",
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "nir09": "B09",
    "cirrus": "B10",
    "swir16": "B11",
    "swir22": "B12",
}
# In the order of the numbers that metadata give to them.
SENTINEL2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
UNNAMED = "-"
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:B(0?[1-9]|1[0-2]|8A)|(SCL|TCI|AOT|WVP))(?![A-Za-z0-9])", re.I)
_LANDSAT = re.compile(r"^L[COETM]\d\d_", re.I)
_METRES = re.compile(r"(?<![A-Za-z0-9])([1-9]0)m(?![A-Za-z0-9])", re.I)


def canonical(name: str) -> str:
    """A band's one name: B04 for b4, B4 and red, B8A for b8a, SCL for scl; any other as it is."""
    if common := COMMON.get(name.strip().lower()):
        return common
    found = _TOKEN.fullmatch(name.strip())
    return _name(found) if found else name.strip()


def described(text: str | None) -> str | None:
    """The band that a description is of: "B4, central wavelength 665 nm", "B04", "Red"; None where it says none."""
    if not text:
        return None
    if common := COMMON.get(text.strip().lower()):
        return common
    found = _TOKEN.match(text.strip())
    return _name(found) if found else None


def of_file(stem: str) -> str | None:
    """The band in the name of a file of one band, such as T32TPS_20230701T101031_B04_10m.

    Landsat's bands have the same names and are others.
    """
    if _LANDSAT.match(stem):
        return None
    if common := COMMON.get(stem.lower()):
        return common
    found = list(_TOKEN.finditer(stem))
    return _name(found[-1]) if found else None


def metres_of_file(stem: str) -> int | None:
    """The resolution in the name of a file of an L2A product."""
    found = _METRES.search(stem)
    return int(found[1]) if found else None


def without_band(stem: str) -> str:
    """The name of a file of one band without band and resolution: the same for all files of a scene."""
    return _METRES.sub("", _TOKEN.sub("", stem)).strip("_-. ")


def _name(found: re.Match[str]) -> str:
    number, other = found.groups()
    return str(other).upper() if other else f"B{number.upper().zfill(2)}"
