"""Distributed training with the ranks one after the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from hvd_eurosat.config.schema import Config, Model
from tests.reference import augmentation, schedule
from tests.reference.optimisers import optimiser

WIDTH = 16  # channels of the first stage, for speed; torchvision's has 64
Settle = Callable[[int, int, Tensor], Tensor]


@dataclass
class Split:
    """images: uint8 [N, S, S, 3]; labels: int64 [N]."""

    images: augmentation.Pixels
    labels: np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Epoch:
    """Of training: mean loss, correct, counted samples, skipped steps; of validation: mean loss and confusion."""

    loss: float
    correct: int
    samples: int
    skipped: int
    valid_loss: float
    confusion: list[list[int]]


@dataclass
class Log:
    """losses, rates: of each step."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)


class DivergedError(Exception):
    """Three steps in a row were not finite."""


@cache
def two_stages() -> nn.Module:
    """Those of torchvision's ResNet-18, WIDTH channels wide; to be copied."""
    from torchvision.models.resnet import BasicBlock, resnet18

    model = resnet18()
    model.inplanes = WIDTH
    model.conv1, model.bn1 = nn.Conv2d(3, WIDTH, 7, 2, padding=3, bias=False), nn.BatchNorm2d(WIDTH)
    model.layer1 = model._make_layer(BasicBlock, WIDTH, 2)
    model.layer2 = model._make_layer(BasicBlock, 2 * WIDTH, 2, stride=2)
    model.layer3 = model.layer4 = nn.Sequential()
    return model


@cache
def network(settings: Model, classes: int) -> nn.Module:
    """The first two stages of ResNet-18 in float64, and the head; to be copied."""
    model = copy.deepcopy(two_stages())
    model.fc = nn.Linear(2 * WIDTH, classes, bias=settings.head_bias)
    for name, module in model.named_modules():
        norm = isinstance(module, nn.BatchNorm2d)
        chosen = settings.trainable.split(",")
        trains = {"all": True, "head": name == "fc", "bn+head": name == "fc" or norm}.get(
            settings.trainable, any(name == one or name.startswith(one + ".") for one in chosen)
        )
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = trains
        if norm:
            module.eps, module.momentum, module.trains = settings.bn_epsilon, settings.bn_momentum, trains
            if not settings.bn_affine:
                module.weight = module.bias = None
    return model.double()


def show(norms: list[Any], statistics: list[Tensor]) -> None:
    """Give BatchNorm layers these running means and variances."""
    for norm, mean, variance in zip(norms, statistics[::2], statistics[1::2], strict=True):
        norm.running_mean, norm.running_var = mean.clone(), variance.clone()


def statistics_of(norms: list[Any]) -> list[Tensor]:
    """Their running means and variances."""
    return [t.clone() for norm in norms for t in (norm.running_mean, norm.running_var)]


def mean_of_ranks(statistics: list[list[Tensor]]) -> list[Tensor]:
    """Of each rank's."""
    return [torch.stack(every).mean(0) for every in zip(*statistics, strict=True)]


def spread(statistics: list[list[Tensor]], world: int) -> list[list[Tensor]]:
    """Each of so many ranks has the mean."""
    return [mean_of_ranks(statistics)] * world


