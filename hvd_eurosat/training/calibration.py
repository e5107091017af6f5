"""A temperature by which log-probabilities are divided, so that probabilities mean what they say (Guo et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.augment import VIEWS
from hvd_eurosat.data.batches import Images, ordered_batches
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.inference import Network, Values, every_view, mean_of_views, tempered
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.optimiser import uncompiled
from hvd_eurosat.training.precision import Precision


@dataclass(frozen=True)
class Calibration:
    """temperatures: by the number of views of an image, 1 and 8; before, after: of validation in valid.views."""

    temperatures: dict[int, float]
    before: Evaluation
    after: Evaluation


def calibrate(
    world: World, config: Config, model: LandCoverResNet, precision: Precision, images: Images, stop: Callable[[], bool]
) -> Calibration:
    """Fitted to the validation images, for one view and for all eight: their mean is less sure of itself. Collective.

    Raises Stopped on every rank if `stop` came true on one.
    """
    labels = images.labels.cpu().numpy()
    size = config.valid.images_a_step(config.data.input_side, world.device.type)
    batches = ordered_batches(images, size, world.rank, world.size)
    values = every_view(world, Network(model, config.data, precision, VIEWS), batches, stop)

    def fit() -> Calibration:
        by_views = {n: mean_of_views(values[:, :n]) for n in (1, VIEWS)}
        temperatures = {n: fit_temperature(shown, labels) for n, shown in by_views.items()}
        before = by_views[config.valid.views]
        after = tempered(before, temperatures[config.valid.views])
        return Calibration(temperatures, Evaluation.of(before, labels), Evaluation.of(after, labels))

    return world.on_main(fit)


def fit_temperature(values: Values, labels: NDArray[np.int64]) -> float:
    """The one with which log-probabilities [N, C] of labels [N] have the greatest likelihood.

    A normal prior of its logarithm, about 0 and of standard deviation 1, keeps it finite where all answers are right;
    among hundreds of images it counts for nothing.
    """
    log_probabilities, target = torch.from_numpy(values).double(), torch.from_numpy(labels)
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = uncompiled(torch.optim.LBFGS)([logarithm], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        answers = (log_probabilities / logarithm.exp()).log_softmax(1)
        total = torch.nn.functional.nll_loss(answers, target, reduction="sum") + logarithm**2 / 2
        mean = total / len(target)
        mean.backward()
        return mean

    optimiser.step(loss)
    return math.exp(logarithm.item())
