"""Requests to stop, as schedulers send them before they take a node away."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether SIGUSR1 or SIGTERM has come since this was made. A second one ends the process (see watchdog)."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested
