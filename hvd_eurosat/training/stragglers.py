"""Which ranks keep the others waiting."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from hvd_eurosat.cluster.world import World

SLOWER = 0.2  # than the median of the other ranks,
LOSS = 1.0  # and what it costs them, in seconds of an epoch; below these it is noise


class Stopwatch:
    """The time that this rank works in an epoch, by its device's clock; waiting for the other ranks does not count."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._begin = self.mark()

    def mark(self) -> Any:
        """This moment, by the device's clock."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def work(self) -> None:
        """From here on this rank works."""
        self._begin = self.mark()

    def wait(self) -> None:
        """Its work is done: what follows is waiting."""
        self._spans.append((self._begin, self.mark()))

    def take(self) -> float:
        """Seconds of work since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        return sum((self.between(begin, end) for begin, end in spans), start=0.0)

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another; waits for the device."""
        if not self._on_gpu:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def work_of_ranks(world: World, seconds: float) -> list[tuple[str, float]]:
    """Host and seconds of work of each rank, in their order. Collective."""
    return world.gather((socket.gethostname(), seconds))


def slow_ranks(ranks: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Ranks that worked much longer than the others for the same steps: rank, host, by which share.

    ranks: host and seconds of work of each.
    """
    slow = []
    for rank, (host, seconds) in enumerate(ranks):
        others = [s for other, (_, s) in enumerate(ranks) if other != rank]
        usual = statistics.median(others) if others else seconds
        if seconds > usual * (1 + SLOWER) and seconds > usual + LOSS:
            slow.append({"rank": rank, "host": host, "slower": round(seconds / usual - 1, 3)})
    return slow
