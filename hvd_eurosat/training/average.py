"""The running average of what trains, which is validated, saved and exported in its place (train.ema)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

EVERY = 8  # steps: in each, reading and writing every weight once more would cost a CPU 3 % of a step of `all`


class Average:
    """Exponential means of the weights that train and of this rank's BatchNorm statistics, corrected for their start.

    They take in the first step and every EVERY-th of the run. The correction is Adam's (Kingma & Ba 2015): the weights
    of all that was taken in add up to 1 from the first on. weights: by name; statistics: float32 [n], as
    Statistics.flat; share: float64 [], 1 - decay^steps.
    """

    def __init__(self, weights: Mapping[str, Tensor], statistics: Tensor, decay: float) -> None:
        self._decay = decay**EVERY
        self._live = [*weights.values(), statistics]
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.statistics = statistics.clone()
        self.share = torch.zeros((), dtype=torch.float64, device=statistics.device)

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """After a step, unless it was skipped (bool []), in which it is the weights as they are if it is nothing yet.

        Without waiting for the device.
        """
        share = self.share * self._decay + (1 - self._decay)
        part = torch.where(skip & (self.share > 0), 0.0, (1 - self._decay) / share)
        for mean, live in zip(self._means(), self._live, strict=True):
            mean.lerp_(live, part.to(mean.dtype))
        self.share.copy_(torch.where(skip, self.share, share))

    def begin_anew(self) -> None:
        """With the step that comes next, which is to be taken in."""
        self.share.zero_()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the network has the average weights."""
        live = self._live[:-1]
        kept = [weight.detach().clone() for weight in live]
        _copy_all(live, list(self.weights.values()))
        try:
            yield
        finally:
            _copy_all(live, kept)

    def restore(self, weights: Mapping[str, Tensor], statistics: Tensor, share: float) -> None:
        """Put back what a checkpoint holds."""
        _copy_all(self._means(), [*(weights[name] for name in self.weights), statistics])
        self.share.fill_(share)

    def _means(self) -> list[Tensor]:
        return [*self.weights.values(), self.statistics]


@torch.no_grad()
def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
