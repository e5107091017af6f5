"""Reading one image with suspicion, and many in threads."""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from rich.console import Console
from rich.progress import track

from hvd_eurosat.config.schema import Data

FORMATS = ("JPEG", "PNG", "TIFF")
MAX_SIDE = 4096  # pixels; a decoded image then takes 48 MiB at most
SAMPLES_PER_PIXEL, TILE_WIDTH = 277, 322  # tags of the TIFF 6.0 specification, sections 8 and 15

Item = TypeVar("Item")
Result = TypeVar("Result")


class BadImageError(Exception):
    """A file that cannot be used. The message is the reason alone: whoever knows the file's name adds it."""


def decode(data: bytes, size: int | None = None) -> Image.Image:
    """The 8-bit RGB image in a JPEG, PNG or TIFF file's bytes, decoded to its last row.

    size: the side in pixels that a square image must have; None takes any up to MAX_SIDE.
    Raises BadImageError. What the header gives away (size, mode, depth) is refused before any pixel is decoded.
    """
    if not data:
        raise BadImageError("the file is empty (0 bytes)")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImageError(f"its header claims more than {MAX_SIDE}x{MAX_SIDE} pixels") from None
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
        raise BadImageError(_why_unreadable(data)) from None
    _check_header(image, size)
    try:
        image.load()
    except Exception as error:
        raise BadImageError(f"it does not decode ({error})") from None
    return image


@dataclass(frozen=True)
class Crop:
    """What is done to an image before it gets its size: brought to `resize`, cut to its central `side`; 0: not that."""

    resize: int = 0
    side: int = 0

    @staticmethod
    def of(data: Data) -> "Crop":
        """That of a configuration."""
        return Crop(data.resize, data.center_crop)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The square that is left. Raises BadImageError where the image is smaller than that."""
        image = resize(image, self.resize) if self.resize else image
        if not self.side:
            return image
        width, height = image.size
        if min(width, height) < self.side:
            raise BadImageError(f"{width}x{height} pixels; data.center_crop is {self.side}")
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))


WHOLE = Crop()


def to_array(image: Image.Image, size: int, crop: Crop = WHOLE) -> NDArray[np.uint8]:
    """uint8 [size, size, 3], cropped, then resized (bilinear, antialiased) where the image has another size."""
    return np.asarray(resize(crop(image), size))


def resize(image: Image.Image, size: int) -> Image.Image:
    """The image at size x size pixels: bilinear, antialiased; itself when it has that size."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BILINEAR)


def in_threads(
    function: Callable[[Item], Result], items: Collection[Item], title: str, ahead: int = 0
) -> Iterator[Result]:
    """Results of function over items, in order, from one thread per core (Pillow lets go of the GIL).

    A progress bar shows on stderr when that is a terminal. Only a few results, or `ahead`, wait at any time. The
    first exception stops it.
    """
    console = Console(stderr=True)
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in track(items, title, console=console, disable=not console.is_terminal, transient=True):
            waiting.append(pool.submit(function, item))
            if len(waiting) > max(ahead, 8 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_header(image: Image.Image, size: int | None) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise BadImageError(f"its header claims {width}x{height} pixels; {MAX_SIDE} a side is the most")
    # A tile may be far larger than the image, and is decoded whole.
    if TILE_WIDTH in getattr(image, "tag_v2", ()):
        raise BadImageError("a TIFF in tiles; one in strips is wanted")
    # Pillow opens 16-bit RGB as RGB and drops the low bytes; only the raw mode tells.
    if "16" in image.mode or any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        raise BadImageError("16 bits a channel; 8-bit RGB is wanted")
    if image.mode != "RGB":
        raise BadImageError(f"mode {image.mode}; 8-bit RGB is wanted")
    if size is not None and (width, height) != (size, size):
        raise BadImageError(f"{width}x{height} pixels; {size}x{size} is wanted (prepare --resize makes them so)")


def _why_unreadable(data: bytes) -> str:
    if data[:4] in (b"II*\0", b"MM\0*"):
        bands = _tiff_bands(data)
        if bands > 4:
            return f"{bands}-band multispectral TIFF is not supported yet; use the RGB set"
    return "not a readable JPEG, PNG or TIFF image"


def _tiff_bands(data: bytes) -> int:
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = BytesIO(data)
        stream.seek(directory.next)
        directory.load(stream)
        return int(directory.get(SAMPLES_PER_PIXEL, 1))
    except Exception:  # a damaged TIFF is an unreadable one, whatever ails it
        return 1
