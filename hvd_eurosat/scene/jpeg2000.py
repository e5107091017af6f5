"""Whether a JPEG 2000 file is whole. OpenJPEG leaves parts that are missing as they were in memory, now and then.

Boxes and markers: ISO/IEC 15444-1 (ITU-T T.800), annexes A and I.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import IO, Any

from hvd_eurosat.errors import UserError

SOC, SIZ, SOT, EOC = 0xFF4F, 0xFF51, 0xFF90, b"\xff\xd9"
CODESTREAM, SUPERBOXES = b"jp2c", (b"jp2h", b"asoc", b"res ", b"uinf")
MAX_DEPTH = 8
MAX_PARTS = 1 << 18  # or boxes; a full scene has 121 tiles of some parts each


def check(file: IO[bytes], length: int, path: str) -> None:
    """Raise UserError, which names the path, where the sizes differ that the file has, or tiles are missing."""
    try:
        boxes = iter([(CODESTREAM, 0)]) if _read(file, 0, "H")[0] == SOC else _boxes(file, 0, length)
        boxes = itertools.islice(boxes, MAX_PARTS)
        stated, start = _header(file, boxes)
        size, tiles, part = _main_header(file, start)
        if stated and stated != size:
            raise UserError(f"{path} is damaged: it says that it has {_shown(stated)} pixels, and {_shown(size)}")
        there = set(_tile_parts(file, part, length))
        for _ in boxes:  # those behind the codestream: in boxes of no possible size GDAL looks for others without end
            pass
    except (struct.error, EOFError, OverflowError):
        raise UserError(f"{path} is cut short") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if len(there) < tiles:
        raise UserError(f"{path} is cut short: it has {len(there):,} of its {tiles:,} tiles")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"


def _read(file: IO[bytes], at: int, form: str) -> tuple[Any, ...]:
    file.seek(at)
    return struct.unpack(f">{form}", file.read(struct.calcsize(f">{form}")))


def _boxes(file: IO[bytes], at: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int]]:
    """The kind of each box, and of those within it, and where its content begins. A codestream may be cut short."""
    while at + 8 <= end:
        span, kind = _read(file, at, "L4s")
        body = at + 8
        if span == 1:
            (span,), body = _read(file, body, "Q"), body + 8
        elif span == 0 and not depth:  # the last one, to the end
            span = end - at
        if span < body - at or (depth and at + span > end) or depth > MAX_DEPTH:
            raise ValueError("a box of no possible size")
        yield kind, body
        if at + span > end and kind != CODESTREAM:
            raise EOFError
        if kind in SUPERBOXES:
            yield from _boxes(file, body, at + span, depth + 1)
        at += span


def _header(file: IO[bytes], boxes: Iterator[tuple[bytes, int]]) -> tuple[tuple[int, int] | None, int]:
    """Width and height as the image header box says, and where the codestream begins."""
    size = None
    for kind, body in boxes:
        if kind == b"ihdr":
            height, width = _read(file, body, "LL")
            size = width, height
        if kind == CODESTREAM:
            return size, body
    raise ValueError("no codestream")


def _main_header(file: IO[bytes], at: int) -> tuple[tuple[int, int], int, int]:
    """Width and height, the number of tiles, and where the first part of a tile begins."""
    start, mark, span, _, right, bottom, left, top, width, height, tiles_left, tiles_top = _read(file, at, "4H8L")
    if (start, mark) != (SOC, SIZ) or not width or not height:
        raise ValueError("no size")
    columns, rows = -(-(right - tiles_left) // width), -(-(bottom - tiles_top) // height)
    at += 4 + span
    for _ in range(MAX_PARTS):
        mark, span = _read(file, at, "HH")
        if mark == SOT:
            return (right - left, bottom - top), columns * rows, at
        at += 2 + span
    raise ValueError("no tiles")


def _tile_parts(file: IO[bytes], at: int, length: int) -> Iterator[int]:
    """The tile of each part."""
    for _ in range(MAX_PARTS):
        file.seek(at)
        head = file.read(10)
        if not head or head.startswith(EOC):
            return
        mark, _, tile, span = struct.unpack(">HHHL", head)
        if mark != SOT:
            raise ValueError("no tile where one should begin")
        yield tile
        if span == 0:  # the last, to the end
            return
        at += span
        if at > length:
            raise EOFError
    raise ValueError("more parts of tiles than a scene has")
