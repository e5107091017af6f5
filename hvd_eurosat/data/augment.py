"""Augmentation and normalisation of whole batches, on their device.

Images are uint8 or, where their files have 16 bits, float32 with the same whole numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.inputs import IMAGENET_MEAN, IMAGENET_STD

VIEWS = 8
FLIP, TURN, CROP, ZOOM, COLOUR, ERASE = 10, 20, 30, 40, 50, 60  # keys of `mix`, so that each draws numbers of its own
COLOUR_OF_MORE = 100  # bands than red, green and blue, so that these keep their own
ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # as in the paper


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
    size = images.shape[-1]  # below: from which place each pixel of a view comes
    place = torch.arange(size**2, device=images.device).view(1, 1, size, size)
    places = torch.cat([view_of(place, n).reshape(1, -1) for n in range(VIEWS)])[view]
    return images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1)).view_as(images)


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
    """Training images [B, C, S, S] augmented, brought to `size` and normalised: float32 [B, C, size, size].

    indices int64 [B]; epoch int64 []: as a tensor, so that where this is compiled every epoch has the same code.
    """
    return normalise(resized(augment(images, indices, seed, epoch, data, size), size), data)


def plain_input(images: Tensor, data: Data) -> Tensor:
    """Images to be judged, [B, C, S, S], as the network takes them: float32 [B, C, I, I] of data.input_side I."""
    return normalise(resized(images, data.input_side), data)


def augment(images: Tensor, indices: Tensor, seed: int, epoch: int | Tensor, data: Data, size: int = 0) -> Tensor:
    """Another view of each image every epoch, all eight in eight epochs, and what else the configuration asks for.

    images [B, C, S, S], indices int64 [B] (of the samples in their split). Random in (seed, epoch, index) only.
    What turns or zooms brings them to a larger `size` at once: two bilinear steps would blur them more than one does
    those that are judged.
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
            flips = uniform(seed, indices, epoch, FLIP + key) < probability
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(axis), images)
    if data.random_rotate or data.jitter_crop or data.random_zoom:
        images = resample(images, _places(indices, seed, epoch, data), max(size, images.shape[-1]))
    if data.random_brightness or data.random_contrast or data.random_gain:
        images = recolour(images, *_colours(images.shape[1], indices, seed, epoch, data))
    if data.random_erase:
        images = erase(images, _erased(images, indices, seed, epoch, data), data)
    return images


def resample(images: Tensor, places: Tensor, size: int) -> Tensor:
    """Each image [B, C, S, S] seen through its own affine map, float32 [B, 2, 3] of the output's coordinates, as

    [B, C, size, size].

    Bilinear, mirrored at the border; coordinates run from -1 to 1 between the image's edges.
    """
    grid = F.affine_grid(places, [*images.shape[:2], size, size], align_corners=False)
    sampled = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return sampled.round().to(images.dtype)


def _places(indices: Tensor, seed: int, epoch: int | Tensor, data: Data) -> Tensor:
    """A random turn about the centre, then a random window: the map from the output to the image, [B, 2, 3]."""
    angle = (2 * uniform(seed, indices, epoch, TURN) - 1) * math.radians(data.random_rotate)
    left, right, top, bottom = (data.jitter_crop * uniform(seed, indices, epoch, CROP + side) for side in range(4))
    zoom = 1 - data.random_zoom * uniform(seed, indices, epoch, ZOOM)
    width, height = (1 - (left + right) / 2) * zoom, (1 - (top + bottom) / 2) * zoom
    x, y = (left - right) / 2 * zoom, (top - bottom) / 2 * zoom
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * width, -sin * height, cos * x - sin * y, sin * width, cos * height, sin * x + cos * y]
    return torch.stack(rows, 1).view(-1, 2, 3)


