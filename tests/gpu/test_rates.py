"""How fast the step is on a GPU, how often the host launches something for it, and how busy the GPU is."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from hvd_eurosat.benchmarks import roofline
from hvd_eurosat.training.step import GPU_LAG
from tests.gpu.conftest import Note
from tests.gpu.loop import Loop, Scale, configuration

MODES = [("bn+head", 4), ("bn+head", 32), ("all", 32), ("head", 32)]  # what trains, images: times 16
# Steps of an epoch, those before the figures, which end in the second epoch, and those that are measured in it. Between
# two epochs an order is drawn, which is no part of a step.
EPOCH, WARM_UP, STEPS, PROFILED = 40, 46, 24, 5
LAUNCHES = 40  # of a step as graphs, at most: the two graphs, and what is copied to where they read it


def measured(loop: Loop, what: str, note: Note) -> float:
    """Launches of a step; its other figures are noted."""
    torch.cuda.reset_peak_memory_stats()
    while loop.state.step < WARM_UP:
        next(loop.steps)
    size, seconds = loop.config.train.batch_size, loop.seconds(STEPS)
    began = time.perf_counter()
    for _ in range(GPU_LAG):  # in which the host waits for nothing
        next(loop.steps)
    host = (time.perf_counter() - began) / GPU_LAG
    events = roofline.profiled(lambda: [next(loop.steps) for _ in range(PROFILED)])
    launches, busy = roofline.launches(events) / PROFILED, roofline.busy(events)
    note(f"{what}: images/s", STEPS * size / seconds)
    note(f"{what}: ms of the host a step", 1000 * host)
    note(f"{what}: launches a step", launches)
    note(f"{what}: GPU busy, %", "not shown" if busy is None else 100 * busy)
    note(f"{what}: GiB", torch.cuda.max_memory_allocated() / 2**30)
    return launches


@pytest.mark.timeout(60)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "kernels"])
@pytest.mark.parametrize(("trainable", "times"), MODES)
def test_a_step_is_measured(trainable: str, times: int, graphs: bool, scale: Scale, note: Note) -> None:
    """In bf16, images on the GPU; of the head alone the epochs in which all else is known."""
    scale = dataclasses.replace(scale, batch=times * scale.batch)
    config = configuration(scale, "adam", trainable, precision="bf16")
    loop = Loop(config, scale.device, graphs, count=EPOCH * scale.batch)
    how = "graphs" if graphs else "kernel by kernel"
    launches = measured(loop, f"{trainable}, batches of {scale.batch}, {how}", note)
    assert loop.graphs_work == graphs
    assert launches < LAUNCHES or not graphs


@pytest.mark.timeout(120)
@pytest.mark.parametrize("times", [32])
def test_a_compiled_step_is_measured(times: int, scale: Scale, note: Note) -> None:
    """It learns what the other learns, and compiles nothing more after its first steps."""
    scale = dataclasses.replace(scale, batch=times * scale.batch)
    config = configuration(scale, "adam", precision="bf16")
    compiled = config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})
    began = time.perf_counter()
    loops = [Loop(one, scale.device, count=EPOCH * scale.batch) for one in (compiled, config)]
    if loops[0].step.obstacle:
        pytest.skip(loops[0].step.obstacle)
    losses = loops[0].losses(10)
    note("compiled: seconds until its tenth step", time.perf_counter() - began)
    assert losses == pytest.approx(loops[1].losses(10), rel=3e-2)
    known = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    launches = measured(loops[0], f"bn+head, batches of {scale.batch}, compiled", note)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == known > 0
    assert loops[0].graphs_work
    assert launches < LAUNCHES
