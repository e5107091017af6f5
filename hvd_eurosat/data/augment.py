"""Augmentation and normalisation of whole batches, on their device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

VIEWS = 8


def mix(indices: Tensor, *keys: int) -> Tensor:
    """Random bits from (keys, index) alone: int64 [B] in [0, 2**31), whatever the rank or the batch.

    Two rounds of the finaliser of SplitMix64 (Steele et al. 2014); int64 products wrap as they should.
    """
    x = indices
    for key in keys:
        x = (x + key + 1) * -7046029254386353131
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x & 0x7FFFFFFF


def turn_and_flip(images: Tensor, view: Tensor) -> Tensor:
    """The view 0..7 (int64 [B]) of each square image [B, C, S, S] among its flips and quarter turns."""
    bit = [(view >> n & 1).bool().view(-1, 1, 1, 1) for n in range(3)]
    images = torch.where(bit[0], images.flip(3), images)
    images = torch.where(bit[1], images.flip(2), images)
    return torch.where(bit[2], images.transpose(2, 3), images)


def shift(images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Each image [B, C, S, S] moved by its own dy, dx pixels (int64 [B]), mirrored at the border."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    rows, columns = ((place + d.view(-1, 1)).abs() for d in (dy, dx))
    rows, columns = (torch.where(at < size, at, 2 * (size - 1) - at) for at in (rows, columns))
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(images: Tensor, indices: Tensor, seed: int, epoch: int, max_shift: int) -> Tensor:
    """Another view of each image every epoch, all eight in eight epochs, and a random shift.

    images [B, C, S, S], indices int64 [B] (of the samples in their split). Random in (seed, epoch, index) only.
    Going through the views in turn shows more variety than drawing them (Jordan 2024, "alternating flip").
    """
    images = turn_and_flip(images, (mix(indices, seed) ^ epoch) % VIEWS)
    if max_shift:
        span = 2 * max_shift + 1
        dy, dx = (mix(indices, seed, epoch, axis) % span - max_shift for axis in (1, 2))
        images = shift(images, dy, dx)
    return images


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] to float32 as the ImageNet weights expect it: (x / 255 - mean) / std, channels last."""
    mean, std = _statistics(images.device)
    scaled = images.to(torch.float32, memory_format=torch.channels_last) / (255 * std)
    return scaled - mean / std


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std
