"""TIFFs of any number of bands, read by rasterio, with the suspicion that images.py has for pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvd_eurosat.data.bands import EUROSAT13, MOST, check_names, described
from hvd_eurosat.data.images import MAX_SIDE, WHOLE, BadImageError, Crop, decode, resize, to_array
from hvd_eurosat.data.inputs import EUROSAT, LEVELS, Inputs, inputs_of, inputs_of_bands
from hvd_eurosat.errors import UserError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_BYTES = 256 << 20  # of an image or a tile in memory
warnings.filterwarnings("ignore", message="Dataset has no geotransform")  # a patch may lie anywhere
OPTIONS = {"GDAL_CACHEMAX": 64 << 20, "CPL_LOG": os.devnull}  # libtiff's chatter
CHUNK = 64  # images that are counted at a time
TRIED = 16  # files of a set, to find a good one
Pixels = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """What a TIFF says of itself: how many bands, their one type, and their names where it has a name for each."""

    count: int
    dtype: str
    names: tuple[str, ...] | None


def is_tiff(data: bytes) -> bool:
    """By its first bytes."""
    return data.startswith(MAGIC)


def kind_of(data: bytes) -> Kind:
    """What a TIFF's header says. Raises BadImageError."""
    with _opened(data) as dataset:
        return _kind(dataset)


def recognise(
    read: Callable[[str], bytes], paths: Sequence[str], classes: Collection[str], bands: Sequence[str], where: str
) -> Inputs:
    """What the images of a set are, by its first good file and what the user says are its `bands`.

    Without these it has TIFFs of bands where their files name them, or where they are EuroSAT's 13. Raises UserError.
    """
    given = check_names(bands, "--bands") if bands else ()
    path, kind, flaw = _first_kind(read, paths, any_tiff=bool(given))
    if kind is None:
        if given:
            raise UserError(f"--bands is for TIFFs, and {where} has none that can be read{flaw}")
        return inputs_of(classes)
    names, dtype = kind.names, kind.dtype
    if given and len(given) != kind.count:
        raise UserError(f"--bands names {len(given)} bands, and {path} of {where} has {kind.count}")
    if given and names and given != names:
        raise UserError(f"--bands says {', '.join(given)}, and {path} of {where} says {', '.join(names)}")
    if not given and not names and (kind.count, inputs_of(classes)) == (len(EUROSAT13), EUROSAT):
        names = EUROSAT13
    known: dict[str, Literal["uint8", "uint16"]] = {"uint8": "uint8", "uint16": "uint16"}
    if dtype not in known:
        if given:
            cure = "gdal_translate -ot UInt16 makes such, for reflectances with -scale 0 1 0 10000"
            raise UserError(f"{path} of {where} holds {dtype}, and uint16 or uint8 is wanted: {cure}")
        return inputs_of(classes)
    names = given or names
    if not names or (not given and kind.count in (1, 3) and dtype == "uint8"):
        return inputs_of(classes)
    return inputs_of_bands(classes, check_names(names, f"{path} of {where}"), known[dtype])


def _first_kind(read: Callable[[str], bytes], paths: Sequence[str], any_tiff: bool) -> tuple[str, Kind | None, str]:
    """The first file that is a good TIFF, none after a picture unless `any_tiff`, and what it says of itself.

    Last what is wrong with the first bad file, to be said after a colon.
    """
    flaw = ""
    for path in paths[:TRIED]:
        try:
            data = read(path)
            if is_tiff(data):
                return path, kind_of(data), flaw
            decode(data)
        except BadImageError as error:
            flaw = flaw or f": {path}: {error}"
            continue
        if not any_tiff:
            break
    return "", None, flaw


def read_bands(data: bytes, bands: Sequence[str], dtype: str, size: int | None = None) -> Pixels:
    """The bands of a TIFF, uint8 or uint16 [h, w, bands]: by name where it names them, else they are its own in order.

    bands, dtype, size (None: any): what the file must have. Raises BadImageError.
    """
    with _opened(data) as dataset:
        found = _kind(dataset)
        if found.count != len(bands):
            raise BadImageError(f"{_bands(found.count)}; {len(bands)} are wanted: {', '.join(bands)}")
        if found.names and sorted(found.names) != sorted(bands):
            raise BadImageError(f"its bands are {', '.join(found.names)}; {', '.join(bands)} are wanted")
        if found.dtype != dtype:
            raise BadImageError(f"{found.dtype} numbers{_with_nan(dataset, found)}; {dtype} is wanted")
        if size is not None and (dataset.width, dataset.height) != (size, size):
            raise BadImageError(f"{dataset.width}x{dataset.height} pixels; {size}x{size} is wanted")
        order = [1 + (found.names or tuple(bands)).index(band) for band in bands]
        return np.ascontiguousarray(np.moveaxis(dataset.read(order), 0, -1))


def read_pixels(data: bytes, inputs: Inputs, native: int | None, size: int, crop: Crop = WHOLE) -> Pixels:
    """An image file as a network takes it: the bands of `inputs`, [size, size, bands] of its dtype.

    native: the side that the file must have. 16-bit files become grey by the stretch of such inputs, where they are
    known by one. Raises BadImageError.
    """
    if inputs.file:
        return shaped(load_bands(data, inputs, native), size, crop)
    pixels: Pixels = to_array(decode(data, native), size, crop)
    return pixels if inputs.is_whole else np.ascontiguousarray(pixels[..., inputs.places])


