"""The package's own training loop on W ranks in threads of one process, in float64.

The ranks meet at a barrier, which stands in for Horovod (tests/parallel have the real one), and share by plain torch.
All else is the package's: train_epoch, Step, TrainingState, TrainBatches, evaluate.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hvd_eurosat import train
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Config, Model, mixes
from hvd_eurosat.data.batches import Batch, Draw, Images, TrainBatches
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import Stopped, UserError
from hvd_eurosat.model.resnet import BLOCKS, Details, LandCoverResNet
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.metrics import evaluate
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step, class_weights
from tests.reference.trainer import WIDTH, Epoch, Log, Split

PATIENCE = 300.0  # seconds that a rank waits for the others


class Meeting:
    """Where the ranks exchange what they have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value."""
        self._values[rank] = value
        self.barrier.wait()
        every = list(self._values)
        self.barrier.wait()
        return every


@dataclass(frozen=True)
class Ranks(World):
    """A rank in a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1), compare=False)
    sent: list[Tensor] = field(default_factory=list, compare=False)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def from_main(self, value: Any) -> Any:
        return self.gather(value)[0]

    def stack(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor.clone()))

    def sum(self, tensor: Tensor) -> Tensor:
        return reduce(torch.add, self.gather(tensor.clone()))

    def start_sum(self, tensor: Tensor, name: str, *_: Any) -> int:
        self.sent.append(tensor)
        return len(self.sent) - 1

    def finish_sum(self, handle: int) -> None:
        self.sent[handle].copy_(self.sum(self.sent[handle]))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        mine = list(tensors)
        for tensor, of_main in zip(mine, self.from_main([t.clone() for t in mine]), strict=True):
            tensor.copy_(of_main)

    def together(self, work: Callable[[], Any]) -> Any:
        result = error = None
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        for one in self.gather(error):
            if one:
                raise SharedError(one)
        return result


def worlds(size: int) -> list[World]:
    """One rank is the package's own World, which needs no Horovod."""
    kind, more = (Ranks, {"meeting": Meeting(size)}) if size > 1 else (World, {})
    return [kind(rank, size, rank, size, torch.device("cpu"), threads=1, **more) for rank in range(size)]


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on each rank. Raises what the first rank to fail has raised."""
    failures: list[BaseException] = []

    def rank(world: World) -> Any:
        torch.set_num_threads(1)  # of this thread: OpenMP counts for each
        try:
            return work(world)
        except BaseException as error:
            failures.append(error)
            if isinstance(world, Ranks):
                world.meeting.barrier.abort()

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, worlds(size)))
    if failures:
        raise failures[0]
    return results


class Double(LandCoverResNet):
    """The network in narrow and without its last two stages, for speed, and in float64: rounding hides nothing.

    It keeps what it is shown in each step of training; None where the step knows what the head sees.
    """

    def __init__(self, classes: int, settings: Model) -> None:
        block, depths, _ = BLOCKS[settings.arch]
        with torch.device("meta"), mock.patch.dict(BLOCKS, {settings.arch: (block, depths, WIDTH)}):
            super().__init__(settings.arch, classes, settings.trainable, Details.of(settings))
            self.layer3, self.layer4 = nn.Sequential(), nn.Sequential()
            self.fc.in_features = 2 * WIDTH
            self.fc.weight = nn.Parameter(self.fc.weight[:, : 2 * WIDTH], requires_grad=self.fc.weight.requires_grad)
        self.to_empty(device="cpu")
        self.to(memory_format=torch.channels_last)
        self.shown: list[Tensor | None] = []
        self._images: Tensor | None = None

    def features(self, images: Tensor) -> Tensor:
        self._images = images.double()
        return super().features(self._images)

    def classify(self, features: Tensor) -> Tensor:
        if self.training:
            self.shown.append(self._images)
        self._images = None
        return torch.log_softmax(self.fc(features), dim=1)


@cache
def network(classes: int, settings: Model) -> Double:
    """To be copied."""
    return Double(classes, settings)


class Batches(TrainBatches):
    """Batches of float64; at the steps of `faults` the loss of one rank is nan."""

    faults: dict[int, int]
    step: int

    def epoch(self, epoch: int, samples: int = 0) -> Iterator[Batch | Draw]:
        for batch in super().epoch(epoch, samples):
            faulty = self.step in self.faults and self.faults[self.step] % self._world_size == self._rank
            weights = batch.weights.double()
            yield dataclasses.replace(batch, weights=weights.masked_fill(weights > 0, torch.nan) if faulty else weights)
            self.step += 1


class Recorder:
    """In place of the journal: what train_epoch tells it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def begin_epoch(self, *_: Any) -> None: ...

    def trained(self, *_: Any) -> None: ...

    def wants_state(self) -> bool:
        return False

    def stepped(self, number: int, step: Step, state: TrainingState, samples: int) -> None:
        self.log.losses.append(float(step.loss))
        self.log.rates.append(state.optimiser.param_groups[0]["lr"])


