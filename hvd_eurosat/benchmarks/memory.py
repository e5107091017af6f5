"""The memory of a rank, alone and as one of four on a machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hvd_eurosat.benchmarks.launcher import Launcher
from hvd_eurosat.benchmarks.settings import MemorySettings

RANKS = (1, 4)


def measure(launcher: Launcher, settings: MemorySettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "memory" section, as it grows: of each number of ranks the largest rank's peak, and the packed images."""
    found: dict[str, Any] = {}
    for ranks in filter(launcher.allows, RANKS):
        say(f"np {ranks}")
        modes = json.dumps([settings.model.trainable])
        run = launcher.ours(ranks, settings.steps, launcher.threads(ranks), memory=True, modes=modes)
        found[str(ranks)] = {
            "peak_pss_mb": max(rank["peak_pss"] for rank in run),
            "peak_gpu_mb": max(rank["peak_gpu"] for rank in run),
            "images_mb": sum(rank["images"] for rank in run),
            "images_file_mb": run[0]["images_file"],
        }
        yield found
