"""Log-probabilities of images, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.augment import plain_input, view_of
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.precision import Precision

Values = NDArray[np.float32]


def log_probabilities(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision, views: int
) -> Values:
    """Of all samples that count, float32 [N, classes] on rank 0, [0, classes] on others. Collective.

    batches: this rank's share, every world.size-th one from its rank on. A UserError on one rank is raised on all.
    views: 1 or 8, as valid.views.
    """
    mine = world.together(lambda: list(map(np.asarray, _infer(world, model, batches, data, precision, views))))
    every = world.gather(mine)
    count = sum(map(len, every)) if world.is_main else 0
    none = np.empty((0, model.fc.out_features), np.float32)
    return np.concatenate([none, *(every[n % world.size][n // world.size] for n in range(count))])


def answer(model: LandCoverResNet, images: Tensor, data: Data, views: int) -> Tensor:
    """Log-probabilities of uint8 images [B, 3, S, S], float32 [B, classes]: of the mean of their first `views`."""
    each = torch.stack([model(plain_input(view_of(images, view), data)) for view in range(views)])
    return torch.logsumexp(each, 0) - math.log(views)


@torch.no_grad()
def _infer(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision, views: int
) -> list[Tensor]:
    was_training = model.training
    model.eval()
    results = []
    for batch in batches:
        with precision.autocast(batch.images.device):
            results.append(answer(model, batch.images, data, views)[: batch.total].cpu())
        world.tick()
    model.train(was_training)
    return results
