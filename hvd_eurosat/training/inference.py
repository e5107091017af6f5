"""Log-probabilities of images, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.precision import Precision

Values = NDArray[np.float32]


def log_probabilities(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision
) -> Values:
    """Of all samples that count, float32 [N, classes] on rank 0, [0, classes] on others. Collective.

    batches: this rank's share, every world.size-th one from its rank on. A UserError on one rank is raised on all.
    """
    return join(world, infer(world, model, batches, data, precision), model)


def infer(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision
) -> list[Values]:
    """The log-probabilities of each of this rank's batches. Collective."""
    return world.together(lambda: list(map(np.asarray, _infer(world, model, batches, data, precision))))


def join(world: World, mine: list[Values], model: LandCoverResNet) -> Values:
    """Those of all ranks' batches, in order, on rank 0. Collective."""
    every = world.gather(mine)
    count = sum(map(len, every)) if world.is_main else 0
    none = np.empty((0, model.fc.out_features), np.float32)
    return np.concatenate([none, *(every[n % world.size][n // world.size] for n in range(count))])


@torch.no_grad()
def _infer(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision
) -> list[torch.Tensor]:
    was_training = model.training
    model.eval()
    results = []
    for batch in batches:
        with precision.autocast(batch.images.device):
            results.append(model(normalise(batch.images, data))[: batch.total].cpu())
        world.tick()
    model.train(was_training)
    return results
