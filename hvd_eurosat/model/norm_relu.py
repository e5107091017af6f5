"""BatchNorm, the addition of a residual and ReLU in one, where that is faster: on CPUs in training, and on GPUs.

Each of them waits for memory. On CPUs, as one, in C++, they read or write the activations eight times instead of
thirteen (with a residual eleven instead of sixteen), forward and backward together: a step of bn+head takes a fifth
less on a Xeon with AMX. It is on wherever it could be built. For GPUs see norm_relu_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hvd_eurosat.model import native

LIBRARY = "norm_relu"
LANES = 16  # channels that the library works on at a time, at most
MOST = 2**31  # numbers in one tensor, for the kernels count in 32 bits
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def norm_relu(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(norm(images) + residual), all [B, C, H, W]; the norm alone without `relu`.

    In training updates norm's statistics (on GPUs but for the batches, see `count`); may skip its hooks.
    """
    if _is_fused(norm, images, residual):
        if _is_on_gpu(images):
            return cast(Tensor, _gpu().norm_relu(norm, images, residual, relu))
        bound = 0.0 if relu else -math.inf
        output: Tensor = _NormReLU.apply(images, residual, norm.weight, norm.bias, bound, norm)
        return output
    normed: Tensor = norm(images) if images.is_cpu or not norm.training else uncounted(norm, images)
    if residual is not None:
        normed += residual
    return F.relu(normed, inplace=True) if relu else normed


def uncounted(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """norm(images) in training, [B, C, H, W], but for the batches that it counts: on GPUs `count` does it for all."""
    buffers = norm.running_mean, norm.running_var
    return F.batch_norm(images, *buffers, norm.weight, norm.bias, True, cast(float, norm.momentum), norm.eps)


def count(norms: Iterable[nn.BatchNorm2d]) -> None:
    """One more batch for each that trains, in one kernel; none may."""
    counts = [cast(Tensor, norm.num_batches_tracked) for norm in norms if norm.training]
    if counts:
        torch._foreach_add_(counts, 1)


def is_available() -> bool:
    """Whether launch/install.sh could build a library for this CPU, and it loads."""
    return native.library(LIBRARY) is not None


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why they are not one on this device for images of this dtype, float32 or bfloat16; None if they are.

    On a GPU the first call takes seconds.
    """
    if device.type == "cpu":
        return None if is_available() else "that takes AVX2, and g++ 11 at set-up"
    gpu = _gpu()
    return cast("str | None", gpu.obstacle(device, dtype)) if gpu else "there is no Triton"


@cache
def _gpu() -> Any:
    """The module of the kernels for GPUs, for which alone Triton is imported; None if there is no Triton."""
    try:
        from hvd_eurosat.model import norm_relu_gpu
    except ImportError:
        return None
    return norm_relu_gpu


def _is_fused(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None) -> bool:
    """Compiled code is inductor's, which fuses them by itself."""
    if torch.compiler.is_compiling() or not _is_fit(norm, images, residual):
        return False
    if not _is_on_gpu(images):
        return images.is_cpu and norm.training and is_available()
    if images.numel() >= MOST:
        return False
    if not norm.training and torch.is_grad_enabled() and _trains(norm.weight, norm.bias, images, residual):
        return False  # a frozen layer between others that train, which is rare
    return obstacle(images.device, images.dtype) is None


def _is_on_gpu(images: Tensor) -> bool:
    """And holds numbers: torch's fake tensors are of a class of their own."""
    return images.is_cuda and type(images) is Tensor


def _trains(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_fit(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None) -> bool:
    """Whether images, residual and norm are of the kind that the fused functions know."""
    if not (norm.affine and norm.weight.dtype == torch.float32 and norm.track_running_stats and norm.momentum):
        return False
    if images.dtype not in NAMES or images.shape[1] % LANES or images.numel() <= images.shape[1]:
        return False
    both = [images] if residual is None else [images, residual]
    alike = all(i.dtype == images.dtype and i.shape == images.shape for i in both)
    return alike and all(i.is_contiguous(memory_format=torch.channels_last) for i in both)


def _call(function: str, images: Tensor, *arguments: Tensor | float | None) -> None:
    """The library's function of this name, with what follows its arguments: rows and channels."""
    channels = images.shape[1]
    native.call(LIBRARY, f"{function}_{NAMES[images.dtype]}", *arguments, images.numel() // channels, channels)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        bound: float,
        norm: nn.BatchNorm2d,
    ) -> Tensor:
        output = torch.empty_like(images)
        mean, variance, inverse = torch.empty(3, len(weight))
        found = mean, variance, inverse
        _call("forward", images, images, residual, output, weight, bias, bound, float(norm.eps), *found)
        _update(norm, mean, variance, images.numel() // len(weight))
        ctx.bound = bound
        ctx.save_for_backward(images, None if residual is None else output, weight, bias, mean, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, output, weight, bias, mean, inverse = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_residual = None if output is None else torch.empty_like(images)
        of_images = torch.empty_like(images) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = torch.empty(2, len(weight))
        gradients = of_residual, of_images, weight, bias, ctx.bound, mean, inverse, of_weight, of_bias
        _call("backward", images, gradient, images, output, *gradients)
        return of_images, of_residual, of_weight, of_bias, None, None


def _update(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as nn.BatchNorm2d keeps them."""
    buffers, momentum = dict(norm.named_buffers()), cast(float, norm.momentum)
    buffers["running_mean"].lerp_(mean, momentum)
    buffers["running_var"].lerp_(variance * (count / (count - 1)), momentum)
    buffers["num_batches_tracked"] += 1
