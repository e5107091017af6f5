"""Convolutions that are faster as matrix products on a CPU: pointwise ones, and those onto tiny images.

oneDNN's weight gradient for a 3x3 convolution of 512 channels onto 2x2 pixels takes 43 ms for a batch of 64 on one
core, the same sums as one matrix product 9 ms; for the pointwise ones of the last stage 17 ms and 2 ms. Together
they are a third of ResNet-50's training step at 64x64. Frozen weights are brought into the precision and the shape of
the computation once, not in every step: 8 % of a step of bn+head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_eurosat.model import products

TINY = 2


class Convolution(nn.Conv2d):
    """nn.Conv2d without bias, groups or dilation, for images in channels-last order."""

    _prepared: tuple[object, Any] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W]; returns [B, out_channels, H / stride, W / stride]."""
        if torch.compiler.is_compiling():
            compiled: Tensor = self._conv_forward(images, self._compiled(), None)
            return compiled
        pixels, stride, frozen = images.permute(0, 2, 3, 1), self.stride[0], not self.weight.requires_grad
        if images.is_cpu and self.kernel_size == (1, 1):
            return self._product(pixels[:, ::stride, ::stride])
        if images.is_cpu and self.kernel_size == (3, 3):
            if frozen and stride == 1 and images.shape[2:] == (TINY, TINY):
                return self._as_images(self._times(pixels.flatten(1), _as_dense_matrix), TINY, TINY)
            if frozen and stride == 2 and images.shape[2:] == (4, 4) and products.are_fast(images, self.weight):
                corners = self._ready(_as_corners)
                rows = torch.stack([products.multiply(pixels[:, y, x].flatten(1), m) for y, x, m in corners], dim=1)
                return self._as_images(rows, TINY, TINY)
            if not frozen and -(-images.shape[-1] // stride) <= TINY:
                windows = F.pad(pixels, (0, 0, 1, 1, 1, 1)).unfold(1, 3, stride).unfold(2, 3, stride)
                return self._product(windows.permute(0, 1, 2, 4, 5, 3).flatten(3))
            if stride == 1 and products.are_fast(images, self.weight):
                return products.convolve(images, self.weight, self._ready(products.winograd_panels))
        convolved: Tensor = self._conv_forward(images, self._ready(_as_it_is), None)
        return convolved

    def _product(self, pixels: Tensor) -> Tensor:
        """[B, H, W, K]: [B, out, H, W], channels last; in two dimensions, or torch takes a slow batched product."""
        return self._as_images(self._times(pixels.flatten(0, 2), _as_matrix), *pixels.shape[1:3])

    def _as_images(self, rows: Tensor, height: int, width: int) -> Tensor:
        return rows.view(-1, height, width, self.out_channels).permute(0, 3, 1, 2)

    def _times(self, rows: Tensor, as_matrix: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, K] by the weight as a matrix [M, K]: [N, M]."""
        if not self.weight.requires_grad and products.are_fast(rows, self.weight):
            return products.multiply(rows, self._ready(as_matrix, products.panels))
        return F.linear(rows, self._ready(as_matrix))

    def prepare(self) -> None:
        """For compiled code on GPUs: bring a frozen weight into the precision of the context, before it is compiled."""
        if not self.weight.requires_grad:
            self._ready(_as_it_is)

    def _compiled(self) -> Tensor:
        """The weight that compiled code uses: on GPUs what was prepared, on CPUs, whose shapes are others, its own."""
        prepared = self._prepared
        return self.weight if prepared is None or self.weight.is_cpu else prepared[1]

    def prepared(self) -> tuple[object, list[Tensor]]:
        """What is kept of a frozen weight: the making, which is another object each time, and its tensors."""
        return self._prepared, _tensors(self._prepared and self._prepared[1])

    def _ready(self, *shapes: Callable[[Any], Any]) -> Any:
        """The weight in the shape of the computation; a frozen one in its precision too, and only once.

        Whatever writes to a weight in torch, as load_state_dict, changes its _version. Horovod's broadcast does not: it
        comes before the first step.
        """
        if self.weight.requires_grad:
            return _shaped(self.weight, shapes)
        kind = self.weight.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.weight.dtype
        key = shapes, dtype, self.weight.data_ptr(), self.weight._version
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, _shaped(self.weight.detach().to(dtype), shapes)
        return self._prepared[1]


def _shaped(weight: Any, shapes: Iterable[Callable[[Any], Any]]) -> Any:
    for shape in shapes:
        weight = shape(weight)
    return weight


def _tensors(shaped: Any) -> list[Tensor]:
    if isinstance(shaped, Tensor):
        return [shaped]
    return [tensor for part in shaped for tensor in _tensors(part)] if isinstance(shaped, tuple | list) else []


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _as_matrix(weight: Tensor) -> Tensor:
    """[out, in, H, W] as [out, H * W * in]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _as_dense_matrix(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] as the map from all of a 2x2 image to all of the next, [4 * out, 4 * in].

    It has 4/9 of the products of the convolution, whose windows are padding for the rest.
    """
    taps = [weight[:, :, 1 - y : 3 - y, 1 - x : 3 - x] for y in range(TINY) for x in range(TINY)]
    return torch.cat([_as_matrix(tap) for tap in taps])


def _as_corners(weight: Tensor) -> list[tuple[slice, slice, products.Panels]]:
    """[out, in, 3, 3] as a map for each 2x2 result of stride 2: which of the 4x4 pixels it sees, and their panels."""
    sides = [(slice(0, 2), slice(1, 3)), (slice(1, 4), slice(0, 3))]  # pixels, and the kernel's taps on them
    return [(y, x, products.panels(_as_matrix(weight[:, :, v, u]))) for y, v in sides for x, u in sides]


def use_matrix_products(model: nn.Module) -> None:
    """Make every nn.Conv2d of the model a Convolution, in place; the parameters stay what they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Convolution
