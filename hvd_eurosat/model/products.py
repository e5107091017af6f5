"""Convolutions in fp32 as products with weights prepared for them, in C++, for CPUs with AVX2 and no AVX-512.

Their arithmetic is what bounds a step. A 3x3 convolution takes 36 products for 4x4 pixels and not 144: Winograd's
algorithm (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"), in a third of oneDNN's time. The
other products leave out what MKL copies at each call: four fifths of its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvd_eurosat.model import native

LIBRARY = "products"
COLUMNS = 16  # of a panel
TILE = 4  # results along its side
PRODUCTS = (TILE + 2) ** 2
_SIDE = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24  # G in the paper
WINOGRAD = torch.kron(_SIDE, _SIDE)  # [36, 9]
Panels = tuple[Tensor, Tensor]  # for the way there and back


def are_fast(images: Tensor, weight: Tensor) -> bool:
    """Whether the library is there and takes these images and a weight [out, in, ...]."""
    if not (images.is_cpu and weight.is_cpu and images.dtype == weight.dtype == torch.float32):
        return False
    fits = weight.shape[0] % COLUMNS == 0 == weight.shape[1] % COLUMNS
    return fits and not torch.is_autocast_enabled("cpu") and native.library(LIBRARY) is not None


def panels(matrix: Tensor) -> Panels:
    """Of a matrix [out, in]: float32 [out / COLUMNS, in, COLUMNS] and [in / COLUMNS, out, COLUMNS]."""
    return _panels(matrix.T), _panels(matrix)


@torch.no_grad()
def winograd_panels(weight: Tensor) -> Panels:
    """Of a kernel [out, in, 3, 3]: float32 [36, out / COLUMNS, in, COLUMNS] and [36, in / COLUMNS, out, COLUMNS]."""
    there, back = weight.permute(2, 3, 1, 0).flatten(0, 1), weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 1)
    return torch.tensordot(WINOGRAD, _panels(there), 1), torch.tensordot(WINOGRAD, _panels(back), 1)


def multiply(rows: Tensor, matrix: Panels) -> Tensor:
    """rows: [N, in]; returns [N, out], for a matrix that does not train."""
    product: Tensor = _Multiplied.apply(rows, *matrix)
    return product


def convolve(images: Tensor, weight: Tensor, kernel: Panels) -> Tensor:
    """images: [B, in, H, W]; returns [B, out, H, W]. weight: [out, in, 3, 3], that of the kernel's panels."""
    convolved: Tensor = _Convolved.apply(images, weight, *kernel)
    return convolved


def _panels(matrices: Tensor) -> Tensor:
    """[..., K, N] as [..., N / COLUMNS, K, COLUMNS]."""
    *outer, depth, columns = matrices.shape
    return matrices.reshape(*outer, depth, columns // COLUMNS, COLUMNS).transpose(-3, -2).contiguous()


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    assert rows.shape[1] == matrix.shape[1]
    rows, columns = rows.contiguous(), len(matrix) * COLUMNS
    product = rows.new_empty(len(rows), columns)
    native.call(LIBRARY, "product", rows, matrix, product, *rows.shape, columns)
    return product


def _convolution(images: Tensor, kernel: Tensor) -> Tensor:
    assert images.shape[1] == kernel.shape[2]
    pixels, columns = images.permute(0, 2, 3, 1).contiguous(), kernel.shape[1] * COLUMNS
    convolved = pixels.new_empty(*pixels.shape[:3], columns)
    native.call(LIBRARY, "convolution", pixels, kernel, convolved, *pixels.shape, columns)
    return convolved.permute(0, 3, 1, 2)


def _tiles(function: str, images: Tensor) -> Tensor:
    """[36, tiles, channels]."""
    pixels = images.permute(0, 2, 3, 1).contiguous()
    batch, height, width, channels = pixels.shape
    tiles = pixels.new_empty(PRODUCTS, batch * -(-height // TILE) * -(-width // TILE), channels)
    native.call(LIBRARY, function, pixels, tiles, *pixels.shape)
    return tiles


def _gradient_of_weight(images: Tensor, gradient: Tensor) -> Tensor:
    """[out, in, 3, 3]."""
    of_results, of_images = _tiles("tiles_of_gradient", gradient), _tiles("tiles_of_images", images)
    products = torch.bmm(of_results.transpose(1, 2), of_images)
    kernel: Tensor = torch.tensordot(WINOGRAD.T, products, 1)
    return kernel.view(3, 3, *products.shape[1:]).permute(2, 3, 0, 1)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _product(rows, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return _product(gradient, back), None, None


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(images if ctx.needs_input_grad[1] else None, back)
        return _convolution(images, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, back = ctx.saved_tensors
        of_images = _convolution(gradient, back) if ctx.needs_input_grad[0] else None
        of_weight = None if images is None else _gradient_of_weight(images, gradient)
        return of_images, of_weight, None, None
