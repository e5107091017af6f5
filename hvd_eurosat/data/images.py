"""Reading one image with suspicion, and many in threads."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, _imaging
from rich.console import Console
from rich.progress import track

from hvd_eurosat.data.bands import MOST
from hvd_eurosat.errors import UserError

if TYPE_CHECKING:  # prepare needs no configuration
    from hvd_eurosat.config.schema import Data

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
MAX_BYTES = 64 << 20  # of one image file
MAX_SIDE = 4096  # pixels; a decoded image then takes 48 MiB at most
SCENES = "map takes whole scenes"
MAX_PAGES = 16  # of a TIFF: the image and smaller copies of it
OTHERS = {  # what a file is that is no image of ours, by its first bytes
    b"GIF8": "a GIF image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"8BPS": "a Photoshop image",
    b"%PDF": "a PDF",
    b"PK\3\4": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"\x89HDF": "an HDF5 file",
    b"<!DO": "a web page: was its download refused?",
    b"<htm": "a web page: was its download refused?",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file with `git lfs pull`",
}
# Tags of the TIFF 6.0 specification, and the kinds of page that are not one more image (bits of tag 254).
KIND, PHOTOMETRIC, SAMPLES_PER_PIXEL, TILE_WIDTH, TILE_LENGTH = 254, 262, 277, 322, 323
REDUCED, MASK = 1, 4
RGB, SEPARATED = 2, 5  # values of PHOTOMETRIC: red, green and blue; CMYK
CONVERTIBLE = {"1": "black and white", "L": "grey", "I;16": "grey", "P": "palette", "CMYK": "CMYK", "YCbCr": "YCbCr"}

# decode() judges for itself, and whoever calls it names the file.
warnings.filterwarnings("ignore", module=r"PIL\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(OSError, AttributeError):  # libtiff writes to standard error
    _library = ctypes.CDLL(_imaging.__file__)
    _library.TIFFSetErrorHandler(None)
    _library.TIFFSetWarningHandler(None)

SHOWN_REASONS, SHOWN_FILES = 20, 50  # in an error
Item = TypeVar("Item")
Result = TypeVar("Result")


class BadImageError(Exception):
    """A file that cannot be used. The message is the reason alone: whoever knows the file's name adds it."""


class BadFilesError(UserError):
    """Files that cannot be used, all of them. flaws: the reason by file; total: of how many; cure: what helps."""

    def __init__(self, flaws: Mapping[str, str], total: int, where: str, cure: str) -> None:
        self.flaws, self.total, self.where, self.cure = flaws, total, where, cure
        super().__init__(list_flaws(f"{len(flaws):,} of {total:,} files of {where} cannot be used ({cure})", flaws))

    @staticmethod
    def together(errors: Sequence[BadFilesError], total: int) -> BadFilesError:
        """One error that names the files of all."""
        flaws = {file: reason for error in errors for file, reason in error.flaws.items()}
        return BadFilesError(flaws, total, errors[0].where, errors[0].cure)


def list_flaws(summary: str, flaws: Mapping[str, str]) -> str:
    """The summary, then each reason with its files, the most frequent first; in one line where there is one file."""
    if len(flaws) == 1:
        return f"{summary}: {': '.join(next(iter(flaws.items())))}"
    by_reason: dict[str, list[str]] = {}
    for file, reason in flaws.items():
        by_reason.setdefault(reason, []).append(file)
    lines = [f"{summary}:"]
    for reason, files in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:SHOWN_REASONS]:
        if len(files) == 1:
            lines.append(f"{files[0]}: {reason}")
        else:
            more = [f"… and {len(files) - SHOWN_FILES:,} more"] if len(files) > SHOWN_FILES else []
            lines.append(f"{len(files):,} files: {reason}: {', '.join([*files[:SHOWN_FILES], *more])}")
    if len(by_reason) > SHOWN_REASONS:
        lines.append(f"… and {len(by_reason) - SHOWN_REASONS:,} more reasons")
    return "\n  ".join(lines)


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImageError for one that is none, too large or not to be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImageError(f"{status.st_size:,} bytes; {MAX_BYTES:,} is the most ({SCENES})")
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror})") from None


def decode(data: bytes, size: int | None = None) -> Image.Image:
    """The 8-bit RGB image in an image file's bytes, decoded to its last row, turned as its EXIF orientation says.

    size: the side in pixels that a square image must have; None takes any up to MAX_SIDE.
    Raises BadImageError. What the header gives away (size, mode, depth) is refused before any pixel is decoded.
    """
    image, _ = decode_any(data, size, convert=False)
    return image


def decode_any(data: bytes, size: int | None = None, convert: bool = True) -> tuple[Image.Image, str]:
    """As `decode`, after converting other modes to 8-bit RGB: the image, and what it was converted from, "" if not.

    Grey is repeated, alpha laid on white, a palette looked up, CMYK converted without a profile, and of 16 bits the
    high byte is kept (value // 256).
    """
    if not data:
        raise BadImageError("the file is empty (0 bytes)")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImageError(f"its header claims more than {MAX_SIDE}x{MAX_SIDE} pixels ({SCENES})") from None
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
        raise BadImageError(_why_unreadable(data)) from None
    _check_header(image, size)
    flaws = _other_than_rgb(image)
    wrong = f"{_said(image, flaws)}; 8-bit RGB is wanted (prepare --convert makes it so)" if flaws else ""
    may_be_a_band = "alpha" in flaws and image.format == "TIFF"  # its values tell
    if wrong and not convert and not may_be_a_band:
        raise BadImageError(wrong)
    try:
        image.load()
    except Exception as error:
        raise BadImageError(f"it does not decode ({error})") from None
    if may_be_a_band:
        _check_alpha(image)
    if wrong and not convert:
        raise BadImageError(wrong)
    with contextlib.suppress(Exception):  # an EXIF block that cannot be read says nothing of an orientation
        ImageOps.exif_transpose(image, in_place=True)
    return (_to_rgb(image, flaws), " and ".join(flaws)) if flaws else (image, "")


