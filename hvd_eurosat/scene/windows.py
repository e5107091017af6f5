"""Square windows over a scene, one map pixel each, and the blocks in which they are read and counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.grid import Grid

Places = NDArray[np.int64]

WINDOWS = 512  # a block has at least so many: some batches
OVERLAP = 0.25  # of a block's pixel rows, read again by the next, is the most
BLOCKS = 16  # of a small scene, so that several ranks have work
COPIES = 5  # of a block at a time: read, for its preview, waiting, with the network, and one to spare
MASK_BYTES = 1  # beside a pixel's bands
READING = 16  # bytes a value takes while it is made grey
SLICE = 256  # pixel rows are read at a time, or a block of the file
CACHE = 1 / 8  # of the memory is for decoded blocks of the file
GIGABYTE = 10**9


@dataclass(frozen=True)
class Windows:
    """Windows of `side` x `side` pixels, one every `stride` pixels of a grid of height x width pixels.

    The last of a row, and of a column, is moved in where it would reach beyond the edge. Its map pixel stays in the
    raster of the others, so that one reaches beyond the part that is its own.
    """

    height: int
    width: int
    side: int
    stride: int

    @property
    def tops(self) -> Places:
        """The first pixel row of each row of windows."""
        return _starts(self.height, self.side, self.stride)

    @property
    def lefts(self) -> Places:
        """The first pixel column of each column of windows."""
        return _starts(self.width, self.side, self.stride)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return len(self.tops), len(self.lefts)

    @property
    def margin(self) -> float:
        """Pixels from the edge of the first window to its map pixel, which is the window's middle."""
        return (self.side - self.stride) / 2

    def transform(self, scene: Affine) -> Affine:
        """From (column, row) of the map to the CRS, of a scene with this transform."""
        return scene @ Affine.translation(self.margin, self.margin) @ Affine.scale(self.stride)

    @property
    def ends(self) -> tuple[float, float]:
        """Where the map ends, in map pixels (rows, columns): within the last of them where that window is moved in."""
        rows, columns = ((length - self.side + self.stride) / self.stride for length in (self.height, self.width))
        return rows, columns


def _starts(length: int, side: int, stride: int) -> Places:
    count = math.ceil((length - side) / stride) + 1
    return np.minimum(np.arange(count, dtype=np.int64) * stride, length - side)


def check(grid: Grid, side: int, stride: int, path: str) -> Windows:
    """The windows of a scene. Raises UserError where there can be none."""
    if stride > side:
        raise UserError(f"--stride {stride} leaves gaps between windows of {side} pixels: give {side} or less")
    if min(grid.width, grid.height) < side:
        raise UserError(
            f"{path} has {grid.width} x {grid.height} pixels, and the network's window {side} x {side}: "
            "a larger scene is wanted"
        )
    return Windows(grid.height, grid.width, side, stride)


@dataclass(frozen=True)
class Block:
    """Rows of windows that are read and counted at a time.

    rows: of windows, from `first` to before `end`; pixels: of the scene, from `top` to before `bottom`; `next_top` is
    the next block's top, or the scene's end.
    """

    index: int
    first: int
    end: int
    top: int
    bottom: int
    next_top: int


def blocks(windows: Windows, rows: int) -> list[Block]:
    """All windows in blocks of `rows` rows of windows, from the top."""
    tops = windows.tops.tolist()
    found = []
    for index, first in enumerate(range(0, len(tops), rows)):
        end = min(first + rows, len(tops))
        next_top = tops[end] if end < len(tops) else windows.height
        found.append(Block(index, first, end, tops[first], tops[end - 1] + windows.side, next_top))
    return found


def cache_bytes(memory: float) -> int:
    """Of `memory` (in GB), what is for decoded blocks of the file."""
    return int(memory * GIGABYTE * CACHE)


def slice_rows(file_rows: int) -> int:
    """Pixel rows that are read at a time: whole blocks of the file, of so many rows each."""
    return file_rows * math.ceil(SLICE / file_rows)


def block_rows(windows: Windows, bands: int, classes: int, file_rows: int, memory: float, path: str) -> int:
    """Rows of windows in a block: enough for the network, few enough for all ranks and for `memory` (in GB).

    It does not depend on the number of ranks. bands: bytes of a pixel; file_rows: pixel rows in a block of the file.
    Raises UserError, which names the scene's path, where `memory` does not suffice.
    """
    rows, columns = windows.shape
    again = windows.side - windows.stride
    wanted = max(math.ceil(WINDOWS / columns), math.ceil(again / OVERLAP / windows.stride))
    wanted = min(wanted, math.ceil(rows / BLOCKS))
    reading = min(slice_rows(file_rows), windows.height) * windows.width * bands * READING
    room = memory * GIGABYTE * (1 - CACHE) - reading
    pixel_rows = int(room / (windows.width * (bands + MASK_BYTES) * COPIES))
    possible = (pixel_rows - windows.side) // windows.stride + 1
    result = rows * columns * (classes + 1)  # rank 0 draws from them all
    if pixel_rows < windows.side or 2 * result > memory * GIGABYTE:
        least = windows.side * windows.width * (bands + MASK_BYTES) * COPIES + reading
        least_gb = max(least / (1 - CACHE), 2 * result) / GIGABYTE
        raise UserError(
            f"--memory {memory:g}: {path} in {rows:,} x {columns:,} windows takes {math.ceil(10 * least_gb) / 10:g} GB "
            "a process: give that, or a longer --stride"
        )
    return max(1, min(wanted, possible))
