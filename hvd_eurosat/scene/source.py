"""A scene as the network takes it: the bands it wants, on one grid, as grey values, with what is masked."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import MaskFlags, Resampling
from rasterio.windows import Window

from hvd_eurosat.data.bands import canonical
from hvd_eurosat.data.inputs import Inputs
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.bands import of_file
from hvd_eurosat.scene.files import Dataset, Rasters, indexes, reading, shown
from hvd_eurosat.scene.finding import Found, Place, find
from hvd_eurosat.scene.grid import Grid, grid_of, ground_distances, resampled
from hvd_eurosat.scene.radiometry import Band, Rule, Said, decide, unlike
from hvd_eurosat.scene.windows import slice_rows

WHOLE = slice(None)
# Of the scene classification (Sentinel-2 L2A): no data, defective, cloud shadow, cloud of medium and high probability,
# thin cirrus.
SCL_MASKED = (0, 1, 3, 8, 9, 10)
SAMPLE, PATCH = 3, 96  # places along each side at which a scene is looked at, and pixels of each
SAMPLE_IF_EMPTY = 8
LEAST_RED = 0.87  # of blue's spread; EuroSAT's classes have from 0.9 (forest) to 2.3, and 1.7 in all
OTHER_SCALE, NONSENSE = 1.1, 1.9  # ratio of ground sampling distances that is told, and that is refused


@dataclass(frozen=True)
class SceneOptions:
    """What the user says of a scene: see the flags of `map`. cache: bytes for decoded blocks of files."""

    bands: tuple[str, ...] = ()
    offset: float | None = None
    stretch: tuple[float, float] | None = None
    resolution: float | None = None
    mask: str | None = None
    cache: int = 256 << 20


@dataclass(frozen=True)
class Layer:
    """A band on the scene's grid. alpha: the band that says where there is data, of a dataset that was resampled."""

    dataset: Dataset
    index: int
    path: str
    alpha: int | None = None

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """The numbers in a window, and where they are data (None: everywhere). Raises UserError."""
        with reading(self.path):
            values = self.dataset.read(self.index, window=window)
            flags = set(self.dataset.mask_flag_enums[self.index - 1])
            nothing = self.dataset.nodatavals[self.index - 1]
            if self.alpha:
                valid = self.dataset.read(self.alpha, window=window) != 0
            elif MaskFlags.all_valid in flags or (flags == {MaskFlags.nodata} and nothing == 0):
                valid = None  # a dark pixel may be 0 in one band: only where all are is there no data
            elif flags == {MaskFlags.nodata}:
                valid = values != nothing
            else:
                valid = self.dataset.read_masks(self.index, window=window) != 0
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            valid = finite if valid is None else valid & finite
        return values, valid


@dataclass(frozen=True)
class Mask:
    """A layer of classes; None: all but 0."""

    layer: Layer
    classes: tuple[int, ...] | None

    def read(self, window: Window) -> NDArray[np.bool_]:
        """Where pixels are masked. What the layer does not cover is."""
        values, valid = self.layer.read(window)
        masked = values != 0 if self.classes is None else np.isin(values, self.classes)
        # Many masks say that 0, their clear sky, is no data: only what was resampled has places that it does not cover.
        return masked | ~valid if self.layer.alpha and valid is not None else masked


