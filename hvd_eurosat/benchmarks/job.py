"""A job that a subcommand of `benchmark` starts: the training loop, as `train` runs it, with a clock beside it.

Each rank writes what it measured to `--out`/<rank>.json.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from hvd_eurosat.benchmarks import reading
from hvd_eurosat.benchmarks.settings import JobSettings
from hvd_eurosat.cluster import environment, job
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.reading import read
from hvd_eurosat.config.schema import mixes
from hvd_eurosat.data.batches import Batch, Draw, Images, TrainBatches, open_images
from hvd_eurosat.data.packed import resolve_normalisation
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.model.resnet import Details, build
from hvd_eurosat.training import capture
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.gradients import GradientBuckets
from hvd_eurosat.training.inference import never
from hvd_eurosat.training.metrics import evaluate
from hvd_eurosat.training.precision import choose_algorithms, choose_precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import WIRE, Step, class_weights
from hvd_eurosat.training.stragglers import Stopwatch

S = TypeVar("S", bound=JobSettings)

LEARNING_RATE = 1e-5
MESSAGES = [2**power for power in range(12, 25, 2)]  # bytes
REPEATS = 12
SAMPLE_SECONDS = 0.2
MB = 1e6


class Clock(Stopwatch):
    """In what the device spends its time: "data", "step", "communication" (with waiting for others), "optimiser"."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._marks: list[tuple[str, Any]] = []

    def begin(self, span: str) -> None:
        """What follows is another thing."""
        self._marks.append((span, self.mark()))

    def work(self) -> None:
        """The gradients are summed."""
        super().work()
        self.begin("step")

    def wait(self) -> None:
        """The gradients are to be summed."""
        super().wait()
        self.begin("communication")

    def seconds(self) -> dict[str, list[float]]:
        """Of each thing, in each step (from one "data" to the next, or to an "end"). Waits for the device."""
        spans: dict[str, list[float]] = {"data": [], "step": [], "communication": [], "optimiser": []}
        self.begin("end")
        for (name, begin), (_, end) in itertools.pairwise(self._marks):
            if name == "data":
                for values in spans.values():
                    values.append(0.0)
            if name != "end":
                spans[name][-1] += self.between(begin, end)
        self._marks.clear()
        return spans


