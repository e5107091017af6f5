"""What the network is shown of one training image, from the definitions in hvd_eurosat/data/augment.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.config.schema import Data

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.float64]
WORD = 2**64 - 1


def mix(seed: int, index: int, *keys: int) -> int:
    """31 random bits: two rounds of SplitMix64's finaliser for each key."""
    x = seed
    for key in (0, index, *keys):
        x = (x + key + 1) * 0x9E3779B97F4A7C15 & WORD
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
        x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
        x ^= x >> 31
    return x & 0x7FFFFFFF


def order_seed(seed: int) -> int:
    """To which DistributedSampler adds the epoch."""
    return mix(seed, 0)


def view_of(image: Pixels, view: int) -> Pixels:
    """One of its eight flips and quarter turns."""
    image = image[:, ::-1] if view & 1 else image
    image = image[::-1] if view & 2 else image
    return image.swapaxes(0, 1) if view & 4 else image


def augmented(image: Pixels, index: int, seed: int, epoch: int, data: Data) -> Pixels:
    """uint8 [S, S, 3], as is the result."""

    def uniform(key: int) -> float:
        return (mix(seed, index, epoch, key) >> 7) / 2**24

    if data.augment:
        image = view_of(image, (mix(seed, index) ^ epoch) % 8)
    if data.max_shift:
        down, right = (mix(seed, index, epoch, axis) % (2 * data.max_shift + 1) - data.max_shift for axis in (1, 2))
        room = data.max_shift
        padded = np.pad(image, ((room, room), (room, room), (0, 0)), mode="reflect")
        image = padded[room + down :, room + right :][: len(image), : len(image)]
    if uniform(10) < data.random_horizontal_flip:
        image = image[:, ::-1]
    if uniform(11) < data.random_vertical_flip:
        image = image[::-1]
    if data.random_rotate or data.jitter_crop or data.random_zoom:
        image = resampled(image, place(uniform, data))
    return image


def place(uniform: Callable[[int], float], data: Data) -> Callable[[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """Where points of the result lie in the image, both in -1..1: first into a window, then about the centre."""
    angle = math.radians(data.random_rotate) * (2 * uniform(20) - 1)
    zoom = 1 - data.random_zoom * uniform(40)
    left, right, top, bottom = (data.jitter_crop * uniform(30 + side) for side in range(4))

    def there(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
        x = zoom * ((-1 + left) * (1 - x) / 2 + (1 - right) * (1 + x) / 2)
        y = zoom * ((-1 + top) * (1 - y) / 2 + (1 - bottom) * (1 + y) / 2)
        return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)

    return there


def resampled(image: Pixels, there: Callable[[Numbers, Numbers], tuple[Numbers, Numbers]]) -> Pixels:
    """Bilinear, mirrored at the border."""
    size = len(image)
    middles = (2 * np.arange(size) + 1) / size - 1
    x, y = there(*np.meshgrid(middles, middles))
    (left, right, u), (top, bottom, v) = neighbours(x, size), neighbours(y, size)
    above = (1 - u) * image[top, left] + u * image[top, right]
    below = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return np.rint((1 - v) * above + v * below).astype(np.uint8)


def neighbours(at: Numbers, size: int) -> tuple[Any, Any, Numbers]:
    """The two pixels about each coordinate, and the share of the second."""
    edge = (at + 1) / 2 * size % (2 * size)  # in pixels from the border, mirrored there
    middle = np.clip(np.minimum(edge, 2 * size - edge) - 0.5, 0, size - 1)
    first = np.floor(middle).astype(int)
    return first, np.minimum(first + 1, size - 1), (middle - first)[:, :, None]


def network_input(image: Pixels, index: int, seed: int, epoch: int, size: int, data: Data) -> Tensor:
    """float64 [3, size, size]."""
    return normalised(augmented(image, index, seed, epoch, data), size, data)


def normalised(pixels: Pixels, size: int, data: Data) -> Tensor:
    """float64 [3, size, size] of uint8 [S, S, 3]."""
    if len(pixels) != size:
        planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        other = F.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
        pixels = other[0].numpy().transpose(1, 2, 0)
    return torch.from_numpy(((pixels / 255.0 - data.mean) / data.std).transpose(2, 0, 1).copy())
