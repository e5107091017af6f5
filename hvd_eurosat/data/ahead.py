"""What is wanted soon: results that threads make meanwhile, and rows of a mapped file, asked for from disk."""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

BATCHES = 8  # that are on their way
PIECE = 128 << 10  # bytes: of more, Linux may read only the beginning
Item = TypeVar("Item")


def made_ahead(
    works: Iterable[Callable[[], Item]], in_hand: int, threads: int = 1, begin: Callable[[], object] | None = None
) -> Generator[Item, None, None]:
    """What each of `works` gives, in order, by threads that have `in_hand` more of them. Their errors are raised.

    begin: called first in each thread.
    """
    with ThreadPoolExecutor(threads, "ahead", begin) as pool:
        begun: deque[Future[Item]] = deque()
        for work in works:
            begun.append(pool.submit(work))
            if len(begun) > in_hand:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def ahead(items: Sequence[Item], want: Callable[[Item], None] | None) -> Iterator[Item]:
    """The items; meanwhile each is wanted some items before its turn, where anybody wants them."""
    for number, item in enumerate(items):
        coming = items[1:BATCHES] if number == 0 else items[number + BATCHES - 1 : number + BATCHES]
        for later in coming if want else ():
            want(later)  # type: ignore[misc]
        yield item


class Reader:
    """Asks the kernel for rows of a mapped file, in a thread, for a disk that is busy lets nobody ask for more.

    mapped: the images; file: their file's descriptor. What is in memory already costs a few microseconds a row, beside
    the work. No error matters.
    """

    def __init__(self, images: np.memmap[Any, Any]) -> None:
        self.mapped, self.file = images, os.open(str(images.filename), os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self._begin, self._row = images.offset, images.strides[0]
        self._thread = ThreadPoolExecutor(1, "read ahead")
        with suppress(OSError):  # a row that is missing all the same must not bring 128 KB with it
            images._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]

    def want(self, rows: Sequence[int]) -> None:
        """These rows are needed before long."""
        self._thread.submit(self._read, sorted(rows))

    def _read(self, rows: Sequence[int]) -> None:
        first = 0
        with suppress(OSError):
            for place, row in enumerate(rows):
                if place + 1 == len(rows) or rows[place + 1] > row + 1:  # neighbours by one call
                    start, end = self._begin + rows[first] * self._row, self._begin + (row + 1) * self._row
                    for piece in range(start, end, PIECE):
                        os.posix_fadvise(self.file, piece, min(PIECE, end - piece), os.POSIX_FADV_WILLNEED)
                    first = place + 1