def recolour(images: Tensor, gains: Tensor, contrast: Tensor) -> Tensor:
    """[B, C, S, S] with each band times its gain (float32 [B, C]), then the distances from the mean of all pixels

    times the contrast (float32 [B]); of 16-bit images from the mean of the band's own, for bands differ much there.
    """
    pixels = images.to(torch.float32, copy=True)
    mean = pixels.mean((2, 3)) * gains
    mean = mean.mean(1, keepdim=True) if images.dtype == torch.uint8 else mean
    scale, offset = gains * contrast[:, None], mean * (1 - contrast[:, None])
    recoloured = pixels.mul_(scale[:, :, None, None]).add_(offset[:, :, None, None])
    return recoloured.round_().clamp_(0, 255 if images.dtype == torch.uint8 else 65535).to(images.dtype)


def _colours(count: int, indices: Tensor, seed: int, epoch: int | Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """Gains of so many bands, float32 [B, count], with the brightness in them, and contrast, float32 [B]."""
    spreads = (data.random_brightness, data.random_contrast, *[data.random_gain] * count)
    keys = [COLOUR + n if n < 5 else COLOUR_OF_MORE + n for n in range(len(spreads))]
    draws = [uniform(seed, indices, epoch, key) for key in keys]
    brightness, contrast, *bands = (1 + s * (2 * u - 1) for s, u in zip(spreads, draws, strict=True))
    return brightness[:, None] * torch.stack(bands, 1), contrast


def erase(images: Tensor, inside: Tensor, data: Data) -> Tensor:
    """Random erasing (Zhong et al. 2020): data.mean where `inside`, bool [B, 1, S, S]."""
    scale = _scale(images)
    colour = _per_channel(tuple(round(scale * mean) for mean in _mean(data)), images.device).to(images.dtype)
    return torch.where(inside, colour, images)


def _erased(images: Tensor, indices: Tensor, seed: int, epoch: int | Tensor, data: Data) -> Tensor:
    """Rectangles that lie within their images, or nothing: bool [B, 1, S, S]."""
    chance, area, aspect, down, right = (uniform(seed, indices, epoch, ERASE + n).double() for n in range(5))
    area = ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area
    aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect
    height, width = ((area * a).sqrt().clamp(max=1) for a in (aspect, 1 / aspect))
    inside = box(height / 2 + down * (1 - height), width / 2 + right * (1 - width), height, width, images.shape[-1])
    return inside & (chance < data.random_erase).view(-1, 1, 1, 1)


def box(down: Tensor, right: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """Which pixels of size x size lie in a box about its middle (down, right), all float64 [B] in sides of the image:

    bool [B, 1, size, size].
    """
    middles = (torch.arange(size, dtype=torch.float64, device=down.device) + 0.5) / size
    rows, columns = (
        (middles - at.double()[:, None]).abs() < side[:, None] / 2 for at, side in ((down, height), (right, width))
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def uniform(seed: int, indices: Tensor, *keys: int | Tensor) -> Tensor:
    """Random numbers in [0, 1), float32 [B]."""
    return (mix(seed, indices, *keys) >> 7).float() / 2**24


def resized(images: Tensor, size: int) -> Tensor:
    """Images [B, C, S, S] as [B, C, size, size]: bilinear, antialiased."""
    if size == images.shape[-1]:
        return images
    pixels = images if images.is_cpu else images.float()  # torch resizes uint8 on CPUs only
    others = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return others if others.dtype == images.dtype else others.round().to(images.dtype)


def normalise(images: Tensor, data: Data) -> Tensor:
    """[B, C, S, S] to float32 as the network takes it, channels last: (x / 255 - mean) / std of uint8, else

    (x - mean) / std.
    """
    mean, std = (_per_channel(values, images.device) for values in (_mean(data), data.std or IMAGENET_STD))
    pixels = images.to(torch.float32, copy=True).div_(_scale(images) * std).sub_(mean / std)
    return pixels.to(memory_format=torch.channels_last)  # last: in that order arithmetic takes a core thrice as long


def _scale(images: Tensor) -> int:
    """What a pixel is divided by before mean and std."""
    return 255 if images.dtype == torch.uint8 else 1


def _mean(data: Data) -> tuple[float, ...]:
    """data.mean; ImageNet's where that is left to the data, which is then RGB: others are settled before."""
    return data.mean or IMAGENET_MEAN


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [1, C, 1, 1]. Filled on the device, for a copy would make the host wait for it."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])[None]
