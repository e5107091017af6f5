"""Opening rasters with suspicion: local files of three formats, in pieces that fit into memory."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, Interleaving, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT

from hvd_eurosat.errors import UserError
from hvd_eurosat.scene import jpeg2000
from hvd_eurosat.scene.grid import Grid
from hvd_eurosat.scene.markup import MAX_BYTES, elements

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt")
MAGIC = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
ZIPPED = re.compile(r"/vsizip/\{(.*)\}/(.*)", re.S)
MAX_BLOCK = 512 << 20  # bytes of what must be read at once
MAX_NESTED = 4  # VRTs in VRTs
LEADS_AWAY = re.compile(r"\w{2,}:|.*/vsi(?!zip/|tar/|gzip/)", re.S)
# Rasters are local files: nothing is fetched, and no code in a VRT runs.
OPTIONS = {
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "none",
    "CPL_LOG": os.devnull,  # libtiff's chatter
}
Dataset = Any  # of rasterio, which has no types


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Around all that touches a raster: what GDAL makes of damaged bytes becomes a UserError that names the file.

    Any UserError is one line then, whatever the names of files.
    """
    try:
        with warnings.catch_warnings(), _undecodable_ignored(), rasterio.Env(**OPTIONS):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except UserError as error:
        raise UserError("\\n".join(str(error).splitlines())) from None
    except (RasterioError, CPLE_BaseError, ValueError, ArithmeticError, OSError, MemoryError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        name = "\\n".join(shown(path).splitlines())
        raise UserError(f"{name} cannot be read: it is damaged or cut short ({reason})") from None


@contextlib.contextmanager
def _undecodable_ignored() -> Iterator[None]:
    """rasterio takes GDAL's messages for UTF-8, and prints a traceback, twice, where they quote damaged bytes."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, *rest: None if kind is UnicodeDecodeError else hooks[0](kind, *rest)
    sys.unraisablehook = lambda found: None if found.exc_type is UnicodeDecodeError else hooks[1](found)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks


class Rasters:
    """The open datasets of a scene, each opened once, and views of them on another grid."""

    def __init__(self) -> None:
        self._open: dict[object, Dataset] = {}

    def __call__(self, path: str) -> Dataset:
        """The dataset at a path. Raises UserError."""
        if path not in self._open:
            self._open[path] = open_raster(path)
        return self._open[path]

    def view(self, path: str, grid: Grid, method: Resampling) -> tuple[Dataset, int]:
        """The dataset at a path as it is on a grid, and the number of its band that says where it has data."""
        dataset, key = self(path), (path, method)
        kinds = list(dataset.colorinterp)
        if key not in self._open:
            size = {"crs": grid.crs, "transform": grid.transform, "width": grid.width, "height": grid.height}
            nothing = None if method == Resampling.nearest else _nothing(dataset)
            alpha = ColorInterp.alpha not in kinds
            self._open[key] = WarpedVRT(dataset, resampling=method, src_nodata=nothing, add_alpha=alpha, **size)
        return self._open[key], kinds.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in kinds else len(kinds) + 1

    def close(self) -> None:
        """Close them all, views before what they are of."""
        while self._open:
            self._open.popitem()[1].close()


def _nothing(dataset: Dataset) -> float | None:
    """The number that says that there is no data, which must not bleed into the pixels beside it."""
    dtype = np.dtype(dataset.dtypes[0])
    if dataset.nodata is not None or MaskFlags.all_valid not in dataset.mask_flag_enums[0] or dtype == np.uint8:
        return None if dataset.nodata is None else float(dataset.nodata)
    return float("nan") if dtype.kind == "f" else 0.0


def indexes(dataset: Dataset) -> list[int]:
    """The numbers of the bands that are no alpha."""
    return [n for n, kind in zip(dataset.indexes, dataset.colorinterp, strict=True) if kind != ColorInterp.alpha]


def zipped(archive: Path, member: str) -> str:
    """A zip's member as GDAL knows it."""
    return f"/vsizip/{{{archive.resolve()}}}/{member}"


def shown(path: str) -> str:
    """A path as a person knows it."""
    found = ZIPPED.fullmatch(path)
    return f"{found[2]} in {found[1]}" if found else path


def open_raster(path: str) -> Dataset:
    """An open dataset. Raises UserError for what is not there, of another format, unsafe, or too large a piece."""
    driver = _driver(path)
    if driver == "VRT":
        _check_vrt(Path(path), MAX_NESTED)
    if driver == "JP2OpenJPEG":
        _check_jpeg2000(path)
    with reading(path), contextlib.ExitStack() as opened:
        dataset = opened.enter_context(rasterio.open(path, driver=driver, sharing=False))
        _check(dataset, path)
        opened.pop_all()
    return dataset


def _driver(path: str) -> str:
    if path.startswith("/vsizip/"):
        return "JP2OpenJPEG" if path.lower().endswith(".jp2") else "GTiff"
    head = _head(Path(path), 4096)
    for magic, driver in MAGIC.items():
        if head.startswith(magic):
            return driver
    if b"<VRTDataset" in head:
        return "VRT"
    raise UserError(f"{path} is no GeoTIFF, JPEG 2000 or VRT: gdal_translate makes a GeoTIFF of other rasters")


def _head(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _check_jpeg2000(path: str) -> None:
    zipped_in = ZIPPED.fullmatch(path)
    try:
        if zipped_in:
            with zipfile.ZipFile(zipped_in[1]) as archive, archive.open(zipped_in[2]) as member:
                jpeg2000.check(member, archive.getinfo(zipped_in[2]).file_size, shown(path))
        else:
            with open(path, "rb") as file:
                jpeg2000.check(file, os.path.getsize(path), path)
    except UserError:
        raise
    except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
        raise UserError(f"cannot read {shown(path)} ({error})") from None


def _check_vrt(path: Path, depth: int) -> None:
    """Raise UserError unless its sources are files on this machine."""
    if depth < 0:
        raise UserError(f"{path} is a VRT of VRTs of VRTs, or of itself: gdal_translate makes a GeoTIFF of it")
    found = elements(_head(path, MAX_BYTES + 1), str(path), ("SourceFilename", "SourceDataset"))
    for source, beside in {(text, attributes.get("relativeToVRT") == "1") for _, attributes, text in found}:
        if LEADS_AWAY.match(source):
            raise UserError(f"{path} takes pixels from {source[:200]}, and only files on this machine are read")
        file = path.parent / source if beside else Path(source)
        if source.startswith("/vsi"):
            continue
        if not file.is_file():
            raise UserError(f"{path} takes pixels from {file}, which is not there")
        if b"<VRTDataset" in _head(file, 4096):
            _check_vrt(file, depth - 1)


def _check(dataset: Dataset, path: str) -> None:
    if not dataset.count:
        raise UserError(f"{shown(path)} has no bands of its own: name one of its parts")
    if ColorInterp.palette in dataset.colorinterp:
        raise UserError(f"{shown(path)} has the colours of a palette: gdal_translate -expand rgb makes bands of them")
    together = dataset.count if dataset.interleaving == Interleaving.pixel else 1
    for (height, width), name in zip(dataset.block_shapes, dataset.dtypes, strict=True):
        if name.startswith("c"):
            raise UserError(f"{shown(path)} holds complex numbers, which are no reflectances")
        size = height * width * np.dtype(name).itemsize * together
        if size > MAX_BLOCK:
            raise UserError(
                f"{shown(path)} can be read in pieces of {size / 1e9:,.1f} GB only: "
                "gdal_translate -co TILED=YES makes tiles of it"
            )
    if dataset.driver == "GTiff" and not path.startswith("/vsi"):
        _check_length(dataset, path)


def _check_length(dataset: Dataset, path: str) -> None:
    """Raise UserError where the first or last blocks of a band lie behind the end of the file."""
    length = os.path.getsize(path)
    for band, (height, width) in zip(dataset.indexes, dataset.block_shapes, strict=True):
        last = (dataset.width - 1) // width, (dataset.height - 1) // height
        for column, row in {(0, 0), last}:
            offset, size = (
                dataset.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=band) for what in ("OFFSET", "SIZE")
            )
            if offset and size and int(offset) + int(size) > length:
                raise UserError(f"{path} is cut short: it should have {int(offset) + int(size):,} bytes at least")
