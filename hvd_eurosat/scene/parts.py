"""What is known of a map so far: a file for each block, which is whole or not there, until the map is finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.training.files import make_folder, replacing, write_text

FOLDER, WORK, DONE, STOP = ".parts", "work.json", "map.json", "stop"
LOOK_SECONDS = 0.5
LOCK_SECONDS = 10.0  # the ranks of a job that was killed are gone by then
NONE = 255  # of classes and percents: the window has none
Work = dict[str, Any]
Values = NDArray[np.uint8]


class Parts:
    """The folder of a map in the making, which all ranks write to.

    A block belongs to the rank that claims it first: a file that only one can make. So fast ranks do more, and the
    blocks of a job do not depend on how many ranks it has.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        self._lock: Any = None
        self._look, self._stopped = 0.0, False

    def begin(self, work: Work, tick: Callable[[], None]) -> bool:
        """On rank 0: make the folder ready for this work, new or begun; False where the map is finished already.

        Raises UserError where the folder belongs to other work, to another job or to nothing of ours.
        """
        make_folder(self.out, "--out")
        self._check(work)
        if (self.out / DONE).exists():
            self.finish()  # where a job was killed at its very end
            return False
        make_folder(self.folder, "--out")
        self._take_lock(tick)
        write_text(self.folder / WORK, json.dumps(work))
        self.release()
        return True

    def _check(self, work: Work) -> None:
        found = next((path for path in (self.out / DONE, self.folder / WORK) if path.exists()), None)
        if found is None:
            if other := sorted(path.name for path in self.out.iterdir() if path.name != FOLDER):
                raise UserError(f"--out {self.out} holds what is no map of ours ({other[0]}): give a new folder")
            return
        try:
            content = json.loads(found.read_text())
            known = content["work"] if found.name == DONE else content
            differing = [key for key in sorted(known.keys() | work.keys()) if known.get(key) != work.get(key)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--out {self.out}: {found.name} is damaged: give a new folder") from None
        if differing:
            key = differing[0]
            raise UserError(
                f"--out {self.out} holds a map with another {key}, {known.get(key)!r} and not {work.get(key)!r}: "
                "give a new folder"
            )

    def _take_lock(self, tick: Callable[[], None]) -> None:
        self._lock = (self.folder / "lock").open("a")
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"--out {self.out} is in use by another job: wait, or give another") from None
            tick()
            time.sleep(0.2)

    def release(self) -> None:
        """On rank 0: forget claims, that a rank was asked to stop, and what a killed job had begun to write."""
        partial = [path for folder in (self.out, self.folder) for path in folder.glob(".*") if path.is_file()]
        for path in (*self.folder.glob("*.claim"), *partial, self.folder / STOP):
            path.unlink(missing_ok=True)

    def missing(self, blocks: int) -> list[int]:
        """The blocks that are not done."""
        return [index for index in range(blocks) if not self._path(index).exists()]

    def done(self) -> int:
        """How many blocks are."""
        return sum(1 for _ in self.folder.glob("[0-9]*.part"))

    def claimed(self, todo: Sequence[int], rank: int, ranks: int) -> Iterator[int]:
        """The blocks that this rank gets of `todo`, claimed one by one: of its own share, then of the others'."""
        start = rank * len(todo) // ranks
        for index in (*todo[start:], *todo[:start]):
            if self._claim(index):
                yield index

    def _claim(self, index: int) -> bool:
        try:
            os.close(os.open(self.folder / f"{index:07d}.claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror}") from None
        return True

    def stop(self) -> None:
        """Ask all ranks to stop."""
        with contextlib.suppress(OSError):  # a full disk, say: then the others go on
            (self.folder / STOP).touch()

    def is_stopped(self) -> bool:
        """Whether any rank has asked so, half a second ago or earlier."""
        if time.monotonic() > self._look:
            self._look = time.monotonic() + LOOK_SECONDS
            self._stopped = (self.folder / STOP).exists()
        return self._stopped

    def write(self, index: int, values: Values, preview: Values) -> None:
        """A block is done."""
        with replacing(self._path(index)) as file:
            np.save(file, values, allow_pickle=False)
            np.save(file, preview, allow_pickle=False)

    def read(self, index: int) -> tuple[Values, Values]:
        """What `write` was given. Raises RunError where it is damaged, after removing it."""
        path = self._path(index)
        try:
            with path.open("rb") as file:
                return np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            path.unlink(missing_ok=True)
            raise RunError(f"{path} was damaged and is removed: start again, and it is made anew") from None

    def finish(self) -> None:
        """On rank 0, when map.json is written: the parts go."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def discard(self) -> None:
        """On rank 0, where the scene turned out to be bad: nothing is left of it."""
        self.finish()
        with contextlib.suppress(OSError):
            self.out.rmdir()

    def close(self) -> None:
        """Another job may use the folder."""
        if self._lock:
            self._lock.close()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:07d}.part"
