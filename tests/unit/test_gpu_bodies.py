"""What tests/gpu do on a GPU runs here on cores, small, so that it is not run for the first time on a GPU.

What only a GPU can tell (its bits, waits and rates) is not looked at, or is a stand-in's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from hvd_eurosat.benchmarks import roofline
from hvd_eurosat.benchmarks.roofline import Event
from hvd_eurosat.model import native, resnet
from tests.gpu import test_rates as rates
from tests.gpu import test_step as step
from tests.gpu.loop import SMALL
from tests.unit import tape

BODIES: dict[str, Callable[..., None]] = {
    "augmentation": partial(step.test_augmentation_is_the_cpus, step.ROUNDED),
    "the CPU's": partial(step.test_a_step_is_the_cpus, "bn+head"),
    "no waiting": partial(step.test_the_host_waits_for_no_number, "graphs"),
    "from the host": step.test_images_from_the_host_are_the_same,
    "graphs": partial(step.test_graphs_are_the_step, "adamw"),
    "not finite": step.test_a_step_that_is_not_finite_changes_nothing,
    "the same bits": partial(step.test_the_same_bits_again, "bn+head", True),
    "rates": partial(rates.test_a_step_is_measured, "head", 1, True),
    "compiled": partial(rates.test_a_compiled_step_is_measured, 1),
}


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a GPU, with tapes for its graphs."""
    tape.install(monkeypatch)
    launches = [Event("cudaGraphLaunch", False, 0, 1), Event("a kernel", True, 0, 1)]
    monkeypatch.setattr(roofline, "profiled", lambda task: (task(), launches)[1])
    stand_ins: dict[str, Any] = {
        "set_sync_debug_mode": lambda _: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 2**30,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name, steps in {"EPOCH": 12, "WARM_UP": 14, "STEPS": 2, "PROFILED": 2}.items():
        monkeypatch.setattr(rates, name, steps)
    block, depths, _ = resnet.BLOCKS[SMALL.arch]
    monkeypatch.setitem(resnet.BLOCKS, SMALL.arch, (block, depths, 8))
    monkeypatch.setattr(native, "library", lambda _: None)  # whose work a tape does not see
    monkeypatch.setattr("hvd_eurosat.training.step.obstacle", lambda _: None)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setitem(torch._dynamo.utils.counters["stats"], "unique_graphs", 1)


@pytest.mark.parametrize("name", BODIES)
def test_it_runs(name: str, cores: None) -> None:
    found: dict[str, Any] = {}
    needed = {"scale": SMALL, "note": found.__setitem__}
    asked = inspect.signature(BODIES[name]).parameters
    BODIES[name](**{key: value for key, value in needed.items() if key in asked})
    assert all(value == value for value in found.values())  # no nan
