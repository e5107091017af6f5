"""Learning rate and image size, from their definitions."""

from __future__ import annotations

import math

from hvd_eurosat.config.schema import Config


def learning_rate(config: Config, global_batch: int, progress: float) -> float:
    """At `progress`, in epochs."""
    optim, warmup = config.optim, config.optim.warmup_epochs
    span = optim.schedule_epochs or config.train.epochs
    peak = optim.lr * (global_batch / optim.reference_batch) ** {"none": 0, "linear": 1, "sqrt": 0.5}[optim.lr_scaling]
    if progress < warmup:
        risen = math.floor(progress) if optim.warmup_stairs else progress
        return peak * (optim.warmup_start + (1 - optim.warmup_start) * risen / warmup)
    left = min(1, (progress - warmup) / (span - warmup))
    epoch = math.floor(progress)
    after = max(0, epoch - math.ceil(warmup))
    if optim.schedule == "cosine" or (optim.schedule == "one_cycle" and warmup):
        return peak * half_cosine(left)
    if optim.schedule == "one_cycle":
        return peak * (1 - 24 / 25 * half_cosine(left / 0.3) if left < 0.3 else half_cosine((left - 0.3) / 0.7))
    falls = {"exponential": after, "step": after // optim.step_size, "constant": 0}
    falls["multistep"] = len([milestone for milestone in optim.milestones if milestone <= epoch])
    return peak * optim.gamma ** falls[optim.schedule]


def half_cosine(done: float) -> float:
    """From 1 to 0."""
    return (math.cos(math.pi * done) + 1) / 2


def image_size(config: Config, epoch: int) -> int:
    """Of an epoch (from 0)."""
    full = config.data.input_size or config.data.image_size
    sizes = [full]
    size = config.train.start_size
    while size and size < full:
        sizes.insert(-1, size)
        size += 16
    span = config.optim.schedule_epochs or config.train.epochs
    sizes = sizes[-span:]
    left = max(0, span - 1 - epoch)
    return sizes[len(sizes) - 1 - left * len(sizes) // span]