@dataclass(frozen=True)
class Scene:
    """An open scene; close it, or use it in a `with`. One thread at a time may read.

    path: as it was given; name: for its folder; grid: that windows count in; bands: read, in the network's order;
    rule: how values became the network's; warnings: for people; wants: what the network takes; cache: see SceneOptions.
    """

    path: str
    name: str
    grid: Grid
    bands: tuple[str, ...]
    rule: dict[str, object]
    warnings: list[str]
    grey: Rule
    layers: Sequence[Layer]
    mask: Mask | None
    rasters: Rasters
    wants: Inputs
    cache: int

    @property
    def rows_per_block(self) -> int:
        """Rows that are best read together, and from a multiple of them on."""
        return max(int(layer.dataset.block_shapes[layer.index - 1][0]) for layer in self.layers)

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        self.rasters.close()

    def read(
        self, rows: slice, columns: slice = WHOLE, tick: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The pixels of some rows and columns of the grid, [bands, h, w], and where they are masked, bool [h, w].

        uint8, or uint16 for a network of such. Masked pixels, those without data too, are 0 in all bands. tick: called
        after each piece of the file. Raises UserError where a file is damaged.
        """
        top, bottom, _ = rows.indices(self.grid.height)
        left, right, _ = columns.indices(self.grid.width)
        grey = np.empty((len(self.layers), bottom - top, right - left), self.grey.dtype)
        masked = np.empty(grey.shape[1:], np.bool_)
        step = slice_rows(self.rows_per_block)  # so that each block of the file is decoded once
        cuts = [top, *range((top // step + 1) * step, bottom, step), bottom]
        with rasterio.Env(GDAL_CACHEMAX=self.cache):
            for first, end in itertools.pairwise(cuts):
                part = slice(first - top, end - top)
                masked[part] = self._read(Window(left, first, right - left, end - first), grey[:, part])
                tick()
        return grey, masked

    def _read(self, window: Window, grey: NDArray[Any]) -> NDArray[np.bool_]:
        """A part of them into `grey`; where they are masked."""
        masked, empty = np.zeros(grey.shape[1:], np.bool_), np.ones(grey.shape[1:], np.bool_)
        for band, layer in enumerate(self.layers):
            values, valid = layer.read(window)
            self.grey.into(grey[band], values, band)
            if empty.any():
                empty &= values == 0
            if valid is not None:
                masked |= ~valid
        masked |= empty  # not one pixel of EuroSAT is
        if self.mask:
            masked |= self.mask.read(window)
        grey[:, masked] = 0
        return masked


def open_scene(what: Sequence[str], wants: Inputs, options: SceneOptions) -> Scene:
    """The scene at these paths (one, or files of one band each) for a network that wants such inputs.

    Raises UserError for what is not there, damaged or unsafe, and for what is not known, with the flag that says it.
    """
    path = what[0] if len(what) == 1 else f"{what[0]} and {len(what) - 1} more"
    rasters = Rasters()
    try:
        with reading(path), rasterio.Env(GDAL_CACHEMAX=options.cache):
            return _opened(path, find(what, options.bands, rasters), wants, options, rasters)
    except BaseException:
        rasters.close()
        raise


def _opened(path: str, found: Found, wants: Inputs, options: SceneOptions, rasters: Rasters) -> Scene:
    places = [_wanted(found, name, path) for name in wants.bands]
    grid = _grid(places, wants.bands, rasters, options.resolution)
    layers = [_layer(place, grid, rasters, Resampling.bilinear) for place in places]
    mask = _mask(options.mask, found, grid, rasters) if options.mask else None
    bands = [_band(layer, canonical(name)) for layer, name in zip(layers, wants.bands, strict=True)]
    sample = _sample(layers, grid)
    grey = decide(Said(path, bands, found.metadata, options.offset, options.stretch, sample), wants)
    rule = {**grey.facts(bands), "level": found.level, "inputs": wants.name}
    warnings = [
        *_of_kind(path, bands, layers, wants, options, found),
        *_of_place(path, grid, layers, wants, options.resolution),
        *_of_sample(path, sample, grey, wants, given=bool(options.bands)),
    ]
    name = os.fsencode(found.name).decode(errors="replace")
    return Scene(path, name, grid, wants.bands, rule, warnings, grey, layers, mask, rasters, wants, options.cache)


def _wanted(found: Found, name: str, path: str) -> Place:
    place = found.place(name)
    if place is None:
        has = f"has {', '.join(sorted(found.bands))}" if found.bands else f"has {', '.join(found.others)}, of no name"
        raise UserError(f"{path} has no band {name} that is known by name; it {has}: --bands names them in order")
    return place


def _grid(places: Sequence[Place], names: Sequence[str], rasters: Rasters, resolution: float | None) -> Grid:
    """The finest of the bands' grids, or one of another resolution."""
    grids = [grid_of(rasters(place.file)) for place in places]
    for grid, place in zip(grids, places, strict=True):
        if grid.transform.determinant == 0 or not np.isfinite(list(grid.transform)).all():
            raise UserError(f"{shown(place.file)} has a transform that puts all pixels in one place: it is damaged")
    finest = min(grids, key=lambda grid: abs(grid.transform.determinant))
    for grid, name, place in zip(grids, names, places, strict=True):
        if grid.crs != finest.crs:
            raise UserError(
                f"{shown(place.file)} ({name}) is in {_of_crs(grid)}, another band in {_of_crs(finest)}: "
                "gdalwarp brings it there"
            )
        if not finest.agrees(grid) and (grid.crs is None or not finest.covers(grid)):
            raise UserError(f"{shown(place.file)} ({name}) covers another place than the other bands")
    if resolution is None:
        return finest
    return resampled(finest, resolution, shown(places[0].file))


def _of_crs(grid: Grid) -> str:
    return grid.crs.to_string()[:60] if grid.crs else "no coordinate system"


def _layer(place: Place, grid: Grid, rasters: Rasters, method: Resampling) -> Layer:
    dataset = rasters(place.file)
    if place.alone and len(indexes(dataset)) != 1:
        raise UserError(f"{shown(place.file)} has {dataset.count} bands and the name of one: give the file itself")
    if grid.agrees(grid_of(dataset)):
        return Layer(dataset, place.index, place.file)
    view, alpha = rasters.view(place.file, grid, method)
    return Layer(view, place.index, place.file, alpha)


def _mask(spec: str, found: Found, grid: Grid, rasters: Rasters) -> Mask:
    """What --mask says: a band by name, or a file, and after = the classes, such as SCL=3,8,9."""
    listed = re.fullmatch(r"(.+)=(\d{1,5}(?:,\d{1,5})*)", spec)
    name = str(Path(listed[1] if listed else spec).expanduser())
    place = found.place(name)
    if place is None:
        if not Path(name).is_file():
            has = ", ".join(sorted(found.bands))
            raise UserError(f"--mask {name} is neither a file nor a band; the scene has {has or 'no names of bands'}")
        place = Place(name, 1)
    dataset = rasters(place.file)
    if place.file == name and dataset.count != 1:
        raise UserError(f"--mask {name} has {dataset.count} bands, and a mask has one")
    theirs = grid_of(dataset)
    if not grid.agrees(theirs) and (theirs.crs is None or grid.crs is None):
        raise UserError(f"--mask {name} has no coordinate system to bring it to the scene's pixels by")
    is_scl = "SCL" in (canonical(name), of_file(Path(name).stem))
    classes = tuple(map(int, listed[2].split(","))) if listed else SCL_MASKED if is_scl else None
    return Mask(_layer(place, grid, rasters, Resampling.nearest), classes)


def _band(layer: Layer, name: str) -> Band:
    dataset, at = layer.dataset, layer.index - 1
    return Band(name, np.dtype(dataset.dtypes[at]), dataset.scales[at], dataset.offsets[at])


def _of_kind(
    path: str, bands: Sequence[Band], layers: Sequence[Layer], wants: Inputs, options: SceneOptions, found: Found
) -> Iterator[str]:
    """Warnings of another kind of product than the network's."""
    if wants.level and found.level and found.level != wants.level:
        yield (
            f"{path} is {found.level}, and the network learned from {wants.level}: it knows more haze than there is, "
            "so expect errors"
        )
    if wants.stretch and bands[0].is_grey and any(of_file(Path(layer.path).stem) == "TCI" for layer in layers):
        yield f"{path} is ESA's true-colour picture, whose grey values are others: give the product's bands"
    known = (found.metadata and found.metadata.offsets) or {}
    others = sorted({known[band.name] for band in bands if band.name in known} - {options.offset})
    if options.offset is not None and others:
        yield f"{path}: --offset {options.offset:g} is not what its metadata say ({others[0]:g})"


def _of_place(path: str, grid: Grid, layers: Sequence[Layer], wants: Inputs, resolution: float | None) -> Iterator[str]:
    """Warnings of where the scene is and of the size of its pixels. Raises UserError where that makes no sense."""
    if grid.crs is None:
        points = "ground control points only (gdalwarp uses them)" if layers[0].dataset.gcps[0] else "none"
        yield f"{path} has no coordinate system, {points}: the map is in pixels"
        return
    distances = ground_distances(grid)
    if distances is None:
        raise UserError(
            f"{path} lies at no place on Earth by its coordinate system, {_of_crs(grid)}: gdal_translate -a_srs gives "
            "it the right one"
        )
    if wants.gsd is None:
        return
    ratio = math.sqrt(distances[0] * distances[1]) / wants.gsd
    size = f"pixels of {distances[0]:.3g} x {distances[1]:.3g} m, and the network learned from {wants.gsd:g} m"
    if max(ratio, 1 / ratio) > NONSENSE and resolution is None:
        raise UserError(f"{path} has {size}: --resolution {wants.gsd:g} resamples it, another maps it nonetheless")
    if any(max(d / wants.gsd, wants.gsd / d) > OTHER_SCALE for d in distances):
        yield f"{path} has {size}: --resolution {wants.gsd:g} resamples it"


def _of_sample(path: str, sample: NDArray[Any], grey: Rule, wants: Inputs, given: bool) -> Iterator[str]:
    """Warnings of values that are not like the training images', or of bands whose names, as given, seem swapped."""
    if not sample.size:
        yield f"{path} has no data at any place that was looked at"
        return
    looks = np.stack([grey(values, band) for band, values in enumerate(sample)])
    if far := unlike(looks, wants):
        yield f"{path}: {far}: is it another kind of image, or the offset another?"
    spread = dict(zip(map(canonical, wants.bands), looks.std(1), strict=True))
    if given and spread.get("B04", 0) < LEAST_RED * spread.get("B02", 0):
        yield f"{path}: blue varies more than red, which is rare: are --bands in the file's order?"


def _sample(layers: Sequence[Layer], grid: Grid) -> NDArray[Any]:
    """Numbers that are data from places spread over the scene, [bands, N]."""
    for count in (SAMPLE, SAMPLE_IF_EMPTY):
        found = [_look(layers, window) for window in _windows(grid, count)]
        together = np.concatenate(found, axis=1)
        if together.size:
            break
    return together


def _windows(grid: Grid, count: int) -> Iterator[Window]:
    height, width = min(PATCH, grid.height), min(PATCH, grid.width)
    for row in range(count):
        for column in range(count):
            top, left = (grid.height - height) * (2 * row + 1), (grid.width - width) * (2 * column + 1)
            yield Window(left // (2 * count), top // (2 * count), width, height)


def _look(layers: Sequence[Layer], window: Window) -> NDArray[Any]:
    values, valid = zip(*(layer.read(window) for layer in layers), strict=True)
    together = np.stack(values)
    keep = (together != 0).any(0)
    for one in valid:
        keep &= True if one is None else one
    return together[:, keep]
