"""Where a scene's bands are: in one file, in several of one band each, in a folder or zip of these, in a product."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rasterio.enums import ColorInterp

from hvd_eurosat.data.bands import canonical, described
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.bands import UNNAMED, metres_of_file, of_file, without_band
from hvd_eurosat.scene.files import SUFFIXES, Dataset, Rasters, indexes, open_raster, reading, shown
from hvd_eurosat.scene.product import (
    METADATA,
    Listing,
    Metadata,
    listing,
    metadata_above,
    metadata_file,
    read_metadata,
)

RGB = {ColorInterp.red: "B04", ColorInterp.green: "B03", ColorInterp.blue: "B02"}
_LEVEL = re.compile(r"(?<![A-Za-z0-9])(?:MSI)?(L1C|L2A)(?![A-Za-z0-9])", re.I)


@dataclass(frozen=True)
class Place:
    """A band: the file's path for GDAL and its number there, from 1.

    metres: as the file's name says. alone: the file's name says that it holds this band and no other.
    """

    file: str
    index: int
    metres: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class Found:
    """The bands of a scene by their names, with all places of each.

    paths: of the scene, as given. level: L1C or L2A, where names or metadata say it.
    """

    name: str
    bands: Mapping[str, Sequence[Place]]
    metadata: Metadata | None = None
    level: str | None = None
    others: Sequence[str] = field(default=())

    def place(self, name: str) -> Place | None:
        """The finest of a band's places. Raises UserError where there are several."""
        places = self.bands.get(canonical(name), ())
        if not places:
            return None
        finest = min(place.metres or 0 for place in places)
        best = [place for place in places if (place.metres or 0) == finest]
        if len(best) > 1:
            raise UserError(f"both {shown(best[0].file)} and {shown(best[1].file)} are {name}: name the scene's files")
        return best[0]


