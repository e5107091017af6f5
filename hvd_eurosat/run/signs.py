"""A run's signs of life, written in the background on rank 0: status.json, run.metrics_file and index.html."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hvd_eurosat
from hvd_eurosat.config.schema import Config
from hvd_eurosat.run.page import MOST_SECONDS, PAGE, write_page
from hvd_eurosat.run.status import FAILURE, INTERVAL, STATUS, Status, plain, read_failure
from hvd_eurosat.run.textfile import write_textfile
from hvd_eurosat.training.files import write_text

PATIENCE = 20.0  # seconds that the end of a run waits for a disk that does not answer


class Signs:
    """Training tells it facts, which costs an assignment; a thread writes them every INTERVAL seconds.

    What cannot be written is reported once, and tried again; it is never the end of a run.
    """

    def __init__(self, folder: Path, config: Config, report: Callable[[str], None]) -> None:
        self._folder, self._report = folder, report
        self._draws, self._metrics_file = config.run.page, config.run.metrics_file
        self._status: Status = {}
        self._wanted, self._ending = threading.Event(), False
        self._page_due, self._shown, self._drawn = self._draws, -1, 0.0
        self._commit = ""
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="signs of life")
        self._due = 0.0

    def begin(self, resumed: bool, complete: int, /, **facts: Any) -> None:
        """The run is on its way, `complete` epochs of it done. resumed: from earlier starts, which are remembered."""
        now = time.time()
        with contextlib.suppress(OSError):
            (self._folder / FAILURE).unlink(missing_ok=True)
        start = {"time": now, "epoch": complete, "step": facts["step"], "world_size": facts["world_size"]}
        starts = [*(self._earlier_starts() if resumed else []), start]
        self._status = {"state": "running", "version": hvd_eurosat.__version__, "starts": starts, **facts}
        self._thread.start()

    def is_due(self) -> bool:
        """Whether INTERVAL has passed since this was true; only then is the device asked for its sums."""
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + INTERVAL
        return True

    def tell(self, **facts: Any) -> None:
        """Facts to be written with the next sign of life, in place of earlier ones of the same name."""
        self._status = {**self._status, **facts}  # a new one: the thread may be reading the other

    def draw(self) -> None:
        """Write the page anew, and the rest with it."""
        self._page_due = self._draws
        self._wanted.set()

    def end(self, **facts: Any) -> None:
        """The last facts, written before this returns, if the disk answers."""
        if not self._thread.is_alive():
            return
        self.tell(**facts)
        self._ending = True
        self.draw()
        self._thread.join(PATIENCE)

    def _earlier_starts(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads((self._folder / STATUS).read_bytes())["starts"])
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def _run(self) -> None:
        self._commit = commit()
        while True:
            ending = self._ending
            self._write()
            if ending:
                return
            self._wanted.wait(INTERVAL)
            self._wanted.clear()

    def _write(self) -> None:
        page_due, self._page_due = self._page_due, False  # first: what is told from here on asks for another
        checkpoint = self._checkpoint()
        facts = {"updated": time.time(), "commit": self._commit, "checkpoint": checkpoint}
        status = plain(self._status | facts)
        self._try(STATUS, lambda: write_text(self._folder / STATUS, json.dumps(status) + "\n"))
        if path := self._metrics_file:
            self._try(str(path), lambda: write_textfile(path, str(self._folder), status))
        saved = checkpoint["epoch"] if checkpoint else -1
        is_new = saved != self._shown  # of the epoch that was drawn before it was saved
        is_old = time.monotonic() > self._drawn + MOST_SECONDS
        if page_due or (self._draws and (is_new or is_old)):
            self._shown, self._drawn = saved, time.monotonic()
            self._try(PAGE, self._draw_page)

    def _draw_page(self) -> None:
        """Once more where a rank has left word of its failure meanwhile: this page would hide what that rank's says."""
        known = read_failure(self._folder)
        write_page(self._folder)
        if known is None and read_failure(self._folder):
            write_page(self._folder)

    def _try(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
            self._failing.discard(name)
        except Exception as error:  # whatever it is, the run is worth more
            if name not in self._failing:
                self._report(f"{name} of {self._folder} is not written: {error}; the run goes on")
            self._failing.add(name)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The newest, as last.json names it, and when it was written."""
        path = self._folder / "checkpoints" / "last.json"
        try:
            found = {**json.loads(path.read_bytes()), "time": path.stat().st_mtime}
            return found if found.keys() >= {"epoch", "step"} else None
        except (OSError, ValueError, TypeError):
            return None


def commit() -> str:
    """The commit that runs, where the package lies in a clone, with "-dirty" if files were changed; else ""."""
    root = Path(hvd_eurosat.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
