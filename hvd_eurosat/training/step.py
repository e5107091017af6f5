"""One optimiser step: from a batch to new weights."""

from __future__ import annotations

import shutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_eurosat.cluster import GradientBuckets, World
from hvd_eurosat.config import Config
from hvd_eurosat.data.augment import augment, normalise
from hvd_eurosat.data.batches import Batch, Images
from hvd_eurosat.errors import UserError
from hvd_eurosat.training.metrics import Sums
from hvd_eurosat.training.precision import Precision


def check_compiler(config: Config, device: torch.device) -> None:
    """Raise UserError where train.compile would not find the compiler that it needs at run time."""
    compiler = "g++" if device.type == "cpu" else "gcc"
    if config.train.compile and not shutil.which(compiler):
        raise UserError(f"train.compile needs {compiler} at run time, and there is none")


def class_weights(config: Config, images: Images, classes: int) -> Tensor | None:
    """train.class_weights, of mean 1 over the training images, float32 [classes]. Raises UserError."""
    if not config.train.class_weights:
        return None
    if len(config.train.class_weights) != classes:
        raise UserError(f"train.class_weights has {len(config.train.class_weights)} weights for {classes} classes")
    weights = torch.tensor(config.train.class_weights, device=images.device)
    return weights / weights[images.labels.to(images.device)].mean()


class Step:
    """Augment, forward, backward, sum the gradients over the ranks, update. Nothing waits for the device.

    The loss of a step is the mean over the samples that count on all ranks: each rank divides its sum by their
    number, and Horovod adds. `sums` gathers the metrics of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        world: World,
        config: Config,
        precision: Precision,
        class_weights: Tensor | None,
    ) -> None:
        self._optimiser = optimiser
        self._config = config
        self._precision = precision
        self._class_weights = class_weights
        self._device = world.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = GradientBuckets(world, self.parameters)
        self._forward = torch.compile(model) if config.train.compile else model
        self.sums = Sums(world.device)

    def __call__(self, batch: Batch, epoch: int, learning_rate: float) -> Tensor:
        """Train on a batch of an epoch (from 0). Returns this rank's part of the loss, a scalar on the device."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._gradients.zero()
        with self._precision.autocast(self._device):
            log_probabilities = self._forward(self._prepare(batch, epoch))
        # On log-probabilities cross entropy is the negative log-likelihood; it knows label smoothing.
        losses = F.cross_entropy(
            log_probabilities,
            batch.labels,
            weight=self._class_weights,
            reduction="none",
            label_smoothing=self._config.train.label_smoothing,
        )
        loss = losses @ batch.weights / batch.total
        loss.backward()
        self.sums.add(log_probabilities.detach(), batch)
        self._gradients.wait()
        self._optimiser.step()
        return loss.detach()

    def _prepare(self, batch: Batch, epoch: int) -> Tensor:
        data = self._config.data
        return normalise(augment(batch.images, batch.indices, self._config.train.seed, epoch, data), data)
