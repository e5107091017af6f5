"""What is due by the clock."""

from __future__ import annotations

import time


class Timer:
    """Rings once whenever so many seconds have passed since it was started; never if they are 0."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._began = time.monotonic()

    def rings(self) -> bool:
        """Whether they have passed; then they are counted anew."""
        if not self._seconds or time.monotonic() - self._began < self._seconds:
            return False
        self.start()
        return True
