"""What the network is shown of one training image, from the definitions in hvd_eurosat/data/augment.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.config.schema import Data, Train
from hvd_eurosat.data.inputs import IMAGENET_MEAN, IMAGENET_STD

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


def augmented(image: Pixels, index: int, seed: int, epoch: int, data: Data, size: int) -> Pixels:
    """uint8 [S, S, 3], as is the result; of a larger size [size, size, 3] if it is turned, cut or zoomed."""

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
        image = resampled(image, place(uniform, data), max(size, len(image)))
    if data.random_brightness or data.random_contrast or data.random_gain:
        image = recoloured(image, uniform, data)
    if uniform(60) < data.random_erase:
        area, aspect = 0.02 + 0.31 * uniform(61), 0.3 * 11 ** uniform(62)
        height, width = min(1, math.sqrt(area * aspect)), min(1, math.sqrt(area / aspect))
        top, left = uniform(63) * (1 - height), uniform(64) * (1 - width)
        inside = box(len(image), top, top + height, left, left + width)
        image = np.where(inside, np.rint(255 * np.array(data.mean or IMAGENET_MEAN)), image).astype(np.uint8)
    return image


def recoloured(image: Pixels, uniform: Callable[[int], float], data: Data) -> Pixels:
    """Brighter or darker, by band too, then more or less contrast about the mean of all pixels."""

    def factor(key: int, spread: float) -> float:
        return 1 + spread * (2 * uniform(key) - 1)

    gains = np.array([factor(52 + band, data.random_gain) for band in range(3)])
    lit = image * gains * factor(50, data.random_brightness)
    contrasted = lit.mean() + factor(51, data.random_contrast) * (lit - lit.mean())
    return np.clip(np.rint(contrasted), 0, 255).astype(np.uint8)


def box(size: int, top: float, bottom: float, left: float, right: float) -> NDArray[np.bool_]:
    """Pixels whose middle lies between these, in sides of the image: [size, size, 1]."""
    middles = (np.arange(size) + 0.5) / size
    rows, columns = (middles > top) & (middles < bottom), (middles > left) & (middles < right)
    return (rows[:, None] & columns)[:, :, None]


def mixed(image: Pixels, other: Pixels, index: int, seed: int, epoch: int, train: Train) -> tuple[Pixels, float]:
    """Two augmented images, mixed; the share of the first."""

    def uniform(key: int) -> float:
        return (mix(seed, index, epoch, key) >> 7) / 2**24

    pastes = train.cutmix > 0 and (not train.mixup or uniform(74) < 0.5)
    share = float(quantiles(train.cutmix if pastes else train.mixup)[int(1024 * uniform(71))])
    if not pastes:
        return np.rint(share * image + (1 - share) * other).astype(np.uint8), share
    half, down, right = math.sqrt(1 - share) / 2, uniform(72), uniform(73)
    inside = box(len(image), down - half, down + half, right - half, right + half)
    return np.where(inside, other, image), 1 - inside.mean()


@cache
def quantiles(alpha: float) -> Numbers:
    """1,024 of Beta(alpha, alpha)."""
    t = (np.arange(2**14) + 0.5) / 2**14
    total = t ** (1 / alpha) + (1 - t) ** (1 / alpha)
    mass = total ** (-2 * alpha)
    return np.interp(
        (np.arange(1024) + 0.5) / 1024, (np.cumsum(mass) - mass / 2) / mass.sum(), t ** (1 / alpha) / total
    )


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


def resampled(image: Pixels, there: Callable[[Numbers, Numbers], tuple[Numbers, Numbers]], size: int) -> Pixels:
    """Bilinear, mirrored at the border: uint8 [size, size, 3]."""
    middles = (2 * np.arange(size) + 1) / size - 1
    x, y = there(*np.meshgrid(middles, middles))
    (left, right, u), (top, bottom, v) = neighbours(x, len(image)), neighbours(y, len(image))
    above = (1 - u) * image[top, left] + u * image[top, right]
    below = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return np.rint((1 - v) * above + v * below).astype(np.uint8)


def neighbours(at: Numbers, size: int) -> tuple[Any, Any, Numbers]:
    """The two pixels about each coordinate, and the share of the second."""
    edge = (at + 1) / 2 * size % (2 * size)  # in pixels from the border, mirrored there
    middle = np.clip(np.minimum(edge, 2 * size - edge) - 0.5, 0, size - 1)
    first = np.floor(middle).astype(int)
    return first, np.minimum(first + 1, size - 1), (middle - first)[:, :, None]


def normalised(pixels: Pixels, size: int, data: Data) -> Tensor:
    """float64 [3, size, size] of uint8 [S, S, 3]."""
    if len(pixels) != size:
        planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        other = F.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
        pixels = other[0].numpy().transpose(1, 2, 0)
    scaled = (pixels / 255.0 - (data.mean or IMAGENET_MEAN)) / (data.std or IMAGENET_STD)
    return torch.from_numpy(scaled.transpose(2, 0, 1).copy())
