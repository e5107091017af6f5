"""What a figure on a split is worth: intervals, calibration, and whether two networks differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BINS = 15  # of probabilities, equally wide (Guo et al. 2017)
NORMAL_95 = 1.959964  # standard normal deviate of a two-sided 95 % interval


def reliability(log_probabilities: Tensor, labels: Tensor, weights: Tensor, bins: int = BINS) -> Tensor:
    """Of the samples whose most probable class has a probability in each bin: number, probabilities, correct.

    log_probabilities: [B, C]; labels: int64 [B]; weights: [B], 1 for a sample that counts. Sums, float64 [3, bins].
    """
    import torch  # here, for reports of a run need the rest without it

    best, said = log_probabilities.max(1)
    probability = best.double().exp()
    places = ((probability * bins).ceil().long() - 1).clamp(0, bins - 1)
    facts = torch.stack([torch.ones_like(probability), probability, said == labels]) * weights.double()
    return torch.zeros(3, bins, dtype=torch.float64, device=labels.device).index_add_(1, places, facts)


def calibration_error(bins: Tensor | NDArray[np.float64]) -> float:
    """Expected calibration error (Naeini et al. 2015) of `reliability`'s sums: how far off a probability is, 0..1."""
    number, probability, correct = bins
    return float(abs(correct - probability).sum() / number.sum())


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of successes (Wilson 1927)."""
    share, spread = correct / count, NORMAL_95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def macro_f1(confusion: Tensor) -> float:
    """The mean F1 of the classes that were there or were said. confusion: int64 [C, C], rows are the true classes."""
    hits, both = confusion.diag().double(), (confusion.sum(0) + confusion.sum(1)).double()
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def mcnemar(only_first: int, only_second: int) -> float:
    """The probability of counts as uneven as these if both networks were right equally often (exact, two-sided).

    Of images on which one of the two alone is right (McNemar 1947).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail: int = sum(math.comb(count, n) for n in range(fewer + 1))
    return min(1.0, tail / (1 << count) * 2)
