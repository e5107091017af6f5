"""The bands of Sentinel-2 by name, never by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from hvd_eurosat.errors import UserError

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
EUROSAT13 = (*(name for name in SENTINEL2 if name != "B8A"), "B8A")  # of EuroSAT's own files
RGB = ("B04", "B03", "B02")
MOST = 64  # bands of a set
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:B(0?[1-9]|1[0-2]|8A)|(SCL|TCI|AOT|WVP))(?![A-Za-z0-9])", re.I)


@lru_cache(maxsize=256)
def canonical(name: str) -> str:
    """A band's one name: B04 for b4, B4 and red, B8A for b8a, SCL for scl; any other as it is."""
    if common := COMMON.get(name.strip().lower()):
        return common
    found = TOKEN.fullmatch(name.strip())
    return of_token(found) if found else name.strip()


def described(text: str | None) -> str | None:
    """The band that a description is of: "B4, central wavelength 665 nm", "B04", "Red"; None where it says none."""
    if not text:
        return None
    if common := COMMON.get(text.strip().lower()):
        return common
    found = TOKEN.match(text.strip())
    return of_token(found) if found else None


def of_token(found: re.Match[str]) -> str:
    """The band's one name from a match of TOKEN."""
    number, other = found.groups()
    return str(other).upper() if other else f"B{number.upper().zfill(2)}"


def check_names(names: Sequence[str], flag: str) -> tuple[str, ...]:
    """Their one names. Raises UserError for none, too many, one without a name, or one twice."""
    known = tuple(map(canonical, names))
    if not 1 <= len(known) <= MOST:
        raise UserError(f"{flag} names {len(known)} bands; 1 to {MOST} are wanted")
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise UserError(f"{flag} names {twice} twice")
    if odd := [name for name in known if not name or not name.isprintable() or "," in name]:
        raise UserError(f"{flag}: {odd[0]!r} is no name of a band")
    return known


def places(wanted: Sequence[str], there: Sequence[str], where: str, why: str) -> tuple[int, ...]:
    """The place of each wanted band among those that are there. Raises UserError, which names the first that is not."""
    at = {canonical(name): place for place, name in enumerate(there)}
    if missing := [name for name in wanted if canonical(name) not in at]:
        raise UserError(f"{where} has no band {missing[0]}, which {why}; it has {', '.join(there)}")
    return tuple(at[canonical(name)] for name in wanted)
