# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The kernels of norm_relu_gpu.py, in Triton's language; they are compiled for the GPU when they are first launched.

Images are a matrix, [rows, channels], as they lie in memory channels last. It is cut into `parts` of `length` rows and
into columns of CHANNELS channels, and a program works on one piece. What it sums over its rows goes to a table, float32
[parts, channels]; each program of the next kernel sums its column of that table up again. There are no atomic
operations, and all orders are fixed: sums repeat bit for bit.

Arguments are addresses but for rows, channels, length, parts, eps, momentum and relu. Matrices are bf16 or float32, all
else is float32, and so are all sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(256)  # that a program has in work at a time, so that enough reads are on their way
HALF = tl.constexpr(128)  # in backward, which reads two or three matrices
CHANNELS = tl.constexpr(32)  # of a program
PARTS = tl.constexpr(128)  # at most


@triton.jit(do_not_specialize=["rows", "length", "parts"])
def statistics(images, means, squares, rows, channels, length, parts):
    """The mean of each part, and the sum of its squared differences from it.

    By Welford's algorithm in each row of a tile, so that a mean far from zero, or a value far from the mean, costs no
    digits.
    """
    part = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first, count = part * length, tl.minimum(length, rows - part * length)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, count, ROWS):
        there = (start + row < count) & (channel < channels)
        value = tl.load(images + (first + start + row) * channels + channel, there, 0.0).to(tl.float32)
        difference = tl.where(there, value - mean, 0.0)
        mean += difference * (1.0 / (start // ROWS + 1))
        square += difference * (value - mean)
    seen = ((count - row + ROWS - 1) // ROWS).to(tl.float32)  # by each row of the tile
    whole = tl.sum(seen * mean, 0, keep_dims=True) / count
    square = tl.sum(square + seen * (mean - whole) * (mean - whole), 0, keep_dims=True)
    tl.store(means + part * channels + channel, whole, channel < channels)
    tl.store(squares + part * channels + channel, square, channel < channels)


@triton.jit(do_not_specialize=["rows", "length", "parts"])
def forward(
    images, residual, output, weight, bias, running_mean, running_var, eps, momentum,
    means, squares, mean_of_all, inverse_of_all, relu: tl.constexpr, rows, channels, length, parts,
):  # fmt: skip
    """The output, by the statistics of the parts, or in evaluation, where there are none of them, by the running ones.

    The programs of the first part write the statistics of all, and update the running ones.
    """
    part = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    if means is None:
        mean = tl.load(running_mean + channel, known, 0.0)
        inverse = tl.rsqrt(tl.load(running_var + channel, known, 1.0) + eps)
    else:
        number = tl.arange(0, PARTS)[:, None]
        there = (number < parts) & known
        count = tl.maximum(tl.minimum(length, rows - number * length), 0).to(tl.float32)
        of_parts = tl.load(means + number * channels + channel, there, 0.0)
        mean = tl.sum(count * of_parts, 0, keep_dims=True) / rows
        square = tl.load(squares + number * channels + channel, there, 0.0)
        square = tl.sum(square + count * (of_parts - mean) * (of_parts - mean), 0, keep_dims=True)
        inverse = tl.rsqrt(square / rows + eps)
        writes = known & (part == 0)
        tl.store(mean_of_all + channel, mean, writes)
        tl.store(inverse_of_all + channel, inverse, writes)
        kept = tl.load(running_mean + channel, writes, 0.0)
        tl.store(running_mean + channel, kept + momentum * (mean - kept), writes)
        kept = tl.load(running_var + channel, writes, 0.0)
        tl.store(running_var + channel, kept + momentum * (square / (rows - 1) - kept), writes)
    scale = tl.load(weight + channel, known, 0.0) * inverse
    shift = tl.load(bias + channel, known, 0.0)
    first, count = part * length, tl.minimum(length, rows - part * length)
    for start in range(0, count, ROWS):
        inside = (start + row < count) & known
        place = (first + start + row) * channels + channel
        value = (tl.load(images + place, inside, 0.0).to(tl.float32) - mean) * scale + shift
        if residual is not None:
            value += tl.load(residual + place, inside, 0.0).to(tl.float32)
        if relu:
            value = tl.where(value < 0, 0.0, value)  # what is not a number stays so
        tl.store(output + place, value.to(output.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "length", "parts"])
def sums(
    gradient, images, output, of_residual, weight, bias, mean, inverse, of_weight, of_bias,
    relu: tl.constexpr, rows, channels, length, parts,
):  # fmt: skip
    """The sums over each part that make the gradients of weight and bias; the residual's gradient, if it has one.

    ReLU's mask is the output's, where there is a residual; else what is shown is computed again.
    """
    part = tl.program_id(0)
    row = tl.arange(0, HALF)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    center, factor = tl.load(mean + channel, known, 0.0), tl.load(inverse + channel, known, 0.0)
    scale, shift = tl.load(weight + channel, known, 0.0) * factor, tl.load(bias + channel, known, 0.0)
    first, count = part * length, tl.minimum(length, rows - part * length)
    by_weight = tl.zeros((HALF, CHANNELS), tl.float32)
    by_bias = tl.zeros((HALF, CHANNELS), tl.float32)
    for start in range(0, count, HALF):
        there = (start + row < count) & known
        place = (first + start + row) * channels + channel
        value = tl.load(gradient + place, there, 0.0).to(tl.float32)
        centered = tl.load(images + place, there, 0.0).to(tl.float32) - center
        if relu:
            shown = centered * scale + shift if output is None else tl.load(output + place, there, 0.0).to(tl.float32)
            value = tl.where(shown <= 0, 0.0, value)
        if of_residual is not None:
            tl.store(of_residual + place, value.to(of_residual.dtype.element_ty), there)
        by_weight += value * centered
        by_bias += value
    by_weight = tl.sum(by_weight, 0, keep_dims=True) * factor
    tl.store(of_weight + part * channels + channel, by_weight, known)
    tl.store(of_bias + part * channels + channel, tl.sum(by_bias, 0, keep_dims=True), known)


@triton.jit(do_not_specialize=["rows", "length", "parts"])
def backward(
    gradient, images, of_images, of_weight, of_bias, weight, bias, mean, inverse, weight_parts, bias_parts,
    relu: tl.constexpr, rows, channels, length, parts,
):  # fmt: skip
    """The gradients of weight and bias, by the programs of the first part, and that of the images, if it is wanted."""
    part = tl.program_id(0)
    row = tl.arange(0, HALF)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    number = tl.arange(0, PARTS)[:, None]
    there = (number < parts) & known
    by_weight = tl.sum(tl.load(weight_parts + number * channels + channel, there, 0.0), 0, keep_dims=True)
    by_bias = tl.sum(tl.load(bias_parts + number * channels + channel, there, 0.0), 0, keep_dims=True)
    tl.store(of_weight + channel, by_weight, known & (part == 0))
    tl.store(of_bias + channel, by_bias, known & (part == 0))
    if of_images is not None:
        center, factor = tl.load(mean + channel, known, 0.0), tl.load(inverse + channel, known, 0.0)
        scale, shift = tl.load(weight + channel, known, 0.0) * factor, tl.load(bias + channel, known, 0.0)
        slope, offset = by_weight / rows * factor, by_bias / rows
        first, count = part * length, tl.minimum(length, rows - part * length)
        for start in range(0, count, HALF):
            inside = (start + row < count) & known
            place = (first + start + row) * channels + channel
            value = tl.load(gradient + place, inside, 0.0).to(tl.float32)
            centered = tl.load(images + place, inside, 0.0).to(tl.float32) - center
            if relu:
                value = tl.where(centered * scale + shift <= 0, 0.0, value)
            value = scale * (value - offset - centered * slope)
            tl.store(of_images + place, value.to(of_images.dtype.element_ty), inside)
