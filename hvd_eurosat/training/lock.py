"""A folder that one job at a time uses, on file systems with locks and on those without (some Lustre, some FUSE)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what flock(2) says where there are none
NAME, HELD = ".lock", ".lock.held"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a beat; other hosts may see what is written some 30 s late
SETTLE_SECONDS = 1.0


class FolderLock:
    """The system's lock of a folder; where there is none, a file in it that the holder renews, for others to see.

    report: told once that there are no locks. Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._report = report
        self._file = (folder / NAME).open("a+")
        self._place = os.open(folder, os.O_RDONLY)  # the folder, also once it has another name
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._mark = f"{self._owner}, {secrets.token_hex(8)}"
        self._seen: str | None = None
        self._seen_at = 0.0
        self._released = threading.Event()
        self._beats: threading.Thread | None = None
        self.patience = 0.0  # seconds after which another's lock turns out to be a dead one's

    def try_take(self) -> bool:
        """Whether the folder is ours from now on."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                self.close()
                raise
            return self._try_file(str(error.strerror))
        self._file.truncate(0)
        self._file.write(f"{self._owner}\n")
        self._file.flush()
        return True

    def owner(self) -> str:
        """Who has it, in words."""
        self._file.seek(0)
        return (self._read() or self._file.read()).partition(",")[0].strip()

    def close(self) -> None:
        """Another job may have it."""
        self._released.set()
        if self._beats:
            self._beats.join()
            if self._is_ours():
                os.unlink(HELD, dir_fd=self._place)
        self._file.close()
        os.close(self._place)

    def _try_file(self, reason: str) -> bool:
        """Take it where it is not there, or where nobody has renewed it for so long that its holder is dead."""
        if not self.patience:
            self.patience = STALE_SECONDS
            self._report(f"{self._folder} is on a file system without locks ({reason}): {HELD} in it guards it")
        found = self._read()
        if found != self._seen:
            self._seen, self._seen_at = found, time.monotonic()
        if found is not None:
            if time.monotonic() - self._seen_at < STALE_SECONDS:
                return False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(HELD, dir_fd=self._place)
        try:
            os.close(os.open(HELD, os.O_CREAT | os.O_EXCL, 0o666, dir_fd=self._place))
        except FileExistsError:
            return False
        self._beat(0)
        if found is not None:  # another may have waited as long, and removed ours for the dead one's
            time.sleep(SETTLE_SECONDS)
            if not self._is_ours():
                return False
        self._beats = threading.Thread(target=self._keep_beating, daemon=True)
        self._beats.start()
        return True

    def _keep_beating(self) -> None:
        number = 0
        while not self._released.wait(BEAT_SECONDS):
            number += 1
            with contextlib.suppress(OSError):  # a full disk, or a server that is away: it is tried again
                self._beat(number)

    def _beat(self, number: int) -> None:
        """Written, not touched: of a file's times other hosts remember old ones."""
        file = os.open(HELD, os.O_WRONLY, dir_fd=self._place)
        try:
            os.write(file, f"{self._mark}, {number:012}\n".encode())
        finally:
            os.close(file)

    def _is_ours(self) -> bool:
        return (self._read() or "").startswith(self._mark)

    def _read(self) -> str | None:
        """What the holder wrote last; None where there is none."""
        try:
            with os.fdopen(os.open(HELD, os.O_RDONLY, dir_fd=self._place)) as file:
                return file.read()
        except FileNotFoundError:
            return None
