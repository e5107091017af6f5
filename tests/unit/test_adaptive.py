"""Adagrad and RMSprop, which on CPUs have the bits of torch's, and go on from what those have kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hvd_eurosat.config.schema import Optim
from hvd_eurosat.training import large_batch
from hvd_eurosat.training.optimiser import build_optimiser

Make = Callable[[nn.Module], torch.optim.Optimizer]


def steps(module: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    """Three of them."""
    numbers = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=numbers)
        optimiser.step()


def network() -> nn.Module:
    """Weights in two formats, and some of one dimension."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(8), nn.Linear(67, 5))


def torchs(kind: Any, **options: Any) -> Make:
    """One of torch's optimisers, with weight decay as ours has it."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        matrices, others = ([p for p in module.parameters() if (p.ndim > 1) == many] for many in (True, False))
        decays = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
        return kind(decays, lr=0.01, eps=1e-6, **options)  # type: ignore[no-any-return]

    return make


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("name", "momentum", "make"),
    [
        ("adagrad", 0.0, torchs(torch.optim.Adagrad)),
        ("rmsprop", 0.0, torchs(torch.optim.RMSprop)),
        ("rmsprop", 0.9, torchs(torch.optim.RMSprop, momentum=0.9)),
    ],
)
def test_the_bits_of_torchs(
    name: Any, momentum: float, make: Make, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight after the other, or all together, as on a GPU; from the first step, and from a state of torch's."""
    if together:
        monkeypatch.setattr(large_batch, "one_by_one", lambda _: False)
    optim = Optim(name=name, lr=0.01, eps=1e-6, momentum=momentum, weight_decay=0.3)
    mine, theirs = network(), network()
    ours, other = build_optimiser(mine, optim), make(theirs)
    steps(mine, ours, seed=1)
    steps(theirs, other, seed=1)
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    resumed = build_optimiser(mine, optim)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(mine, resumed, seed=2)
    steps(theirs, other, seed=2)
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
