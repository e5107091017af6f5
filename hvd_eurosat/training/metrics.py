"""Sums over samples, kept on the device and divided only when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from hvd_eurosat.cluster import World
from hvd_eurosat.config import Data
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.precision import Precision

IGNORED = -1


class Sums:
    """Loss, correct and samples of training, summed over the samples that count: `total`, float64 [3]."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, dtype=torch.float64, device=device)

    def take(self, world: World) -> Sums:
        """The sums over all ranks; this rank's begin again at zero. Collective."""
        over_all = Sums(world.device)
        over_all.total = world.sum(self.total).cpu()
        self.total = torch.zeros_like(self.total)
        return over_all

    def add(self, log_probabilities: Tensor, batch: Batch) -> None:
        """A batch; without waiting for the device."""
        losses = F.nll_loss(log_probabilities, batch.labels, reduction="none")
        correct = log_probabilities.argmax(1) == batch.labels
        self.total += torch.stack([losses, correct, torch.ones_like(losses)]).double() @ batch.weights.double()

    @property
    def samples(self) -> int:
        """Samples that counted."""
        return int(self.total[2])

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood."""
        return float(self.total[0] / self.total[2])

    @property
    def accuracy(self) -> float:
        """A fraction 0..1."""
        return float(self.total[1] / self.total[2])


@dataclass(frozen=True)
class Evaluation:
    """A model on a split. loss: mean negative log-likelihood; confusion: int64 [C, C], rows are the true classes."""

    loss: float
    confusion: Tensor

    @staticmethod
    def of(values: NDArray[np.float32], labels: NDArray[np.int64]) -> Evaluation:
        """From log-probabilities [N, C] and the true classes [N]."""
        log_probabilities, target = torch.from_numpy(values).double(), torch.from_numpy(labels)
        loss = F.nll_loss(log_probabilities, target)
        return Evaluation(float(loss), multiclass_confusion_matrix(log_probabilities, target, values.shape[1]))

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

    def event(self) -> dict[str, Any]:
        """What metrics.jsonl holds of it."""
        return {"loss": self.loss, "accuracy": self.accuracy, "confusion": self.confusion.tolist()}

    def line(self, split: str) -> str:
        """The line that ends the output of train and evaluate."""
        return f"{split} accuracy: {100 * self.accuracy:.2f}% ({self.correct}/{self.count})"


@torch.no_grad()
def evaluate(
    model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision, world: World
) -> Evaluation:
    """The model in evaluation mode over batches, summed over all ranks. Collective."""
    classes = model.fc.out_features
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    was_training = model.training
    model.eval()
    for batch in batches:
        with precision.autocast(world.device):
            log_probabilities = model(normalise(batch.images, data))
        losses = F.nll_loss(log_probabilities, batch.labels, reduction="none")
        loss += losses.double() @ batch.weights.double()
        labels = torch.where(batch.weights > 0, batch.labels, IGNORED)
        confusion += multiclass_confusion_matrix(
            log_probabilities, labels, classes, ignore_index=IGNORED, validate_args=False
        )
    model.train(was_training)
    world.wait()
    loss, confusion = world.sum(loss), world.sum(confusion).cpu()
    return Evaluation(float(loss / confusion.sum()), confusion)