class Loop:
    """Training in one mode: iterate to make a step. What `train` shows, verifies and saves is not in it."""

    def __init__(self, world: World, settings: JobSettings, tree: Tree, images: Images, mode: str) -> None:
        trainable = settings.model.model_copy(update={"trainable": mode})
        full_size = settings.train.model_copy(update={"start_size": 0})
        config = settings.model_copy(update={"model": trainable, "train": full_size})
        details = Details.of(config.model)
        bands = tree.inputs.bands
        model = build(config.model.arch, len(tree.classes), mode, config.train.seed, details, bands).to(world.device)
        choose_algorithms(world.device, config.train.deterministic)
        precision = choose_precision(world, config.train.precision)
        self.state = TrainingState(world, config, tree, model, precision)
        self.world = world
        self.clock = Clock(world.device)
        self.features = Features(world, config, self.state, len(images), 0)
        self.step = Step(self.state, world, config, class_weights(config, images, len(tree.classes)), self.features)
        self.step.stopwatch = self.clock
        if not self.step.captured:  # else it is one graph with the rest
            self.state.optimiser.register_step_pre_hook(lambda *_: self.clock.begin("optimiser"))
            self.state.optimiser.register_step_post_hook(lambda *_: self.clock.begin("step"))
        train = config.train
        self.batches = TrainBatches(images, train.batch_size, world.rank, world.size, train.seed, mixes(train))
        self.feed(self.endless())

    def feed(self, batches: Iterator[Batch | Draw]) -> None:
        """What the next steps work on."""
        self._fed = batches

    def endless(self) -> Iterator[Batch | Draw]:
        """All epochs, from the beginning of this one on."""
        while True:
            yield from self.batches.epoch(self.state.epoch)
            self.state.end_epoch()

    def __next__(self) -> int:
        """Images of the step, on all ranks. Collective."""
        self.clock.begin("data")
        batch = next(self._fed)
        self.clock.begin("step")
        self.world.tick("measuring")
        self.step(batch, LEARNING_RATE, False)
        self.step.check()
        return batch.total

    def apart(self) -> None:
        """A step in which this rank waits for no other."""
        with self.step.gradients.no_sync():
            next(self)

    def in_turn(self, steps: int) -> dict[str, Any]:
        """As `measure`, of so many steps, each after one "apart"; all ranks begin each of both together. Collective."""
        images = []
        for _ in range(steps):
            self._barrier()
            self.apart()
            self._barrier()
            images.append(float(next(self)))
        seconds = self.clock.seconds()
        apart = {name: values[::2] for name, values in seconds.items()}
        together = {name: values[1::2] for name, values in seconds.items()}
        return together | {"images": images, "apart": apart, "ready": self.readiness()}

    def _barrier(self) -> None:
        self.clock.begin("end")
        self.world.sum(torch.zeros(1, device=self.world.device))

    def readiness(self) -> list[float]:
        """The share of a step's time, apart, after which the last gradient of each bucket is there."""
        groups, clock = self.step.gradients.groups, self.clock
        if self.step.captured:  # all buckets leave after it
            return [1.0] * len(groups)
        there: dict[int, Any] = {}
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, n=number: there.update({n: clock.mark()}))
            for number, group in enumerate(groups)
            for parameter in group
        ]
        self.apart()  # so that a GPU has work in its queue
        begin = clock.mark()
        self.apart()
        end = clock.mark()
        for hook in hooks:
            hook.remove()
        return [clock.between(begin, there[number]) / clock.between(begin, end) for number in range(len(groups))]


class Sampler:
    """The largest proportional set size of this process, sampled while it works."""

    def __init__(self, images: Images) -> None:
        self._file = images.images.nbytes
        images.images.amax()  # so that all of the packed images are in memory
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        over = False
        while not over:  # its last word also counts a job that is over before the first sample
            over = self._over.wait(SAMPLE_SECONDS)
            self._peak = max(self._peak, psutil.Process().memory_full_info().pss)

    def stop(self) -> dict[str, float]:
        """In MB: "peak_pss", "images" of it (this rank's share of the packed ones), "images_file", their file, and
        "peak_gpu", what torch has held on the GPU.
        """
        self._over.set()
        self._thread.join()
        images = sum(area.pss for area in psutil.Process().memory_maps() if area.path.endswith(".npy"))
        sizes = {"peak_pss": self._peak, "images": images, "images_file": self._file}
        return {name: size / MB for name, size in (sizes | {"peak_gpu": torch.cuda.max_memory_allocated()}).items()}


def load(argv: Sequence[str]) -> JobSettings:
    """The settings that a subcommand wrote on the command line."""
    return read(JobSettings, argv, "benchmarks.job")


def main(world: World, settings: JobSettings, number: int) -> None:
    """Measure each mode. number: this rank's, or that of the job among those beside it. Collective."""
    world.watch(settings.run.watchdog_seconds)
    settings, tree, images = opened(world, settings, ["train", *(["valid"] if settings.validation else [])])
    found: dict[str, Any] = {
        "device": world.device.type,
        "threads": world.threads,
        "controller": os.environ.get("HOROVOD_CONTROLLER", "mpi"),
        "modes": {},
    }
    sampler = Sampler(images["train"]) if settings.memory else None
    for mode in settings.modes:
        loop = Loop(world, settings, tree, images["train"], mode)
        if loop.step.obstacle:
            raise SharedError(f"train.compile: {loop.step.obstacle}")
        found["precision"] = loop.state.precision.name
        found["modes"][mode] = measure(loop, settings, number)
        if settings.reading:
            found |= {"reading": reading.measure(world, loop, images["train"], settings.steps)}
            found["images_file"] = images["train"].images.nbytes / MB
        if settings.validation:
            found["modes"][mode]["validation"] = time_validation(loop, settings, images)
        if settings.messages:
            bytes_each = WIRE[settings.optim.compression].itemsize
            found["modes"][mode]["buckets"] = [b.numel() * bytes_each for b in loop.step.gradients.buffers]
    if settings.messages:
        found["cycle"] = float(os.environ["HOROVOD_CYCLE_TIME"]) / 1000
        found["messages"] = {size: time_messages(world, size, WIRE[settings.optim.compression]) for size in MESSAGES}
    if sampler:
        found |= sampler.stop()
        world.gather(None)  # whoever leaves no longer shares its pages
    (settings.out / f"{number}.json").write_text(json.dumps(found))


