"""Training images mixed with others: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), on their device.

Whom an image is mixed with, and how, is drawn from (seed, epoch, index): it does not depend on the other images of its
batch, and so not on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.augment import augment, box, mix, normalise, resized, uniform

PARTNER, SHARE, PLACE, KIND = 70, 71, 72, 74  # keys of `mix`
LEVELS = 1024  # of the share, all equally likely
GRID = 2**14  # places at which the density of shares is added up


def partners(seed: int, indices: Tensor, epoch: int | Tensor, count: int) -> Tensor:
    """With which of the split's `count` images those of `indices` are mixed in an epoch: int64 [B]."""
    return mix(seed, indices, epoch, PARTNER) % count


def quantiles(alpha: float, device: torch.device) -> Tensor | None:
    """Of Beta(alpha, alpha), from which a share is drawn: float64 [LEVELS]; None for an alpha of 0.

    The density is added up over t of 0..1, where the share is t^(1/alpha) / (t^(1/alpha) + (1 - t)^(1/alpha)): over the
    share itself it has no bound at 0 and 1.
    """
    if not alpha:
        return None
    t = (np.arange(GRID) + 0.5) / GRID
    one, other = t ** (1 / alpha), (1 - t) ** (1 / alpha)
    density = (one + other) ** (-2 * alpha)
    below = (density.cumsum() - density / 2) / density.sum()
    levels = np.interp((np.arange(LEVELS) + 0.5) / LEVELS, below, one / (one + other))
    return torch.from_numpy(levels).to(device)


def mixed_input(
    images: Tensor,
    indices: Tensor,
    others: Tensor,
    other_indices: Tensor,
    seed: int,
    epoch: Tensor,
    size: int,
    data: Data,
    mixup: Tensor | None,
    cutmix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As augment.network_input, each image mixed with the other in its place, which is augmented as it is by itself.

    mixup, cutmix: quantiles of their shares. Also the share that each image keeps, and its label with it: float64 [B].
    """
    images, others = (augment(i, n, seed, epoch, data, size) for i, n in ((images, indices), (others, other_indices)))
    mixed, share = mix_pairs(images, others, indices, seed, epoch, mixup, cutmix)
    return normalise(resized(mixed, size), data), share


def mix_pairs(
    images: Tensor,
    others: Tensor,
    indices: Tensor,
    seed: int,
    epoch: int | Tensor,
    mixup: Tensor | None,
    cutmix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[B, C, S, S] from two such, and the share of the first, float64 [B]. With both, each has one by chance."""
    level = (uniform(seed, indices, epoch, SHARE) * LEVELS).long()
    found = [_blend(images, others, mixup[level])] if mixup is not None else []
    if cutmix is not None:
        down, right = (uniform(seed, indices, epoch, PLACE + axis) for axis in range(2))
        found.append(_paste(images, others, cutmix[level], down, right))
    if len(found) == 1:
        return found[0]
    (blended, share), (pasted, kept) = found
    pastes = uniform(seed, indices, epoch, KIND) < 0.5
    return torch.where(pastes.view(-1, 1, 1, 1), pasted, blended), torch.where(pastes, kept, share)


def _blend(images: Tensor, others: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """All pixels by their shares (float64 [B])."""
    blended = others.float().lerp(images.float(), share.float().view(-1, 1, 1, 1))
    return blended.round().to(images.dtype), share


def _paste(images: Tensor, others: Tensor, share: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A square of the other image, as large as its share, about a place (0..1) and cut off at the border, which counts

    for the shares.
    """
    side = (1 - share).sqrt()
    inside = box(down, right, side, side, images.shape[-1])
    return torch.where(inside, others, images), 1 - inside.double().mean((1, 2, 3))