def load_bands(data: bytes, inputs: Inputs, native: int | None) -> Pixels:
    """As `read_pixels`, of a TIFF at its own size: [h, w, bands]."""
    dtype = "uint16" if inputs.is_stretched else inputs.dtype
    pixels = read_bands(data, inputs.file, dtype, native)[..., inputs.places]
    return grey(pixels, *inputs.stretch) if inputs.is_stretched and inputs.stretch else pixels


def grey(values: Pixels, black: float, white: float) -> NDArray[np.uint8]:
    """clip(round(1 + 254 x (v - black) / (white - black)), 1, 255), uint8, of any shape. What is not finite is 1."""
    scaled = 1 + 254 * (values.astype(np.float64) - black) / (white - black)
    return np.rint(np.clip(np.nan_to_num(scaled, nan=1, posinf=1, neginf=1), 1, 255)).astype(np.uint8)


def counted(inputs: Inputs, images: Iterable[Pixels]) -> NDArray[np.int64]:
    """How often each number is there in each band of images [S, S, bands]: [bands, 256], or 65536 of 16 bits."""
    counts = np.zeros((len(inputs.bands), np.iinfo(inputs.dtype).max + 1), np.int64)
    for chunk in _chunks(images):
        for band, pixels in enumerate(np.moveaxis(chunk, -1, 0)):
            counts[band] += np.bincount(pixels.ravel(), minlength=counts.shape[1])
    return counts


def measured(inputs: Inputs, counts: NDArray[np.int64]) -> Inputs:
    """With mean, standard deviation and quantiles (as numpy's, interpolated) of each band, from `counted`."""
    values = np.arange(counts.shape[1], dtype=np.float64)
    total = counts.sum(1)
    mean = counts @ values / total
    variance = [(count @ (values - middle) ** 2) / n for count, middle, n in zip(counts, mean, total, strict=True)]
    quantiles = tuple(tuple(map(float, _quantiles(count.cumsum()))) for count in counts)
    update = {"mean": tuple(mean.tolist()), "std": tuple(np.sqrt(variance).tolist()), "quantiles": quantiles}
    return inputs.model_copy(update=update)


def _chunks(images: Iterable[Pixels]) -> Iterator[Pixels]:
    chunk: list[Pixels] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def _quantiles(below: NDArray[np.int64]) -> NDArray[np.float64]:
    """At LEVELS, from how many numbers are at most 0, 1, 2 …; between two numbers it interpolates."""
    place = np.multiply(LEVELS, below[-1] - 1)
    low, high = (np.searchsorted(below, at, side="right") for at in (np.floor(place), np.ceil(place)))
    found: NDArray[np.float64] = low + (high - low) * (place - np.floor(place))
    return found


def shaped(pixels: Pixels, size: int, crop: Crop) -> Pixels:
    """[size, size, bands], cropped, then resized (bilinear, antialiased), each band by itself. Raises BadImageError."""
    if crop == WHOLE and pixels.shape[:2] == (size, size):
        return np.ascontiguousarray(pixels)
    bands = np.moveaxis(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32), -1, 0)
    resized = [np.asarray(resize(crop(Image.fromarray(np.ascontiguousarray(band))), size)) for band in bands]
    whole: Pixels = np.rint(np.stack(resized, -1)).astype(pixels.dtype)
    return whole


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The dataset of a TIFF's bytes, which refer to no other file. What GDAL raises becomes a BadImageError."""
    import rasterio  # a tenth of a second, and pictures do without it
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    if not is_tiff(data):
        raise BadImageError("not a TIFF, as the others of its set are")
    try:
        with rasterio.Env(**OPTIONS), MemoryFile(data) as file, file.open(driver="GTiff", sharing=False) as dataset:
            _check(dataset)
            yield dataset
    except (RasterioError, CPLE_BaseError, ValueError, ArithmeticError, OSError, MemoryError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise BadImageError(f"it does not decode ({reason})") from None


def _check(dataset: Any) -> None:
    if dataset.subdatasets:
        raise BadImageError("a TIFF of several pages; one image is wanted")
    if not 1 <= dataset.count <= MOST:
        raise BadImageError(f"a TIFF of {_bands(dataset.count)}; {MOST} is the most")
    sides = [(dataset.height, dataset.width), *dataset.block_shapes]
    if max(max(side) for side in sides) > MAX_SIDE:
        raise BadImageError(f"{dataset.width}x{dataset.height} pixels in pieces; {MAX_SIDE} a side is the most")
    widest = max(np.dtype(name).itemsize for name in dataset.dtypes)
    if max(height * width for height, width in sides) * dataset.count * widest > MAX_BYTES:
        raise BadImageError(f"it takes more than {MAX_BYTES >> 20} MB in memory")


def _kind(dataset: Any) -> Kind:
    dtypes = sorted(set(dataset.dtypes))
    if len(dtypes) > 1:
        raise BadImageError(f"bands of several kinds, {', '.join(dtypes)}")
    names = tuple(described(text) for text in dataset.descriptions)
    return Kind(dataset.count, dtypes[0], tuple(map(str, names)) if all(names) else None)


def _with_nan(dataset: Any, found: Kind) -> str:
    return ", some of them NaN" if found.dtype.startswith("float") and np.isnan(dataset.read()).any() else ""


def _bands(count: int) -> str:
    return "1 band" if count == 1 else f"{count} bands"
