"""What durability costs: steps with all of it and without, in turn, and the pause of a step checkpoint.

mpirun -np 2 --bind-to none python -m tests.faults.cost --data.root data/EuroSAT_RGB --model.weights none
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import Batch, Images, TrainBatches, open_images
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.metrics import Sums
from hvd_eurosat.training.precision import choose_precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step

PAIRS, STEPS = 60, 4


def bare(step: Step, batch: Batch) -> None:
    """The step without what durability adds to it."""
    state, gradients = step._state, step.gradients
    gradients.zero()
    epoch, size = torch.tensor(0), step._config.data.input_side
    with state.precision.autocast(step._device):
        log_probabilities = step._network(step._prepare(batch, epoch, size)[0])
    losses = F.cross_entropy(log_probabilities, batch.labels, reduction="none")
    (losses @ batch.weights / batch.total).backward()
    gradients.wait()
    state.optimiser.found_inf = None  # type: ignore[attr-defined]
    state.optimiser.step()
    state.sums.add(Sums.of(log_probabilities.detach(), batch.labels, batch.weights), torch.tensor(False))


def durable(world: World, step: Step, batch: Batch) -> None:
    """The step as train makes it."""
    world.tick("measuring")
    step(batch, 1e-5, stop=False)
    step.check()


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def begun(world: World, config: Config) -> tuple[Images, TrainingState, Step]:
    """The training images, and a training from random weights before its first step. Collective."""
    tree = open_tree(config.data.root)
    images = open_images(world, tree, ["train"], config.data, config.data)["train"]
    model = build(config.model.arch, len(tree.classes), config.model.trainable, 0)
    state = TrainingState(world, config, tree, model, choose_precision(world, config.train.precision))
    world.watch(600)
    return images, state, Step(state, world, config, class_weights=None)


def main(world: World, config: Config) -> None:
    """Prints, on rank 0, medians and the 95 % interval of the difference."""
    images, state, step = begun(world, config)
    batches = TrainBatches(images, config.train.batch_size, world.rank, world.size, 0)
    batch = next(batches.epoch(0))
    for _ in range(5):
        durable(world, step, batch)
    on, off = [], []
    for _ in range(PAIRS):
        on.append(seconds(lambda: [durable(world, step, batch) for _ in range(STEPS)]) / STEPS)
        off.append(seconds(lambda: [bare(step, batch) for _ in range(STEPS)]) / STEPS)
    shares = [100 * (a - b) / b for a, b in zip(on, off, strict=True)]
    error = 1.96 * statistics.stdev(shares) / PAIRS**0.5
    verify = [seconds(state.verify) for _ in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(CheckpointFolder(Path(folder), keep=2), stop_at_once=True, report=print)
        pauses = []
        for _ in range(10):
            saved = None
            began = time.perf_counter()
            state.step, state.samples = state.step + 1, 1
            saved = state.snapshot()
            if saved:
                saver.save(saved)
            pauses.append(time.perf_counter() - began)
            if saved:
                saver.wait()
        sizes = [path.stat().st_size for path in Path(folder).glob("*.pt")]
    if world.is_main:
        print(f"with {1e3 * statistics.median(on):.1f} ms, without {1e3 * statistics.median(off):.1f} ms a step")
        print(f"difference {statistics.mean(shares):+.2f} % +- {error:.2f} (95 %)")
        print(f"verify {1e3 * statistics.median(verify):.1f} ms")
        print(
            f"checkpoint: pause {1e3 * statistics.median(pauses):.1f} ms (worst {1e3 * max(pauses):.1f}), {sizes} bytes"
        )


if __name__ == "__main__":
    job.run(load, main)
