"""Cases to draw with hypothesis, and the comparison of product and reference on one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hvd_eurosat.config.schema import Config, Data, Model, Optim, Run, Train, Valid
from hvd_eurosat.data.inputs import IMAGENET_STD
from hvd_eurosat.training.checkpoint import Checkpoint
from tests.reference import product
from tests.reference.trainer import DivergedError, Log, Split, Trainer, network

CLASSES = 3
RATES = {"sgd": 0.02, "lars": 2.0, "adam": 1e-3, "adamw": 1e-3, "lamb": 5e-3, "adagrad": 1e-3, "rmsprop": 3e-4}
SAME = 1e-6  # of what a tensor has moved by, in float64
ROUNDED = 0.005  # of the pixels may be rounded to the next of 256 levels: places and colours are computed in float32


@dataclass(frozen=True)
class Case:
    """sizes: the number of ranks, and that after a stop; stop: after so many steps; faults: rank by step."""

    config: Config
    images: int
    sizes: tuple[int, int]
    stop: int | None
    faults: tuple[tuple[int, int], ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Of all keys that change results, in small."""
    epochs, count = draw(st.integers(1, 3)), draw(st.integers(12, 18))
    sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    config = draw(configs(epochs, count // max(sizes)))
    steps = epochs * math.ceil(count / (config.train.batch_size * sizes[0]))
    stop = draw(st.none() | st.integers(1, steps))
    faults = draw(st.lists(st.tuples(st.integers(0, steps), st.integers(0, 2)), max_size=4)) if draw(often(1)) else []
    return Case(config, count, sizes, stop, tuple(faults))


def often(parts: int) -> st.SearchStrategy[bool]:
    """True in so many of four."""
    return st.sampled_from([True] * parts + [False] * (4 - parts))


def either(plain: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The plain value half the time."""
    return st.sampled_from([plain] * len(others) + list(others))


@st.composite
def configs(draw: st.DrawFn, epochs: int, shard: int) -> Config:
    """For ranks with `shard` images each."""
    size, shown = draw(either(32, 33, 49)), draw(either(0, 32, 45))
    sizes = [0] * 3 + [side for side in (32, 33) if side <= (shown or size)]
    data = Data(
        image_size=size,
        input_size=shown,
        augment=draw(st.booleans()),
        max_shift=draw(either(0, 1, 4)),
        random_horizontal_flip=draw(either(0.0, 0.5, 1.0)),
        random_vertical_flip=draw(either(0.0, 0.5)),
        random_rotate=draw(either(0.0, 10.0, 180.0)),
        jitter_crop=draw(either(0.0, 0.3)),
        random_zoom=draw(either(0.0, 0.4)),
        random_brightness=draw(either(0.0, 0.4)),
        random_contrast=draw(either(0.0, 0.4)),
        random_gain=draw(either(0.0, 0.2)),
        random_erase=draw(either(0.0, 0.5, 1.0)),
        mean=draw(either((0.485, 0.456, 0.406), (0.1, 0.2, 0.3))),
        std=draw(either((0.229, 0.224, 0.225), (1.0, 0.5, 0.4))),
    )
    trainable = draw(st.sampled_from(["bn+head"] * 6 + ["head", "layer1,fc", "layer1.0.bn1,layer2.1,fc", "all"]))
    momentum = draw(either(0.1, 0.01, 0.5))
    model = Model(
        arch="resnet18",
        weights="none",
        trainable=trainable,
        bn_momentum=momentum,
        bn_epsilon=draw(either(1e-5, 1e-2)),
        bn_affine=draw(either(True, True, False)),
        head_bias=momentum == 0.5,  # no draw of its own, which would change all that follow
    )
    train = Train(
        epochs=epochs,
        batch_size=draw(st.integers(3, min(6, shard))),
        start_size=draw(st.sampled_from(sizes)),
        mixup=draw(either(0.0, 0.2, 1.0)),
        cutmix=draw(either(0.0, 1.0)),
        ema=draw(either(0.0, 0.9, 0.99)),
        label_smoothing=draw(either(0.0, 0.1, 0.5)),
        class_weights=draw(either((), (1.0, 2.0, 0.5), (3.0, 3.0, 0.1))),
        precision="fp32",
        seed=draw(st.integers(0, 2**31 - 1) | st.integers(0, 3)),
    )
    valid = Valid(batch_size=draw(st.integers(1, 9)), sharded=draw(st.booleans()), views=draw(either(1, 1, 8)))
    run = Run(verify_interval=0)
    return Config(data=data, model=model, optim=draw(optims(epochs)), train=train, valid=valid, run=run)


@st.composite
def optims(draw: st.DrawFn, epochs: int) -> Optim:
    """All optimisers and schedules."""
    name = draw(st.sampled_from(sorted(RATES)))
    warmup = draw(either(0.0, *(w for w in (0.3, 1.0, 1.5) if w < epochs)))
    schedule = draw(st.sampled_from(["constant", "exponential", "step", "multistep", "cosine", "one_cycle"]))
    milestones = range(math.floor(warmup) + 1, epochs)
    if schedule == "multistep" and not milestones:
        schedule = "cosine"
    schedule_epochs = draw(either(0, epochs + 1, epochs + 3))
    return Optim(
        name=name,
        lr=RATES[name] * draw(st.sampled_from([0.3, 1.0, 2.0])),
        momentum=draw(either(0.9, 0.0, 0.5)),
        nesterov=draw(st.booleans()),
        beta1=draw(either(0.9, 0.5)),
        beta2=draw(either(0.999, 0.9)),
        eps=draw(either(1e-8, 1e-3)),
        amsgrad=draw(st.booleans()),
        trust=draw(either(1e-3, 1e-2)),
        weight_decay=draw(either(0.0, 1e-2, 0.3)),
        layer_decay=draw(either(1.0, 0.5, 0.9)),
        unfreeze_epochs=draw(either(0, 1)) if schedule_epochs > 5 else 0,
        schedule=schedule,
        gamma=draw(either(0.95, 0.5, 0.1)),
        step_size=draw(st.integers(1, 3)),
        milestones=draw(st.sets(st.sampled_from(milestones), min_size=1).map(sorted)) if milestones else (),
        warmup_epochs=warmup,
        warmup_start=draw(either(0.0, 0.2, 1.0)),
        lr_scaling=draw(st.sampled_from(["none", "linear", "sqrt"])),
        reference_batch=draw(st.sampled_from([4, 9, 16])),
        compression=draw(either("none", "none", "fp16")),
        schedule_epochs=schedule_epochs,
        warmup_stairs=draw(st.booleans()),
    )


@cache
def splits(count: int, size: int) -> dict[str, Split]:
    """Noise about a colour of each class; every class is there."""
    random = np.random.default_rng(count)

    def split(n: int) -> Split:
        labels = np.concatenate([np.arange(CLASSES), random.integers(0, CLASSES, n - CLASSES)])
        middle = 60 + 60 * np.eye(CLASSES)[labels][:, None, None, :]
        noise = random.normal(0, 50, (n, size, size, 3))
        return Split(np.clip(middle + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))

    return {"train": split(count), "valid": split(7)}


@cache
def weights(affine: bool, head_bias: bool = False) -> dict[str, Tensor]:
    """Random ones, in float64, whose BatchNorm layers are not all the same."""
    generator = torch.Generator().manual_seed(0)
    plain = network(Model(arch="resnet18", bn_affine=affine, head_bias=head_bias), CLASSES).state_dict()
    state = {name: tensor.clone() for name, tensor in plain.items()}
    for tensor in state.values():
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.shape == (CLASSES,):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.ndim == 1:
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return state


class Shown:
    """What the product's networks saw, one step after the other, for the reference to compare and go on with.

    Where a step knew what the head sees, its network has seen the same images in an earlier step.
    """

    def __init__(self, config: Config, shown: list[list[Tensor | None]], first: int) -> None:
        data = config.data
        self._seen: dict[bytes, Tensor] = {}
        self._shown, self._first = shown, first
        resampled = data.random_rotate or data.jitter_crop or data.random_zoom
        stretched = (1 + data.random_brightness) * (1 + data.random_contrast) * (1 + data.random_gain)
        self._rounded = bool(resampled or stretched > 1 or config.train.mixup)
        # A pixel that was rounded to the next level lies further off once its image has more contrast.
        self._apart = math.ceil(stretched) if resampled else 1
        self._level = 1 / (255 * torch.tensor(data.std or IMAGENET_STD, dtype=torch.float64)).view(3, 1, 1)

    def __call__(self, step: int, rank: int, own: Tensor) -> Tensor:
        pixels = [one.numpy().tobytes() for one in own]
        theirs = self._shown[rank][step - self._first]
        if theirs is None:
            return torch.stack([self._seen[one] for one in pixels])
        self._seen |= zip(pixels, theirs, strict=True)
        assert theirs.shape == own.shape, f"step {step}, rank {rank}: images of another size"
        levels = (own - theirs).abs() / self._level
        other = (levels > 1e-3).double().mean()
        allowed = ROUNDED if self._rounded else 0
        apart = f"by up to {levels.max():.3g} levels"
        assert levels.max() < self._apart + 1e-3, f"step {step}, rank {rank}: other images, {apart}"
        assert other <= allowed, f"step {step}, rank {rank}: {100 * other:.2f} % of the pixels are others"
        return theirs


def check(case: Case) -> None:
    """Raises AssertionError where product and reference differ."""
    model = case.config.model
    data, start = splits(case.images, case.config.data.image_size), weights(model.bn_affine, model.head_bias)
    faults = dict(case.faults)
    reference = Trainer(case.config, data, CLASSES, start)
    saved = None
    for size, stop in zip(case.sizes, (case.stop, None), strict=True):
        theirs = product.run(case.config, data, CLASSES, start, saved, size, stop, faults)
        settle = Shown(case.config, theirs.shown, reference.step)
        reference.log, diverged = Log(), False
        try:
            with product.one_thread():
                reference.run(size, stop, faults, settle)
        except DivergedError:
            diverged = True
        assert theirs.diverged == diverged
        saved = theirs.saved
        compare_logs(theirs.log, reference.log, case.config.optim.compression)
        compare_weights(saved, reference, start)
        if stop is None or diverged:
            break


def compare_logs(theirs: Log, ours: Log, compression: str) -> None:
    """Step by step, and epoch by epoch. Where gradients travel in 16 bits, so does the loss."""
    rel = 1e-7 if compression == "none" else 1e-3
    assert theirs.rates == pytest.approx(ours.rates, rel=1e-12, abs=1e-15)
    assert theirs.losses == pytest.approx(ours.losses, rel=rel, nan_ok=True)
    assert len(theirs.epochs) == len(ours.epochs)
    for their, our in zip(theirs.epochs, ours.epochs, strict=True):
        assert (their.loss, their.valid_loss) == pytest.approx((our.loss, our.valid_loss), rel=1e-7, nan_ok=True)
        counts = [(one.correct, one.samples, one.skipped, one.confusion) for one in (their, our)]
        assert counts[0] == counts[1]


def compare_weights(saved: Checkpoint, ours: Trainer, start: dict[str, Tensor]) -> None:
    """The network as saved, its weights as they go on, and each rank's own statistics, by what they have moved."""
    flat = torch.stack([torch.cat(one) for one in ours.statistics])
    first = torch.cat([t for name, t in start.items() if name.endswith(("running_mean", "running_var"))])
    if ours.config.train.ema:
        for name, tensor in ours.model.named_parameters():
            if tensor.requires_grad:
                close(name, saved.live[name], tensor.detach(), start[name])
    close("the ranks' statistics", saved.rank_buffers, flat, first)
    for name, tensor in ours.as_saved().state_dict().items():
        if tensor.is_floating_point():
            close(name, saved.model[name], tensor, start[name])


def close(name: str, theirs: Tensor, ours: Tensor, start: Tensor) -> None:
    """In proportion to what was learnt; a tensor that has hardly moved is measured by its size."""
    apart, moved = (theirs - ours).norm(), (ours - start).norm()
    assert apart <= SAME * moved + 1e-12 * start.norm(), f"{name}: {apart:.3g} apart, moved by {moved:.3g}"