def split_scenes(what: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The scenes among paths: files of one band each that differ only in the band's name are one scene.

    names: what --bands says; so many files of one band are one scene, too.
    """
    paths = [Path(path) for path in what]
    plain = all(path.is_file() and path.suffix.lower() in SUFFIXES for path in paths)
    if plain and len(paths) > 1 and len(names) == len(paths) and all(map(_has_one_band, paths)):
        return [tuple(what)]
    scenes: dict[tuple[object, ...], list[str]] = {}
    for text, path in zip(what, paths, strict=True):
        one_band = path.suffix.lower() in SUFFIXES and of_file(path.stem) not in (None, "TCI")
        key = (path.parent, without_band(path.stem)) if one_band else (text,)
        scenes.setdefault(key, []).append(text)
    return [tuple(files) for files in scenes.values()]


def find(what: Sequence[str], names: Sequence[str], rasters: Rasters) -> Found:
    """The bands of one scene. names: what --bands says. Raises UserError."""
    paths = [Path(path).expanduser() for path in what]
    for path in paths:
        if not path.exists():
            raise UserError(f"no scene at {path}: it is a raster, files of one band each, or a folder or zip of these")
        if not _is_text(path):
            raise UserError(f"{path} has a name that is no text in UTF-8, as GDAL wants it: rename it")
    if len(paths) == 1:
        path = paths[0].parent if METADATA.fullmatch(paths[0].name) else paths[0]
        if path.is_dir() or path.suffix.lower() == ".zip":
            return _of_listing(listing(path), names, rasters)
    elif other := next((path for path in paths if not path.is_file()), None):
        raise UserError(f"{other} is no file: several paths of one scene are files of one band each")
    return _of_files(paths, names, rasters)


def _is_text(path: Path) -> bool:
    try:
        return bool(str(path.absolute()).encode())
    except UnicodeEncodeError:
        return False


def _of_listing(files: Listing, names: Sequence[str], rasters: Rasters) -> Found:
    described_by = metadata_file(files)
    top = str(PurePosixPath(described_by).parent) if described_by else "."
    images = [
        name for name in files.files if name.lower().endswith(SUFFIXES) and PurePosixPath(name).is_relative_to(top)
    ]
    if any("IMG_DATA" in name.split("/") for name in images):
        images = [name for name in images if "IMG_DATA" in name.split("/")]
        _refuse_several_granules(files, images)
    places: dict[str, list[Place]] = {}
    others = []
    for name in images:
        stem = PurePosixPath(name).stem
        if band := of_file(stem):
            places.setdefault(band, []).append(Place(files.files[name], 1, metres_of_file(stem), True))
        else:
            others.append(name)
    if not places and len(others) == 1 and not described_by:
        return _of_files([files.files[others[0]]], names, rasters)
    if not places:
        kinds = f"{len(others)} rasters whose names say no band" if others else "no GeoTIFF, JPEG 2000 or VRT in it"
        raise UserError(f"{files.path} has {kinds}: name the scene's files, and the bands with --bands")
    if names:
        raise UserError(f"the bands of {files.path} have their names in those of the files: leave --bands out")
    root = files.path.resolve() if top == "." else PurePosixPath(top)
    metadata: Metadata | None
    if described_by:
        metadata = read_metadata(files.read(described_by), str(files.path / described_by))
    else:
        above = metadata_above(files.path / "any") if files.path.is_dir() else None
        metadata, root = _metadata_at(above), above.parent if above else root
    name = root.name.removesuffix(".SAFE").removesuffix(".zip")
    return Found(name, places, metadata, _level(metadata, [root.name, *images]), others)


def _refuse_several_granules(files: Listing, images: Iterable[str]) -> None:
    granules = sorted({str(PurePosixPath(name.partition("IMG_DATA")[0])) for name in images})
    if len(granules) > 1:
        raise UserError(
            f"{files.path} has {len(granules)} granules ({granules[0]}, {granules[1]} …): give one of their folders"
        )


def _of_files(paths: Sequence[Path | str], names: Sequence[str], rasters: Rasters) -> Found:
    places: dict[str, list[Place]] = {}
    slots = [(str(path), index) for path in paths for index in indexes(rasters(str(path)))]
    given = [canonical(name) for name in names]
    if given:
        _check_names(given, slots)
    for number, (path, index) in enumerate(slots):
        name = given[number] if given else _own_name(rasters(path), path, index)
        if name and name != UNNAMED:
            places.setdefault(name, []).append(Place(path, index, metres_of_file(Path(path).stem)))
    first = Path(paths[0])
    metadata = None if str(first).startswith("/vsi") else _metadata_at(metadata_above(first))
    name = first.stem if len(paths) == 1 else without_band(first.stem) or first.resolve().parent.name
    unnamed = [f"band {index} of {Path(path).name}" for path, index in slots]
    return Found(name, places, metadata, _level(metadata, [Path(path).name for path in paths]), unnamed)


def _check_names(names: Sequence[str], slots: Sequence[tuple[str, int]]) -> None:
    if len(names) != len(slots):
        raise UserError(
            f"--bands names {len(names)} and {slots[0][0]} has {len(slots)}: name all bands in the file's order, "
            f"with {UNNAMED} for one that is not needed"
        )
    twice = {name for name in names if name != UNNAMED and names.count(name) > 1}
    if twice:
        raise UserError(f"--bands names {', '.join(sorted(twice))} twice")


def _has_one_band(path: Path) -> bool:
    with reading(str(path)), open_raster(str(path)) as dataset:
        return len(indexes(dataset)) == 1


def _own_name(dataset: Dataset, path: str, index: int) -> str | None:
    """A band's name by its description, by the colours of the file, or by the name of a file of one band."""
    text, colours = dataset.descriptions[index - 1], dataset.colorinterp
    if name := described(text):
        return name
    if set(RGB) <= set(colours):
        return RGB.get(colours[index - 1])
    if len(indexes(dataset)) == 1:
        return of_file(Path(path).stem) or text
    return str(text) if text else None  # some name of its own, for --mask


def _metadata_at(path: Path | None) -> Metadata | None:
    return read_metadata(Listing(path.parent, {}).read(path.name), str(path)) if path else None


def _level(metadata: Metadata | None, names: Iterable[str]) -> str | None:
    if metadata:
        return metadata.level
    found = next(filter(None, map(_LEVEL.search, names)), None)
    return found[1].upper() if found else None