@dataclass(frozen=True)
class Crop:
    """What is done to an image before it gets its size: brought to `resize`, cut to its central `side`; 0: not that."""

    resize: int = 0
    side: int = 0

    @staticmethod
    def of(data: Data) -> Crop:
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
        raise BadImageError(f"its header claims {width}x{height} pixels; {MAX_SIDE} a side is the most ({SCENES})")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        try:
            _check_tiff(image)
        except BadImageError:
            raise
        except Exception as error:  # a damaged directory may hold anything
            raise BadImageError(f"it does not decode ({error})") from None
    elif image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a camera's MPO holds copies of its image
        raise BadImageError(f"an animation of {image.n_frames} frames; one image is wanted")  # type: ignore[attr-defined]
    if size is not None and (width, height) != (size, size):
        raise BadImageError(f"{width}x{height} pixels; {size}x{size} is wanted (prepare --resize makes them so)")


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise BadImageError for tiles beyond measure, for several pages, and for bands that may be anything."""
    tags = image.tag_v2
    tile = int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0))
    if max(tile) > MAX_SIDE:  # a tile may be far larger than the image, and is decoded whole
        raise BadImageError(f"a TIFF in tiles of {tile[0]}x{tile[1]} pixels; {MAX_SIDE} a side is the most")
    bands, photometric = int(tags.get(SAMPLES_PER_PIXEL, 1)), int(tags.get(PHOTOMETRIC, 0))
    known = {RGB: 3, SEPARATED: 4}.get(photometric, bands)
    if bands > known and not (photometric == RGB and image.mode == "RGBA" and bands == 4):
        raise BadImageError(_bands(bands))
    try:
        for page in range(1, MAX_PAGES + 1):
            image.seek(page)
            if not int(image.tag_v2.get(KIND, 0)) & (REDUCED | MASK):
                raise BadImageError("a TIFF of several pages; one image is wanted")
        raise BadImageError(f"a TIFF of more than {MAX_PAGES} pages")
    except EOFError:
        image.seek(0)


def _bands(bands: int) -> str:
    if bands > MOST:
        return f"a TIFF of {bands} bands; {MOST} is the most"
    return f"a TIFF of {bands} bands, of which nobody can tell the red, green and blue: prepare --bands names them"


def _other_than_rgb(image: Image.Image) -> list[str]:
    """What must be converted to make it 8-bit RGB. Raises BadImageError where nothing can be."""
    # Pillow opens 16-bit RGB as RGB and drops the low bytes; only the raw mode tells.
    deep = "16" in image.mode or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    flaws = ["16 bits a channel"] if deep else []
    mode = image.mode.replace("I;16B", "I;16").replace("I;16L", "I;16")
    if mode in CONVERTIBLE:
        flaws.append(CONVERTIBLE[mode])
    elif mode in ("LA", "PA"):
        flaws.append("grey" if mode == "LA" else "palette")
    elif mode not in ("RGB", "RGBA"):
        raise BadImageError(f"mode {image.mode}; 8-bit RGB is wanted, and nobody can tell how to make it so")
    if "A" in mode or "transparency" in image.info:
        flaws.append("alpha")
    return flaws


def _said(image: Image.Image, flaws: list[str]) -> str:
    return "16 bits a channel" if flaws[0].startswith("16") else f"mode {image.mode} ({' and '.join(flaws)})"


def _to_rgb(image: Image.Image, flaws: list[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "alpha" not in flaws:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    white = Image.new("RGB", whole.size, "white")
    white.paste(whole, mask=whole.getchannel("A"))
    return white


def _check_alpha(image: Image.Image) -> None:
    """Raise BadImageError where a TIFF's alpha does more than hide or show.

    It is near infrared, perhaps: GDAL calls a fourth band alpha unless it is told better.
    """
    if set(np.unique(np.asarray(image.convert("RGBA").getchannel("A")))) - {0, 255}:
        raise BadImageError(_bands(len(image.getbands())))


def _why_unreadable(data: bytes) -> str:
    if data[:4] in (b"II*\0", b"MM\0*"):
        bands = _tiff_bands(data)
        if bands > 1:
            return _bands(bands)
    other = next((other for start, other in OTHERS.items() if data[: len(start)].lower() == start.lower()), "")
    if data[4:8] == b"ftyp":
        other = "a HEIC or AVIF image, or a video"
    kinds = "not a readable JPEG, PNG, TIFF, WebP or BMP image"
    return f"{kinds} but {other}" if other else kinds


def _tiff_bands(data: bytes) -> int:
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = BytesIO(data)
        stream.seek(directory.next)
        directory.load(stream)
        return int(directory.get(SAMPLES_PER_PIXEL, 1))
    except Exception:  # a damaged TIFF is an unreadable one, whatever ails it
        return 1
