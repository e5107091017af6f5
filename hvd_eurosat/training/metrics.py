"""Sums over samples, kept on the device and divided only when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import Batch, Images, ordered_batches
from hvd_eurosat.errors import Stopped
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.inference import Network, answer, temper
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.scores import BINS, calibration_error, reliability


class Sums:
    """Of training: loss, correct and samples over the samples that count, and skipped steps: `total`, float64 [4].

    All ranks skip the same steps, and each counts its share of one.
    """

    def __init__(self, world: World) -> None:
        self.total = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._share = 1 / world.size

    def over_all(self, world: World) -> Sums:
        """The sums over all ranks, on the CPU. Collective."""
        over_all = Sums(world)
        over_all.total = world.sum(self.total).cpu()
        return over_all

    @staticmethod
    def of(log_probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """A batch's loss, correct and samples, float64 [3]; labels, weights: as Batch has them."""
        losses = F.nll_loss(log_probabilities, labels, reduction="none")
        correct = log_probabilities.argmax(1) == labels
        return torch.stack([losses, correct, torch.ones_like(losses)]).double() @ weights.double()

    def add(self, sums: Tensor, skipped: Tensor) -> None:
        """Those of a batch, unless its step was skipped (bool []); without waiting for the device."""
        self.total[:3] += sums.masked_fill(skipped, 0)
        self.total[3] += skipped * self._share

    @property
    def skipped(self) -> int:
        """Steps that were skipped because loss or gradients were not finite."""
        return round(float(self.total[3]))

    @property
    def samples(self) -> int:
        """Samples that counted."""
        return int(self.total[2])

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood; nan before the first sample, as accuracy is."""
        return float(self.total[0] / self.total[2])

    @property
    def accuracy(self) -> float:
        """A fraction 0..1."""
        return float(self.total[1] / self.total[2])


@dataclass(frozen=True)
class Evaluation:
    """A model on a split. loss: mean negative log-likelihood; confusion: int64 [C, C], rows are the true classes;

    bins: of scores.reliability, float64 [3, BINS].
    """

    loss: float
    confusion: Tensor
    bins: Tensor

    @staticmethod
    def of(values: NDArray[np.float32], labels: NDArray[np.int64]) -> Evaluation:
        """From log-probabilities [N, C] and the true classes [N]."""
        log_probabilities, target = torch.from_numpy(values).double(), torch.from_numpy(labels)
        loss = F.nll_loss(log_probabilities, target)
        confusion = torch.zeros(values.shape[1], values.shape[1], dtype=torch.int64)
        count(confusion, log_probabilities, target, torch.ones_like(target))
        return Evaluation(float(loss), confusion, reliability(log_probabilities, target, torch.ones_like(target)))

    @property
    def count(self) -> int:
        """Images evaluated."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Images whose most probable class is the true one."""
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """A fraction 0..1."""
        return self.correct / self.count

    @property
    def calibration_error(self) -> float:
        """Expected, a fraction 0..1."""
        return calibration_error(self.bins)

    def event(self) -> dict[str, Any]:
        """What metrics.jsonl holds of it."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
            "confusion": self.confusion.tolist(),
            "reliability": self.bins.tolist(),
        }

    def line(self, split: str) -> str:
        """The line that ends the output of train and evaluate."""
        return f"{split} accuracy: {100 * self.accuracy:.2f}% ({self.correct}/{self.count})"


def count(confusion: Tensor, log_probabilities: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Add a batch to a confusion matrix, int64 [C, C], in place and without waiting for the device.

    log_probabilities: [B, C]; labels: int64 [B]; weights: [B], 1 for a sample that counts, 0 for padding.
    """
    cells = labels * len(confusion) + log_probabilities.argmax(1)
    confusion.view(-1).index_add_(0, cells, weights.long())


def evaluate(
    world: World,
    config: Config,
    model: LandCoverResNet,
    precision: Precision,
    images: Images,
    stop: Callable[[], bool],
    temperature: float = 1.0,
    kept: dict[int, list[Tensor]] | None = None,
) -> Evaluation:
    """The model in evaluation mode on rank 0 or on all ranks, by valid.sharded; the sums on every rank. Collective.

    kept: what the head saw of these images before, by batch and view; what it lacks is added.
    Raises Stopped on every rank if `stop` came true on one before its last batch.
    """
    shards = config.valid.ranks(world.size, world.device.type)
    size = config.valid.images_a_step(config.data.input_side, world.device.type)
    batches = ordered_batches(images, size, world.rank, shards) if world.rank < shards else ()
    was_training = model.training
    model.eval()
    network = Network(model, config.data, precision, config.valid.views)
    work = partial(_evaluate, world, network, batches, stop, temperature, kept)
    loss, confusion, bins, stopped = map(world.sum, world.together(work))
    model.train(was_training)
    if stopped:
        raise Stopped
    return Evaluation(float(loss / confusion.sum()), confusion.cpu(), bins.cpu())


@torch.no_grad()
def _evaluate(
    world: World,
    network: Network,
    batches: Iterable[Batch],
    stop: Callable[[], bool],
    temperature: float,
    kept: dict[int, list[Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's sum of the losses (float64 []), confusion matrix (int64 [C, C]), sums of the bins (float64 [3, BINS])

    and whether it stopped (0 or 1).
    """
    classes = network.model.fc.out_features
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=world.device)
    for number, batch in enumerate(batches):
        if stop():
            return loss, confusion, bins, torch.ones(())
        features = (kept or {}).get(number) or network.features(batch.images)
        if kept is not None:
            kept[number] = features
        log_probabilities = temper(answer(network.classify(features)), temperature)
        losses = F.nll_loss(log_probabilities, batch.labels, reduction="none")
        loss += losses.double() @ batch.weights.double()
        count(confusion, log_probabilities, batch.labels, batch.weights)
        bins += reliability(log_probabilities, batch.labels, batch.weights)
        world.tick()
    return loss, confusion, bins, torch.zeros(())
