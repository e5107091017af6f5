"""A folder that appears whole or not at all, whatever happens meanwhile."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvd_eurosat.data.packed import DISK_FULL
from hvd_eurosat.errors import RunError, UserError

CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
LOCK = ".lock"


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder beside out that becomes out at the end, or vanishes on any error, with all it needed.

    Raises UserError where out is taken or cannot be written, RunError where the disk is full.
    """
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    made: list[Path] = []
    try:
        _refuse_taken(out)
        made += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial.mkdir()
        with (partial / LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(lock, fcntl.LOCK_EX)  # which forked processes do not hold, should they live longer
            yield partial
            os.sync()  # once, not once an image
            partial.rename(out)
            (out / LOCK).unlink()
        made.clear()
    except OSError as error:
        raise _explained(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _refuse_taken(out: Path) -> None:
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which cannot be replaced as a whole: name a folder in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: give another --out or remove it first")


def _remove_leftovers(out: Path) -> None:
    """Removes what killed runs for the same out left. Raises UserError when one of them is alive."""
    for folder in out.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(out.name)}\.partial-[0-9a-f]{{8}}", folder.name):
            with suppress(FileNotFoundError), (folder / LOCK).open("a") as lock:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"another prepare is writing {out} just now") from None
                except OSError:  # a file system without locks: it may be at work
                    print(f"warning: {folder} stays: remove it if no other prepare is writing it", file=sys.stderr)
                    continue
            shutil.rmtree(folder)


def _explained(error: OSError, out: Path) -> UserError | RunError:
    if error.errno in DISK_FULL:
        return RunError(f"no room for {out}: {error.strerror}; nothing was written")
    if error.errno in CANNOT_WRITE:
        return UserError(f"cannot write {out}: {error.strerror}")
    return RunError(f"cannot write {out}: {error}")
