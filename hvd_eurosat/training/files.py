"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hvd_eurosat.errors import RunError, UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file (readable too) that becomes `path` when the block ends well: synced, renamed, its folder synced.

    After an exception in the block `path` is as it was and no partial file is left. Raises RunError where the file
    cannot be written.
    """
    try:
        with _replacing(path) as file:
            yield file
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(folder: Path, key: str) -> None:
    """Before the work, so that a folder that cannot be made is known at once. Raises UserError, which names the key."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key} {folder}: {error.strerror}") from None


def free_name(path: Path) -> Path:
    """The first of path.1, path.2, ... that is not there yet: for what is set aside."""
    return next(free for n in range(1, 10**6) if not (free := Path(f"{path}.{n}")).exists())


def write_text(path: Path, text: str) -> None:
    """Replace the file's content, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def _umask() -> int:
    """The process's umask, which can only be read by setting it: by one thread at a time, or another's stays."""
    with _UMASK:
        mask = os.umask(0o022)
        os.umask(mask)
    return mask


_UMASK = threading.Lock()
