"""What each technique for accuracy adds to a step: in one process on a CPU, of RGB images, with any keys of train.

    .venv/bin/python -m tests.system.parts_cost --data.root data/EuroSAT_RGB --model.weights none --train.batch_size 32

Steps scatter more than a part takes. So each part is timed alone, in turn with the plain input, and given as a share
of the median step. Of mixing that is the making of the input; the partners' images are read meanwhile.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.augment import network_input
from hvd_eurosat.data.batches import Batch, Images, TrainBatches
from hvd_eurosat.data.mixing import mixed_input, quantiles
from hvd_eurosat.training.average import EVERY
from hvd_eurosat.training.inference import never
from hvd_eurosat.training.state import TrainingState
from tests.faults.cost import begun, seconds

ROUNDS = 40
PLAIN = "plain"
CHANGES: Mapping[str, Mapping[str, float]] = {
    PLAIN: {},
    "brightness, contrast 0.2 and gain 0.1": {"random_brightness": 0.2, "random_contrast": 0.2, "random_gain": 0.1},
    "erasing half of the images": {"random_erase": 0.5},
}
ALPHAS = {"mixup 0.2": (0.2, 0.0), "CutMix 1": (0.0, 1.0)}


def inputs(batch: Batch, config: Config) -> dict[str, Callable[[], object]]:
    """Ways to make the network's input of a batch, by what is done to it."""
    epoch, size, others = torch.tensor(0), config.data.input_side, batch.partners
    assert others
    ways: dict[str, Callable[[], object]] = {}
    for name, changes in CHANGES.items():
        data = config.data.model_copy(update=changes)
        ways[name] = partial(network_input, batch.images, batch.indices, 0, epoch, size, data)
    pairs = partial(mixed_input, batch.images, batch.indices, others.images, others.indices, 0, epoch, size)
    for name, alphas in ALPHAS.items():
        ways[name] = partial(pairs, config.data, *(quantiles(alpha, batch.images.device) for alpha in alphas))
    return ways


def main(world: World, config: Config) -> None:
    """Prints the median step and what each part adds: the median, and the middle half of the rounds."""
    changes = {"ema": 0.99, "mixup": 0.0, "cutmix": 0.0, "start_size": 0}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    images, state, step = begun(world, config)
    assert state.average
    batches = TrainBatches(images, config.train.batch_size, world.rank, world.size, 0, mixes=True)
    steps: list[float] = []
    added: dict[str, list[float]] = {}
    order = random.Random(0)
    for _, batch in zip(range(ROUNDS), batches.epoch(0), strict=False):
        world.tick("measuring")
        steps.append(seconds(partial(step, replace(batch, partners=None), 1e-5, stop=False)))
        ways = inputs(batch, config)
        ways[PLAIN]()  # after the step no cache holds the images
        times = {name: seconds(ways[name]) for name in order.sample(list(ways), len(ways))}
        for name in ways.keys() - {PLAIN}:
            added.setdefault(name, []).append(times[name] - times[PLAIN])
        added.setdefault("train.ema", []).append(seconds(partial(state.average.update, torch.tensor(False))) / EVERY)
    whole = statistics.median(steps)
    print(f"a step of {config.train.batch_size} images, {state.precision.name}: {1e3 * whole:.0f} ms")
    for name, values in sorted(added.items()):
        low, middle, high = (100 * value / whole for value in statistics.quantiles(values, n=4))
        print(f"{name:40}{middle:6.2f} % ({low:.2f} to {high:.2f})")
    estimates = [seconds(partial(estimate, state, images)) / whole for _ in range(3)]
    print(f"statistics for train.ema, once an epoch: as long as {statistics.median(estimates):.1f} steps")


def estimate(state: TrainingState, images: Images) -> None:
    """What an epoch's end does beside validation."""
    with state.validated(images, never):
        pass


if __name__ == "__main__":
    job.run(load, main)
