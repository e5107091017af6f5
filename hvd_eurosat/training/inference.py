"""Log-probabilities of images, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.augment import plain_input, view_of
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.errors import Stopped
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.precision import Precision

Values = NDArray[np.float32]
Stop = Callable[[], bool]


def never() -> bool:
    """Whether to stop."""
    return False


@dataclass(frozen=True)
class Network:
    """A network and how it is shown images. views: 1 or 8, as valid.views."""

    model: LandCoverResNet
    data: Data
    precision: Precision
    views: int

    def show(self, images: Tensor) -> Tensor:
        """Log-probabilities of images [B, C, S, S] in each view: [B, views, classes]."""
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """What the head sees of images [B, C, S, S], of each view: [B, fc.in_features]."""
        with self.precision.autocast(images.device):
            return [self.model.features(plain_input(view_of(images, n), self.data)) for n in range(self.views)]

    def classify(self, features: list[Tensor]) -> Tensor:
        """Log-probabilities, as `show` gives them."""
        with self.precision.autocast(features[0].device):
            return torch.stack([self.model.classify(one) for one in features], 1)


def log_probabilities(world: World, network: Network, batches: Iterable[Batch]) -> Values:
    """Of all samples that count, float32 [N, classes] on rank 0, [0, classes] on others. Collective.

    batches: this rank's share, every world.size-th one from its rank on. A UserError on one rank is raised on all.
    """
    return mean_of_views(every_view(world, network, batches))


def every_view(world: World, network: Network, batches: Iterable[Batch], stop: Stop = never) -> Values:
    """As log_probabilities, of each view: float32 [N, views, classes]. Collective.

    Raises Stopped on every rank if `stop` came true on one before its last batch.
    """
    return join(world, network, infer(world, network, batches, stop))


def infer(world: World, network: Network, batches: Iterable[Batch], stop: Stop = never) -> list[Values | None]:
    """The log-probabilities of each of this rank's batches, of each view; None last, if it was to stop. Collective."""
    return world.together(lambda: list(_infer(world, network, batches, stop)))


def join(world: World, network: Network, mine: list[Values | None]) -> Values:
    """Those of all ranks' batches, in order: float32 [N, views, classes], on rank 0. Collective."""
    every = world.gather(mine)
    if any(batch is None for rank in every for batch in rank):
        raise Stopped
    count = sum(map(len, every)) if world.is_main else 0
    none = np.empty((0, network.views, network.model.fc.out_features), np.float32)
    found = [every[n % world.size][n // world.size] for n in range(count)]
    return np.concatenate([none, *(values for values in found if values is not None)])


def mean_of_views(values: Values) -> Values:
    """Of the probabilities: float32 [N, classes] from [N, views, classes], both logarithms."""
    return answer(torch.from_numpy(values)).numpy()


def tempered(values: Values, temperature: float) -> Values:
    """Log-probabilities [N, classes] after a temperature."""
    return temper(torch.from_numpy(values), temperature).numpy()


def answer(each: Tensor) -> Tensor:
    """The logarithm of the mean probability over the views: [B, views, classes] to [B, classes]."""
    return torch.logsumexp(each, 1) - math.log(each.shape[1])


def temper(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, classes] after a temperature; of 1 as they are."""
    return log_probabilities if temperature == 1 else (log_probabilities / temperature).log_softmax(1)


@torch.no_grad()
def _infer(world: World, network: Network, batches: Iterable[Batch], stop: Stop) -> Iterator[Values | None]:
    """Of each batch; None, and no more, once it is to stop."""
    was_training = network.model.training
    network.model.eval()
    for batch in batches:
        if stop():
            yield None
            break
        yield network.show(batch.images)[: batch.total].cpu().numpy()
        world.tick()
    network.model.train(was_training)