def opened(world: World, settings: S, splits: Sequence[str]) -> tuple[S, Tree, dict[str, Images]]:
    """The settings with what the data decide, the data, and their images. Collective."""
    tree = world.together(lambda: open_tree(settings.data.root).choosing(settings.data.bands))
    data = world.together(lambda: resolve_normalisation(tree, settings.data))
    return settings.model_copy(update={"data": data}), tree, open_images(world, tree, splits, data, data)


def measure(loop: Loop, settings: JobSettings, number: int) -> dict[str, Any]:
    """Seconds of each step in each thing, and its images on all ranks; in turn, more. Collective."""
    mode = loop.state.model.trainable
    for _ in range(settings.warm_up + capture.WARM_UP * loop.step.captured):
        next(loop)
    meet(settings, f"{mode}.begin.{number}", lambda: time.sleep(0.001))
    loop.clock.seconds()
    if settings.apart:
        return loop.in_turn(settings.steps)
    images = [float(next(loop)) for _ in range(settings.steps)]
    seconds = loop.clock.seconds()
    meet(settings, f"{mode}.end.{number}", lambda: next(loop))
    return seconds | {"images": images}


def time_validation(loop: Loop, settings: JobSettings, images: dict[str, Images]) -> float:
    """Seconds of the validation that follows an epoch. Collective."""
    began = time.perf_counter()
    with loop.state.validated(images["train"], never):
        of, kept = loop.state, loop.features.valid
        evaluate(loop.world, settings, of.model, of.precision, images["valid"], never, kept=kept)
    return time.perf_counter() - began


def meet(settings: JobSettings, name: str, meanwhile: Callable[[], object]) -> None:
    """Until all jobs that run side by side have come here; a job alone goes on."""
    (settings.out / name).touch()
    while len(list(settings.out.glob(f"{Path(name).stem}.*"))) < settings.beside:
        meanwhile()


def time_messages(world: World, size: int, dtype: torch.dtype) -> list[float]:
    """Seconds of allreduces of so many bytes, as the step makes them, each at a random moment. Collective."""
    parameter = torch.nn.Parameter(torch.zeros(size // dtype.itemsize, device=world.device))
    buckets = GradientBuckets(world, [parameter], notes=1, dtype=dtype)
    moments = random.Random(size)
    seconds = []
    for _ in range(1 + REPEATS):
        buckets.zero()
        time.sleep(moments.uniform(0.0, 0.02))
        parameter.sum().backward()
        began = time.perf_counter()
        buckets.wait()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # for Horovod does not wait (cluster/backend.py)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]  # in the first the ranks agree on the tensor


def bind(rank: int, cores: int) -> None:
    """This process to its own cores, before it has threads; ranks beyond the last core begin at the first again."""
    there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {there[(rank * cores + i) % len(there)] for i in range(cores)})


if __name__ == "__main__":
    rank, _ = environment.launched()
    settings = load(sys.argv[1:])
    if settings.beside:
        environment.forget_launcher()
    if settings.cores and not torch.cuda.is_available():
        bind(rank, settings.cores)
    job.run(load, lambda world, settings: main(world, settings, rank))