@dataclass
class Trained:
    """log and saved: rank 0's; shown: what the network saw on each rank, by step; diverged: or did it stop well."""

    log: Log
    saved: Checkpoint
    shown: list[list[Tensor | None]]
    diverged: bool


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """As the type of new tensors, in all threads."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For computations as small as these: on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    config: Config,
    splits: dict[str, Split],
    classes: int,
    weights: dict[str, Tensor],
    start: Checkpoint | None,
    size: int,
    stop: int | None,
    faults: dict[int, int],
) -> Trained:
    """Train from `weights`, or from a checkpoint, on `size` ranks to the end or up to step `stop`."""

    def rank(world: World) -> Trained:
        return _train(world, config, splits, classes, weights, start, stop, faults)

    with float64(), one_thread():
        network(classes, config.model)
        every = on_ranks(size, rank)
    shown = [one.shown[0] for one in every]
    return dataclasses.replace(every[0], shown=shown)


def _train(
    world: World,
    config: Config,
    splits: dict[str, Split],
    classes: int,
    weights: dict[str, Tensor],
    start: Checkpoint | None,
    stop: int | None,
    faults: dict[int, int],
) -> Trained:
    names = tuple(f"class{n}" for n in range(classes))
    tree = Tree(Path("nowhere"), names, "d", synthetic=True, image_size=None, checksums=Checksums.of({}))
    images = {name: Images(Packed(s.images, s.labels, ()), world.device) for name, s in splits.items()}
    model = copy.deepcopy(network(classes, config.model))
    model.load_state_dict(weights)
    state = TrainingState(world, config, tree, model, Precision("fp32"))
    train.begin(world, config, state, start)
    features = Features(world, config, state, *map(len, images.values()))
    step = Step(state, world, config, class_weights(config, images["train"], classes), features)
    size = config.train.batch_size
    batches = Batches(images["train"], size, world.rank, world.size, config.train.seed, mixes(config.train))
    batches.faults, batches.step = faults, state.step
    log, diverged = Log(), False
    try:
        while state.epoch < config.train.epochs:
            asked = (lambda: state.step + 1 == stop) if world.is_main else (lambda: False)
            train.train_epoch(world, config, state, step, batches, Recorder(log), asked)
            with state.validated(images["train"], lambda: False):
                seen = features.valid
                found = evaluate(world, config, model, state.precision, images["valid"], lambda: False, kept=seen)
            sums = state.sums.over_all(world)
            correct = int(sums.total[1])
            log.epochs.append(
                Epoch(sums.loss, correct, sums.samples, sums.skipped, found.loss, found.confusion.tolist())
            )
            state.end_epoch()
    except Stopped:
        pass
    except SharedError as error:
        diverged = "not finite" in str(error)
        if not diverged:
            raise
    return Trained(log, state.snapshot() or start, [model.shown], diverged)
