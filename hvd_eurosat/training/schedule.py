"""What changes with the epochs: the learning rate and the size of the training images.

Pure functions of the configuration and of how far the run has come, so that nothing of them needs saving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvd_eurosat.config.schema import Config, Data, Optim, Train, schedule_epochs

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
SIZE_STEP = 16  # pixels


def peak_rate(optim: Optim, global_batch: int) -> float:
    """optim.lr after optim.lr_scaling."""
    ratio = global_batch / optim.reference_batch
    return optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]


def learning_rate(optim: Optim, epochs: int, global_batch: int, progress: float) -> float:
    """The rate at `progress`, in epochs: samples seen / samples in the training set; epochs: of the schedule.

    one_cycle: Smith & Topin 2018, with cosine annealing as in torch's OneCycleLR; lr_scaling: Goyal et al. 2017
    (linear), Hoffer et al. 2017 (sqrt). multistep's milestones count the warm-up, as Goyal's do.
    """
    peak, warmup = peak_rate(optim, global_batch), optim.warmup_epochs
    if progress < warmup:
        risen = (math.floor(progress) if optim.warmup_stairs else progress) / warmup
        return peak * (optim.warmup_start + (1 - optim.warmup_start) * risen)
    done = (progress - warmup) / (epochs - warmup)
    whole = max(0, math.floor(progress) - math.ceil(warmup))
    if optim.schedule == "exponential":
        return peak * optim.gamma**whole
    if optim.schedule == "step":
        return peak * optim.gamma ** (whole // optim.step_size)
    if optim.schedule == "multistep":
        return peak * optim.gamma ** sum(progress >= milestone for milestone in optim.milestones)
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "cosine" or warmup:
        return peak * _cosine(done)
    if done < ONE_CYCLE_RISE:
        return peak * (1 - (1 - ONE_CYCLE_START) * _cosine(done / ONE_CYCLE_RISE))
    return peak * _cosine((done - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))


def rate_share(optim: Optim, depth: int, epoch: int) -> float:
    """The share of the learning rate that layers so many stages before the head have in an epoch (from 0).

    layer_decay: as in BERT's fine-tuning (Clark et al. 2020); unfreeze_epochs: Howard & Ruder 2018.
    """
    return optim.layer_decay**depth if epoch >= depth * optim.unfreeze_epochs else 0.0


def _cosine(done: float) -> float:
    """From 1 down to 0 as `done` goes from 0 to 1."""
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2


def image_sizes(full: int, start: int) -> list[int]:
    """The sides of the training images, in turn: progressive learning (Tan & Le 2021, "EfficientNetV2")."""
    return [*range(start or full, full, SIZE_STEP), full]


def image_size(data: Data, train: Train, epochs: int, epoch: int) -> int:
    """The side of the training images in an epoch (from 0) of the schedule's `epochs`; full in the last."""
    sizes = image_sizes(data.input_side, train.start_size)[-epochs:]
    left = max(0, epochs - 1 - epoch)
    return sizes[-1 - left * len(sizes) // epochs]


def saved_schedule(saved: Mapping[str, Any]) -> tuple[Optim, Train, int]:
    """Of a saved configuration: optim, train, and the epochs that its schedule was made for."""
    optim, train = Optim(**saved["optim"]), Train(**saved["train"])
    return optim, train, schedule_epochs(optim, train)


def jump(saved: Mapping[str, Any], config: Config, global_batch: int, progress: float) -> str | None:
    """What another train.epochs than the saved configuration's changes at once, if anything, in a line."""
    (optim, train, before), now = saved_schedule(saved), schedule_epochs(config.optim, config.train)
    rates = [learning_rate(optim, epochs, global_batch, progress) for epochs in (before, now)]
    sizes = [image_size(config.data, train, epochs, math.floor(progress)) for epochs in (before, now)]
    what = [f"the learning rate from {rates[0]:.3g} to {rates[1]:.3g}"] if rates[0] != rates[1] else []
    what += [f"the training images from {sizes[0]} to {sizes[1]} pixels"] if sizes[0] != sizes[1] else []
    if not what:
        return None
    change = "raising" if config.train.epochs > train.epochs else "lowering"
    return (
        f"{change} train.epochs from {train.epochs} to {config.train.epochs} takes {' and '.join(what)} at epoch "
        f"{progress:g}; --optim.schedule_epochs {before} keeps the schedule as it was"
    )
