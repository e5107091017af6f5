"""Names of many files, and their checksums, in one piece of text: a million strings would take a quarter of a GB."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.listing import by_folders

STRIDE = 1 << 14  # names whose places are Python's numbers at a time
Places = NDArray[np.int64]


class Names(Sequence[str]):
    """Strings, each made when it is asked for. starts, ends: int64 [N], of each in the text, which is UTF-8."""

    def __init__(self, text: bytes, starts: Places, ends: Places) -> None:
        self._text, self._starts, self._ends = text, starts, ends

    @staticmethod
    def of(strings: Iterable[str]) -> Names:
        """A copy of them."""
        encoded = [string.encode(errors="surrogateescape") for string in strings]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return Names(b"".join(encoded), np.concatenate([ends[:0], [0], ends[:-1]])[: len(ends)].astype(np.int64), ends)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Names: ...
    def __getitem__(self, place: int | slice) -> str | Names:
        starts, ends = self._starts[place], self._ends[place]
        if isinstance(place, slice):
            return Names(self._text, starts, ends)
        return self._text[starts:ends].decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), STRIDE):
            starts, ends = (places[first : first + STRIDE].tolist() for places in (self._starts, self._ends))
            for start, end in zip(starts, ends, strict=True):
                yield self._text[start:end].decode(errors="surrogateescape")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} names>"

    def in_order(self, order: Places) -> Names:
        """Those at int64 [M], in this order."""
        return Names(self._text, self._starts[order], self._ends[order])

    @property
    def lengths(self) -> Places:
        """In bytes, int64 [N]."""
        return self._ends - self._starts


class Checksums(Mapping[str, str]):
    """The sha256 of files by name, "" where it is not known. The names are split/class/file, sorted by these three.

    are_sorted: false where they once were spelt in another form of Unicode, and are in the order of that.
    """

    def __init__(self, names: Names, sums: Names, are_sorted: bool = True) -> None:
        self.names, self.sums, self._are_sorted = names, sums, are_sorted

    @staticmethod
    def of(found: Mapping[str, str]) -> Checksums:
        """A copy, sorted."""
        names = sorted(found, key=by_folders)
        return Checksums(Names.of(names), Names.of(found[name] for name in names))

    @staticmethod
    def of_lines(text: bytes) -> Checksums:
        """From what sha256sum writes, in its order; the text is kept as it is."""
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
        if text and not text.endswith(b"\n"):
            ends = np.append(ends, len(text))
        starts = np.append(0, ends + 1)[: len(ends)]
        return Checksums(Names(text, np.minimum(starts + 66, ends), ends), Names(text, starts, starts + 64))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> str:
        names = self.names
        place = bisect_left(names, by_folders(name), key=by_folders) if self._are_sorted else _place(names, name)
        if place == len(names) or names[place] != name:
            raise KeyError(name)
        return self.sums[place]

    @property
    def are_known(self) -> bool:
        """Whether there is one for each name."""
        return bool(self.sums.lengths.all())

    def respelt(self, spell: Callable[[str], str]) -> Checksums:
        """With the names spelt in another way, in the order that they are in."""
        return Checksums(Names.of(map(spell, self.names)), self.sums, are_sorted=False)

    def sorted(self) -> Checksums:
        """From the order of whole lines, which differs by folders: a hyphen comes before the slash."""
        folders: dict[str, range] = {}
        last = ""
        for place, name in enumerate(self.names):
            folder = name.rpartition("/")[0]
            run = folders.get(folder, range(place, place))
            if run.stop != place or (run and name < last):  # written by hand
                return Checksums.of(dict(zip(self.names, self.sums, strict=True)))
            folders[folder], last = range(run.start, place + 1), name
        runs = [np.asarray(folders[folder], np.int64) for folder in sorted(folders, key=by_folders)]
        order = np.concatenate([np.zeros(0, np.int64), *runs])
        return Checksums(self.names.in_order(order), self.sums.in_order(order))

    def part(self, split: str) -> slice:
        """Where a split's files are."""
        first, last = (bisect_left(self.names, bound, key=by_folders) for bound in (f"{split}\0", f"{split}\1"))
        return slice(first, last)


def _place(names: Names, name: str) -> int:
    return next((n for n, other in enumerate(names) if other == name), len(names))
