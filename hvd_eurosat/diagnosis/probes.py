"""Short timed trials of what training does all the time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hvd_eurosat.cluster.world import World

MEGABYTES = 16
REPEATS = 5


def probe(world: World) -> dict[str, float]:
    """Milliseconds, the median of five: a bf16 convolution and, of several ranks, an allreduce and a broadcast.

    Collective.
    """
    numbers = torch.ones(MEGABYTES * 2**18, device=world.device)
    images = torch.randn(64, 64, 32, 32, device=world.device, dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=world.device, dtype=torch.bfloat16)
    trials: dict[str, Callable[[], object]] = {
        "bf16 convolution, 64 images of 64x32x32": lambda: F.conv2d(images, kernel, padding=1)
    }
    if world.size > 1:
        trials[f"allreduce of {MEGABYTES} MiB"] = lambda: world.sum(numbers)
        trials[f"broadcast of {MEGABYTES} MiB"] = lambda: world.broadcast([numbers])
    with torch.inference_mode():
        return {name: _median(world, trial) for name, trial in trials.items()}


def _median(world: World, work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times[1:])[REPEATS // 2]
