"""Saving in the background, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hvd_eurosat.errors import RunError
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.copies import NotFiniteError, whole

FAILURES = 3


class Saver:
    """Writes one checkpoint at a time in a thread; a new one waits for the one before, unless who has it looks first.

    A save that fails is reported and training goes on. FAILURES in a row, or the first with `stop_at_once`, raise
    RunError from the next call.
    """

    def __init__(self, folder: CheckpointFolder, stop_at_once: bool, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._allowed = 1 if stop_at_once else FAILURES
        self._report = report
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, which nobody changes any more."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=[checkpoint], daemon=True)
        self._thread.start()

    def wait(self, tick: Callable[[], None] = lambda: None) -> None:
        """Until nothing is being written; `tick` is called meanwhile."""
        while self._thread and self.is_busy:
            self._thread.join(0.5)
            tick()
        if len(self._errors) >= self._allowed:
            raise self._errors[-1]

    def finish(self, tick: Callable[[], None]) -> None:
        """Until the last checkpoint is written. Raises RunError if it could not be."""
        self.wait(tick)
        if self._errors:
            raise self._errors[-1]

    def close(self) -> None:
        """Until nothing is being written, well or not."""
        if self._thread:
            self._thread.join()

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            self._folder.add(whole(checkpoint))
            self._errors.clear()
        except NotFiniteError as error:
            self._errors += [error] * self._allowed
        except RunError as error:
            self._errors.append(error)
            self._report(f"{error}; training goes on, and the earlier checkpoints are whole")
        except BaseException as error:  # a thread's exceptions would pass unseen
            self._errors += [error] * self._allowed
