"""BatchNorm, the addition of a residual and ReLU in one on GPUs, in Triton: two kernels forward, two backward.

torch takes some five and four, by the count of launches, and each waits for the GPU's memory. These read or write the
activations eight times, with a residual eleven times, forward and backward together. In evaluation it is one kernel.
They were compiled for GPUs and run by Triton's interpreter, but have never run on a GPU: see `obstacle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hvd_eurosat.model import norm_relu_kernels as kernels

PROGRAMS = 256  # of a kernel, about: two for each of the 132 processors of an H100
WARPS = 8
OLDEST = (8, 0)  # compute capability that Triton supports
# Images on which a GPU is tried: parts of several tiles; the last part is not full, nor is the last column.
CASE = (9, 48, 64, 63)
ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # in proportion, by which a GPU may differ from torch's operators


def norm_relu(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(norm(images) + residual), all [B, C, H, W], channels last and of one dtype; the norm alone without `relu`.

    In training updates norm's statistics but for the batches it counts. In evaluation it has no gradient.
    """
    if norm.training:
        trained: Tensor = _NormReLU.apply(images, residual, norm.weight, norm.bias, relu, norm)
        return trained
    output, cut = torch.empty_like(images), Cut(images)
    cut.launch(kernels.forward, images, residual, output, *_of(norm), None, None, None, None, relu)
    return output


class Cut:
    """How a matrix is cut for the programs of a kernel."""

    def __init__(self, images: Tensor) -> None:
        self.channels = images.shape[1]
        self.rows = images.numel() // self.channels
        self.columns = _ceil(self.channels, kernels.CHANNELS.value)
        tiles = _ceil(self.rows, kernels.ROWS.value)
        parts = min(tiles, kernels.PARTS.value, max(1, PROGRAMS // self.columns))
        self.length = _ceil(tiles, parts) * kernels.ROWS.value
        self.parts = _ceil(self.rows, self.length)

    def table(self, like: Tensor) -> Tensor:
        """For two sums of each part, float32 [2, parts, channels]."""
        return torch.empty(2, self.parts, self.channels, device=like.device)

    def launch(self, kernel: Any, *arguments: Any, parts: int | None = None) -> None:
        """A program for each piece, or for each column of so many parts."""
        shape = self.rows, self.channels, self.length, self.parts
        kernel[parts or self.parts, self.columns](*arguments, *shape, num_warps=WARPS)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _of(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, cast(float, norm.momentum)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        norm: nn.BatchNorm2d,
    ) -> Tensor:
        cut, output = Cut(images), torch.empty_like(images)
        means, squares = cut.table(images)
        mean, inverse = torch.empty(2, cut.channels, device=images.device)
        cut.launch(kernels.statistics, images, means, squares)
        cut.launch(kernels.forward, images, residual, output, *_of(norm), means, squares, mean, inverse, relu)
        ctx.relu = relu
        ctx.save_for_backward(images, None if residual is None else output, weight, bias, mean, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, output, weight, bias, mean, inverse = ctx.saved_tensors
        cut, relu = Cut(images), ctx.relu
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        table, found = cut.table(images), (weight, bias, mean, inverse)
        of_residual = None if output is None else torch.empty_like(images)
        cut.launch(kernels.sums, gradient, images, output, of_residual, *found, *table, relu)
        if of_residual is not None:  # ReLU's mask is in it
            gradient, relu = of_residual, False
        of_images = torch.empty_like(images) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = torch.empty(2, cut.channels, device=images.device)
        results, parts = (of_images, of_weight, of_bias), 1 if of_images is None else cut.parts
        cut.launch(kernels.backward, gradient, images, *results, *found, *table, relu, parts=parts)
        return of_images, of_residual, of_weight, of_bias, None, None


@cache
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels are not used on a GPU for images of this dtype; None if they are.

    They are tried on a small case first, because they have never run on a GPU: where they give another result than
    torch's operators, or none, training goes on with those. It takes seconds, once; the host waits for the device.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return "its compute capability is {}.{}, and Triton wants 8.0".format(*torch.cuda.get_device_capability(device))
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            wrong = [name for name, apart in _differences(device, dtype) if not apart < ERROR[dtype]]
    except Exception as error:  # no C compiler, no libcuda.so, a folder that cannot be written to, a fault of Triton …
        return f"Triton failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return f"Triton's {wrong[0]} is not torch's" if wrong else None


def _differences(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Of a small case in each of its kinds from what torch's operators give in float32, in proportion."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(CASE, generator=generator).to(device, dtype) + n for n in (1, 0, 0))
    images, added, gradient = (i.contiguous(memory_format=torch.channels_last) for i in drawn)
    for training, adds, relu in ((True, False, True), (True, True, True), (True, False, False), (False, True, True)):
        ours, theirs = (
            _results(call, kind, training, relu, images, added if adds else None, gradient)
            for call, kind in ((norm_relu, dtype), (_by_torch, torch.float32))
        )
        for name, wanted in theirs.items():
            yield name, float((ours[name] - wanted).norm() / wanted.norm())


def _results(
    call: Callable[..., Tensor],
    kind: torch.dtype,
    training: bool,
    relu: bool,
    images: Tensor,
    added: Tensor | None,
    gradient: Tensor,
) -> dict[str, Tensor]:
    """Of one pass each way, or in evaluation of one forward: all that it gives, float64."""
    norm = nn.BatchNorm2d(images.shape[1], device=images.device).train(training).requires_grad_(training)
    with torch.no_grad():
        for tensor, row in zip((norm.weight, norm.bias, norm.running_mean), gradient[:, :, 0, 0], strict=False):
            cast(Tensor, tensor).copy_(row)
    x, residual = (i if i is None else i.to(kind).detach().requires_grad_(training) for i in (images, added))
    output = call(norm, x, residual, relu)
    found = {"output": output, "running mean": norm.running_mean, "running variance": norm.running_var}
    if training:
        output.backward(gradient.to(kind))
        leaves = {"images": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
        found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {name: cast(Tensor, tensor).detach().double() for name, tensor in found.items()}


def _by_torch(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    output: Tensor = norm(images) if residual is None else norm(images) + residual
    return F.relu(output) if relu else output
