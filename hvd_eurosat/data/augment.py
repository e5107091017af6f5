"""Augmentation and normalisation of whole batches, on their device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hvd_eurosat.config.schema import Data

VIEWS = 8
FLIP, TURN, CROP, ZOOM = 10, 20, 30, 40  # keys of `mix`, so that each draws numbers of its own


def mix(seed: int, indices: Tensor, *keys: int | Tensor) -> Tensor:
    """Random bits from (seed, index, keys) alone: int64 [B] in [0, 2**31), whatever the rank or the batch.

    Rounds of the finaliser of SplitMix64 (Steele et al. 2014), one for each number; int64 products wrap as they should.
    The seed has a round of its own before the index is added: else seed s + 1 would be seed s, an image further on.
    """
    x = torch.full_like(indices, seed)
    for key in (0, indices, *keys):
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


def view_of(images: Tensor, view: int) -> Tensor:
    """The same view of all images [B, C, S, S]."""
    images = images.flip(3) if view & 1 else images
    images = images.flip(2) if view & 2 else images
    return images.transpose(2, 3) if view & 4 else images


def shift(images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Each image [B, C, S, S] moved by its own dy, dx pixels (int64 [B]), mirrored at the border."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    rows, columns = ((place + d.view(-1, 1)).abs() for d in (dy, dx))
    rows, columns = (torch.where(at < size, at, 2 * (size - 1) - at) for at in (rows, columns))
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def network_input(images: Tensor, indices: Tensor, seed: int, epoch: Tensor, size: int, data: Data) -> Tensor:
    """Training images uint8 [B, 3, S, S] augmented, brought to `size` and normalised: float32 [B, 3, size, size].

    indices int64 [B]; epoch int64 []: as a tensor, so that where this is compiled every epoch has the same code.
    """
    return normalise(resized(augment(images, indices, seed, epoch, data), size), data)


def plain_input(images: Tensor, data: Data) -> Tensor:
    """Images to be judged, uint8 [B, 3, S, S], as the network takes them: float32 [B, 3, I, I] of data.input_side I."""
    return normalise(resized(images, data.input_side), data)


def augment(images: Tensor, indices: Tensor, seed: int, epoch: int | Tensor, data: Data) -> Tensor:
    """Another view of each image every epoch, all eight in eight epochs, and what else the configuration asks for.

    images uint8 [B, 3, S, S], indices int64 [B] (of the samples in their split). Random in (seed, epoch, index) only.
    Going through the views in turn shows more variety than drawing them (Jordan 2024, "alternating flip").
    """
    if data.augment:
        images = turn_and_flip(images, (mix(seed, indices) ^ epoch) % VIEWS)
    if data.max_shift:
        span = 2 * data.max_shift + 1
        dy, dx = (mix(seed, indices, epoch, axis) % span - data.max_shift for axis in (1, 2))
        images = shift(images, dy, dx)
    for key, (probability, axis) in enumerate(((data.random_horizontal_flip, 3), (data.random_vertical_flip, 2))):
        if probability:
            flips = _uniform(seed, indices, epoch, FLIP + key) < probability
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(axis), images)
    if data.random_rotate or data.jitter_crop or data.random_zoom:
        images = resample(images, _places(indices, seed, epoch, data))
    return images


def resample(images: Tensor, places: Tensor) -> Tensor:
    """Each image uint8 [B, C, S, S] seen through its own affine map, float32 [B, 2, 3] of the output's coordinates.

    Bilinear, mirrored at the border; coordinates run from -1 to 1 between the image's edges.
    """
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return sampled.round().to(torch.uint8)


def _places(indices: Tensor, seed: int, epoch: int | Tensor, data: Data) -> Tensor:
    """A random turn about the centre, then a random window: the map from the output to the image, [B, 2, 3]."""
    angle = (2 * _uniform(seed, indices, epoch, TURN) - 1) * math.radians(data.random_rotate)
    left, right, top, bottom = (data.jitter_crop * _uniform(seed, indices, epoch, CROP + side) for side in range(4))
    zoom = 1 - data.random_zoom * _uniform(seed, indices, epoch, ZOOM)
    width, height = (1 - (left + right) / 2) * zoom, (1 - (top + bottom) / 2) * zoom
    x, y = (left - right) / 2 * zoom, (top - bottom) / 2 * zoom
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * width, -sin * height, cos * x - sin * y, sin * width, cos * height, sin * x + cos * y]
    return torch.stack(rows, 1).view(-1, 2, 3)


def _uniform(seed: int, indices: Tensor, *keys: int | Tensor) -> Tensor:
    """Random numbers in [0, 1), float32 [B]."""
    return (mix(seed, indices, *keys) >> 7).float() / 2**24


def resized(images: Tensor, size: int) -> Tensor:
    """Images uint8 [B, C, S, S] as [B, C, size, size]: bilinear, antialiased."""
    if size == images.shape[-1]:
        return images
    pixels = images if images.is_cpu else images.float()  # torch resizes uint8 on CPUs only
    others = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return others if images.is_cpu else others.round().to(torch.uint8)


def normalise(images: Tensor, data: Data) -> Tensor:
    """uint8 [B, 3, S, S] to float32 as the network takes it: (x / 255 - mean) / std, channels last."""
    mean, std = (_per_channel(values, images.device) for values in (data.mean, data.std))
    scaled = images.to(torch.float32, memory_format=torch.channels_last) / (255 * std)
    return scaled - mean / std


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [1, 3, 1, 1]. Filled on the device, for a copy would make the host wait for it."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])[None]
