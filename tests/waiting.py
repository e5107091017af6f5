"""Waiting: side by side, and told from what takes longer where cores are short, as on a busy machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Moment(NamedTuple):
    """A moment (s since the epoch), and for how long until then (s since boot) something had to wait for a core."""

    time: float
    stalled: float

    def passed(self) -> float:
        """Seconds since then."""
        return time.time() - self.time

    def unhindered(self) -> float:
        """Seconds since then in which nothing had to wait for a core: what a promise in seconds is held to."""
        return self.passed() - (now().stalled - self.stalled)


def now() -> Moment:
    """By Linux's pressure stall information; where there is none, nothing has waited."""
    stalled = 0.0
    with contextlib.suppress(OSError):
        some, *_ = Path("/proc/pressure/cpu").read_text().splitlines()
        stalled = int(some.rpartition("=")[2]) / 1e6
    return Moment(time.time(), stalled)


def side_by_side(jobs: Iterable[Callable[[], T]], at_once: int) -> list[T]:
    """What the jobs return: those that wait most of their time take no longer than the longest of them."""
    with ThreadPoolExecutor(at_once) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]