class Trainer:
    """`settle(step, rank, images)` takes what this rank shows its network and returns what it is to go on with."""

    def __init__(self, config: Config, splits: dict[str, Split], classes: int, start: dict[str, Tensor]) -> None:
        self.config, self.splits = config, splits
        self.model = copy.deepcopy(network(config.model, classes))
        self.model.load_state_dict(start)
        self.optimiser = optimiser(self.model, config.optim)  # with a group for each weight
        self.stages = [name.split(".")[0] for name, p in self.model.named_parameters() if p.requires_grad]
        self.norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.statistics = [statistics_of(self.norms)]  # of each rank
        self.taken: list[list[Tensor]] = []  # weights, into the running average
        self.first = self._weights()
        self.estimated: list[Tensor] | None = None  # statistics of the average, at the last epoch's end
        self.epoch = self.samples = self.step = self.in_a_row = 0
        self.sums = np.zeros(4)
        self.log = Log()
        weights = torch.tensor(config.train.class_weights or [1.0] * classes, dtype=torch.float64)
        self.weights = weights / weights[splits["train"].labels].mean()

    def trainable(self) -> list[nn.Parameter]:
        """The weights that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trainable()]

    def _average(self) -> list[Tensor]:
        """Of the weights, with train.ema: each moment counts decay^8 times what the next one does."""
        moments, decay = self.taken or [self.first], self.config.train.ema**8
        shares = [decay**age for age in reversed(range(len(moments)))]
        every = zip(*moments, strict=True)
        return [sum(s * one for s, one in zip(shares, each, strict=True)) / sum(shares) for each in every]

    def as_saved(self) -> nn.Module:
        """A copy of the model as it is validated and saved."""
        model = copy.deepcopy(self.model)
        weights = self._average() if self.config.train.ema else self._weights()
        with torch.no_grad():
            for parameter, weight in zip((p for p in model.parameters() if p.requires_grad), weights, strict=True):
                parameter.copy_(weight)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        show(norms, self.estimated or mean_of_ranks(self.statistics))
        return model

    @torch.no_grad()
    def _estimate(self) -> list[Tensor]:
        """Statistics of the average of the weights: their mean over ten batches of 128 plain images, or fewer."""
        images = self.splits["train"].images
        size = min(128, len(images))
        count = min(10, len(images) // size)
        model, found = self.as_saved(), []
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.train(norm.trains)
            norm.momentum = 1.0
        for batch in range(count):
            places = [place * len(images) // (size * count) for place in range(batch, size * count, count)]
            model(self._plain(images[places]))
            found.append(statistics_of(norms))
        return mean_of_ranks(found)

    def _plain(self, images: augmentation.Pixels) -> Tensor:
        data = self.config.data
        return torch.stack([augmentation.normalised(one, data.input_size or data.image_size, data) for one in images])

    def run(self, world: int, stop: int | None, faults: dict[int, int], settle: Settle) -> None:
        """Train on `world` ranks to the end, or up to step `stop`. faults: the rank whose loss is nan, by step."""
        if len(self.statistics) != world:
            self.statistics = spread(self.statistics, world)
        self.in_a_row = 0
        length = len(self.splits["train"].labels)
        while self.epoch < self.config.train.epochs:
            order = self._order(world)
            while self.samples < length:
                self._step(order, world, faults, settle)
                if self.in_a_row == 3:
                    raise DivergedError
                if self.step == stop:
                    return
            self.estimated = self._estimate() if self.config.train.ema else None
            self._validate()
            self.epoch, self.samples, self.sums = self.epoch + 1, 0, np.zeros(4)

    def _order(self, world: int) -> list[int]:
        length = len(self.splits["train"].labels)
        seed = augmentation.order_seed(self.config.train.seed)
        shards = []
        for rank in range(world):
            sampler: DistributedSampler[int] = DistributedSampler(range(length), world, rank, seed=seed)
            sampler.set_epoch(self.epoch)
            shards.append(list(sampler))
        return [shards[place % world][place // world] for place in range(length)]

    def _step(self, order: list[int], world: int, faults: dict[int, int], settle: Settle) -> None:
        length, size = len(order), self.config.train.batch_size
        total = min(world * size, length - self.samples)
        rate = schedule.learning_rate(self.config, world * size, self.epoch + self.samples / length)
        losses, gradients, after, sums = [], [], [], np.zeros(4)
        for rank in range(world):
            places = range(self.samples + rank, self.samples + world * size, world)
            mine = [order[place % length] for place in places]
            counts = torch.tensor([float(place < length) for place in places], dtype=torch.float64)
            if self.step in faults and faults[self.step] % world == rank:
                counts *= torch.nan
            show(self.norms, self.statistics[rank])
            loss, facts = self._loss(mine, counts, rank, settle)
            gradients.append(self._gradients(loss / total))
            losses.append((loss / total).detach())
            after.append(statistics_of(self.norms))
            sums[:3] += facts
        loss, summed = self._sum(losses), [self._sum(list(every)) for every in zip(*gradients, strict=True)]
        finite = all(bool(g.isfinite().all()) for g in [loss, *summed])
        if finite:
            self.statistics, self.in_a_row = after, 0
            self._update(summed, rate)
        else:
            sums, self.in_a_row = np.array([0, 0, 0, 1]), self.in_a_row + 1
        if self.step % 8 == 0 and finite:
            self.taken.append(self._weights())
        elif self.step % 8 == 0 and not self.taken:
            self.first = self._weights()
        self.log.losses.append(float(loss))
        self.log.rates.append(rate)
        self.sums += sums
        self.samples, self.step = self.samples + total, self.step + 1

    def _loss(self, mine: list[int], counts: Tensor, rank: int, settle: Settle) -> tuple[Tensor, Any]:
        size = schedule.image_size(self.config, self.epoch)
        pixels, others, shares = zip(*(self._shown(index, size) for index in mine), strict=True)
        shown = [augmentation.normalised(one, size, self.config.data) for one in pixels]
        labels, other_labels = (torch.from_numpy(self.splits["train"].labels[list(n)]) for n in (mine, others))
        for norm in self.norms:
            norm.train(norm.trains)
        values = torch.log_softmax(self.model(settle(self.step, rank, torch.stack(shown))), 1)
        smoothing = self.config.train.label_smoothing
        share, losses = torch.tensor(shares, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part, target in ((share, labels), (1 - share, other_labels)):
            of_target = -values[range(len(mine)), target]
            smoothed = (1 - smoothing) * of_target - smoothing * values.mean(1)
            losses = losses + part * smoothed * self.weights[target]
        most = torch.where(share < 0.5, other_labels, labels)  # what each image shows most of
        nll, correct = -values[range(len(mine)), most], (values.argmax(1) == most).double()
        facts = [float((fact.detach() * counts).sum()) for fact in (nll, correct, torch.ones_like(nll))]
        return (losses * counts).sum(), np.array(facts)

    def _shown(self, index: int, size: int) -> tuple[augmentation.Pixels, int, float]:
        """An image augmented and mixed with another; that one's index; the share of the first."""
        train, images = self.config.train, self.splits["train"].images

        def augmented(index: int) -> augmentation.Pixels:
            return augmentation.augmented(images[index], index, train.seed, self.epoch, self.config.data, size)

        if not train.mixup and not train.cutmix:
            return augmented(index), index, 1.0
        other = augmentation.mix(train.seed, index, self.epoch, 70) % len(images)
        pixels, share = augmentation.mixed(augmented(index), augmented(other), index, train.seed, self.epoch, train)
        return pixels, other, share

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.trainable()))

    def _sum(self, every: list[Tensor]) -> Tensor:
        if self.config.optim.compression == "none" or len(every) == 1:
            return reduce(torch.add, every)
        return reduce(torch.add, [(one * len(every)).half() for one in every]).double() / len(every)

    def _update(self, gradients: list[Tensor], rate: float) -> None:
        for parameter, gradient in zip(self.trainable(), gradients, strict=True):
            parameter.grad = gradient
        optim, stages = self.config.optim, ["fc", "layer4", "layer3", "layer2", "layer1"]
        for group, stage in zip(self.optimiser.param_groups, self.stages, strict=True):
            before = stages.index(stage) if stage in stages else 5
            group["lr"] = rate * optim.layer_decay**before if self.epoch >= before * optim.unfreeze_epochs else 0.0
        self.optimiser.step()

    @torch.no_grad()
    def _validate(self) -> None:
        split = self.splits["valid"]
        model = self.as_saved().eval()
        each = []
        for view in range(self.config.valid.views):
            each.append(self._plain([augmentation.view_of(image, view) for image in split.images]))
        values = torch.stack([torch.softmax(model(images), 1) for images in each]).mean(0).log()
        confusion = np.zeros((values.shape[1],) * 2, int)
        for label, row in zip(split.labels, values, strict=True):
            confusion[label, int(row.argmax())] += 1
        loss = -values[range(len(values)), torch.from_numpy(split.labels)].mean()
        seen, correct, samples, skipped = self.sums
        self.log.epochs.append(
            Epoch(
                seen / samples if samples else math.nan,
                int(correct),
                int(samples),
                int(skipped),
                float(loss),
                confusion.tolist(),
            )
        )
