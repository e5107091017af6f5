"""The job of `benchmark gpu`: one rank, one mode, steps of several sizes, on its GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from hvd_eurosat.benchmarks import roofline
from hvd_eurosat.benchmarks.job import Loop, opened, time_validation
from hvd_eurosat.benchmarks.settings import GpuJobSettings
from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.reading import read
from hvd_eurosat.data.batches import Images
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.training import capture
from hvd_eurosat.training.copies import whole

PROFILED = 5  # steps


def load(argv: Sequence[str]) -> GpuJobSettings:
    """The settings that the subcommand wrote on the command line."""
    return read(GpuJobSettings, argv, "benchmarks.gpu_job")


def main(world: World, settings: GpuJobSettings) -> None:
    """Measure each size; the compiler's minutes are waited for."""
    world.watch(0)
    if world.device.type != "cuda":
        raise SharedError("benchmark gpu: this rank has no GPU")
    (mode,) = settings.modes
    settings, tree, images = opened(world, settings, ["train", "valid"])
    found: dict[str, Any] = {
        "GPU": torch.cuda.get_device_name(world.device),
        "peaks": roofline.peaks(world.device),
        "cases": [],
    }
    for size in settings.sizes:
        case: dict[str, Any] = {"size": size}
        with contextlib.suppress(torch.OutOfMemoryError):  # the table says so
            case |= measured(world, settings, tree, images, mode, size)
        found["precision"] = case.pop("precision", found.get("precision", settings.train.precision))
        found["cases"].append(case)
        torch.cuda.empty_cache()
    (settings.out / "0.json").write_text(json.dumps(found))


def measured(
    world: World, settings: GpuJobSettings, tree: Tree, images: dict[str, Images], mode: str, size: int
) -> dict[str, Any]:
    """One case. Raises torch.OutOfMemoryError."""
    train = settings.train.model_copy(update={"batch_size": size})
    settings = settings.model_copy(update={"train": train})
    torch.cuda.reset_peak_memory_stats()
    loop = Loop(world, settings, tree, images["train"], mode)
    if loop.step.obstacle:
        raise SharedError(f"train.compile: {loop.step.obstacle}")
    asked = roofline.work(settings, mode, len(tree.classes), size)
    return {
        "precision": loop.state.precision.name,
        "captured": loop.step.captured,
        **launched(loop, settings),
        "flops": asked.flops,
        "bytes": asked.bytes,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
        "fixed": fixed(loop, settings, images),
        "kept": recalled(loop, settings) if loop.features.keeps else None,
    }


def launched(loop: Loop, settings: GpuJobSettings) -> dict[str, Any]:
    """Of the steps that the loop is fed with: images a second, what the host launches in one, the GPU's busy share."""
    for _ in range(settings.warm_up + capture.WARM_UP):
        next(loop)
    seconds = timed(loop, settings.steps)
    events = roofline.profiled(lambda: [next(loop) for _ in range(PROFILED)])
    return {
        "images_per_second": settings.steps * settings.train.batch_size / seconds,
        "launches": roofline.launches(events) / PROFILED,
        "busy": roofline.busy(events),
    }


def recalled(loop: Loop, settings: GpuJobSettings) -> dict[str, Any]:
    """The same of an epoch whose features the first one has kept, which is trained before. The loop ends with it."""
    step, state, batches = loop.step, loop.state, loop.batches
    state.epoch = state.samples = 0
    step.begin_epoch()
    loop.feed(batches.epoch(0))
    for _ in range(batches.steps()):
        next(loop)
    step.end_epoch()
    state.epoch = again = loop.features.first
    loop.feed(batch for _ in itertools.count() for batch in batches.epoch(again))
    return launched(loop, settings)


def timed(loop: Loop, steps: int) -> float:
    """Seconds of so many steps, until the device has made them."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def fixed(loop: Loop, settings: GpuJobSettings, images: dict[str, Images]) -> dict[str, float]:
    """Seconds of what an epoch does once, however many steps it has: its order, its validation, its snapshot."""
    began = time.perf_counter()
    next(loop.batches.epoch(1))
    order = time.perf_counter() - began
    time_validation(loop, settings, images)  # the first sets libraries up
    validation = time_validation(loop, settings, images)
    began = time.perf_counter()
    if saved := loop.state.snapshot():
        whole(saved)
    return {"order": order, "validation": validation, "snapshot": time.perf_counter() - began}


if __name__ == "__main__":
    job.run(load, main)
