"""The running average of the weights that train, which is validated, saved and exported in their place (train.ema)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

EVERY = 8  # steps: in each, reading and writing every weight once more would cost a CPU 3 % of a step of `all`


class Average:
    """Exponential means of the weights that train, corrected for their start.

    They take in the first step and every EVERY-th of the run. The correction is Adam's (Kingma & Ba 2015): the shares
    of all that was taken in add up to 1 from the first on. weights: by name; share: float64 [], 1 - decay^steps;
    statistics: of BatchNorm with these weights, as Statistics.flat and the same on all ranks, None until the first
    epoch is over.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay**EVERY
        self._live = list(weights.values())
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.share = torch.zeros((), dtype=torch.float64, device=self._live[0].device)
        self.statistics: Tensor | None = None

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """After a step, unless it was skipped (bool []), in which it is the weights as they are if it is nothing yet.

        Without waiting for the device.
        """
        share = self.share * self._decay + (1 - self._decay)
        part = torch.where(skip & (self.share > 0), 0.0, (1 - self._decay) / share)
        for mean, live in zip(self.weights.values(), self._live, strict=True):
            mean.lerp_(live, part.to(mean.dtype))
        self.share.copy_(torch.where(skip, self.share, share))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the network has the average weights."""
        kept = [weight.detach().clone() for weight in self._live]
        _copy_all(self._live, self.weights.values())
        try:
            yield
        finally:
            _copy_all(self._live, kept)

    def restore(self, weights: Mapping[str, Tensor], share: float, statistics: Tensor | None) -> None:
        """Put back what a checkpoint holds."""
        _copy_all(self.weights.values(), [weights[name] for name in self.weights])
        self.share.fill_(share)
        self.statistics = statistics


@torch.no_grad()
def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
