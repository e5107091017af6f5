"""The memory of a rank, alone and as one of four on a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvd_eurosat.benchmarks.launcher import Launcher
from hvd_eurosat.benchmarks.settings import MemorySettings

RANKS = (1, 4)


def measure(launcher: Launcher, settings: MemorySettings, say: Callable[[str], None]) -> dict[str, Any]:
    """The "memory" section: of each number of ranks the largest rank's peak, and what the packed images take of all."""
    found = {}
    for ranks in filter(launcher.allows, RANKS):
        say(f"np {ranks}")
        threads = max(1, launcher.cores // ranks)
        trainable = settings.model.trainable
        run = launcher.ours(ranks, settings.steps, threads, memory=True, modes=trainable)
        found[str(ranks)] = {
            "peak_pss_mb": max(rank["peak_pss"] for rank in run),
            "images_mb": sum(rank["images"] for rank in run),
            "images_file_mb": run[0]["images_file"],
        }
    return found
