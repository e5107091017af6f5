"""Training steps of noise, on the GPU as the tests make them, or small on cores (tests/unit/test_gpu_bodies.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data, Model, Optim, Train, mixes
from hvd_eurosat.data.batches import Images, TrainBatches
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.model.resnet import BasicBlock, Bottleneck, LandCoverResNet, build
from hvd_eurosat.training import capture
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.precision import choose_algorithms, precision_of
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step, class_weights

CLASSES, SIDE = 10, 64
NAMES = tuple(map(str, range(CLASSES)))
TREE = Tree(Path("nowhere"), NAMES, "d", synthetic=True, image_size=SIDE, checksums=Checksums.of({}))
CPU = torch.device("cpu")
# With learning rates that float32, in which a graph reads them, holds as they are.
OPTIMISERS = {
    "sgd": 2**-7,
    "adam": 2**-10,
    "adamw": 2**-10,
    "lars": 1.0,
    "lamb": 2**-10,
    "adagrad": 2**-10,
    "rmsprop": 2**-13,
}


@dataclass(frozen=True)
class Scale:
    """How much the tests compute, and where. batch: images a step where no test has its own number."""

    device: torch.device
    arch: str
    batch: int
    steps: int


WHOLE = Scale(torch.device("cuda", 0), "resnet50", 16, 20)
SMALL = Scale(CPU, "resnet18", 2, 5)


class Loop:
    """Steps on one device; graphs: as CUDA graphs, or kernel by kernel; resident: the images lie on the device."""

    def __init__(
        self, config: Config, device: torch.device, graphs: bool = True, count: int = 0, resident: bool = True
    ) -> None:
        self.config = config
        size = config.train.batch_size
        pixels = np.random.default_rng(0).integers(0, 256, (count or 6 * size, SIDE, SIDE, 3), dtype=np.uint8)
        labels = np.arange(len(pixels), dtype=np.int64) % CLASSES
        world = World(rank=0, size=1, local_rank=0, local_size=1, device=device, threads=1)
        torch.use_deterministic_algorithms(False)  # of the loop before
        choose_algorithms(device, config.train.deterministic)
        model = tame(build(config.model.arch, CLASSES, config.model.trainable, 0)).to(device)
        self.state = TrainingState(
            world, config, TREE, model, precision_of(config.train.precision, config.train.precision)
        )
        with pytest.MonkeyPatch.context() as patch:
            if not graphs:
                patch.setattr(capture, "obstacle", lambda *_: "not wanted")
            if not resident:
                patch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
            images = Images(Packed(pixels, labels, ()), device)
            features = Features(world, config, self.state, len(images), 0)
            self.step = Step(self.state, world, config, class_weights(config, images, CLASSES), features)
        self._batches = TrainBatches(images, size, 0, 1, 0, mixes(config.train))
        self.steps = self._endless()

    def _endless(self) -> Iterator[None]:
        while True:
            self.step.begin_epoch()
            for batch in self._batches.epoch(self.state.epoch, self.state.samples):
                self.step(batch, self.config.optim.lr, False)
                self.step.check()
                yield
            self.step.end_epoch()
            self.state.end_epoch()

    def losses(self, steps: int) -> list[float]:
        """Of so many steps."""
        found = []
        for _ in range(steps):
            next(self.steps)
            found.append(self.step.loss.clone())
        return torch.stack(found).tolist()

    def seconds(self, steps: int) -> float:
        """Of so many steps, until the device has made them."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            next(self.steps)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    @property
    def graphs_work(self) -> bool:
        """Whether no capture has failed; its warning says why one has."""
        return self.step.captured and self.step._learn._graphs.works  # type: ignore[attr-defined]


def tame(model: LandCoverResNet) -> LandCoverResNet:
    """So that a change of the last bits stays small: with random weights it grows in each block, a hundredfold in all.

    Blocks add a fifth of what they compute; those that add nothing, as a run's in `all`, would have no gradients.
    """
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            torch.nn.init.constant_(module.last_norm.weight, 0.2)
    return model


def configuration(scale: Scale, optim: str = "adam", trainable: str = "bn+head", **train: object) -> Config:
    """Of a run in fp32. Where the head alone trains, an image always looks the same, so that its features are kept."""
    words = {"batch_size": scale.batch, "precision": "fp32", "epochs": 8} | train
    return Config(
        data=Data(image_size=SIDE, augment=trainable != "head"),
        model=Model(arch=scale.arch, weights="none", trainable=trainable),
        optim=Optim(name=optim, lr=OPTIMISERS[optim], weight_decay=1e-3, schedule="constant"),
        train=Train(**words),
    )


def weights(loop: Loop) -> Tensor:
    """All that moves, float64 [n], on the CPU."""
    moving = [p.detach() for p in loop.state.model.parameters() if p.requires_grad]
    return torch.cat([t.flatten() for t in [*moving, loop.state.statistics.flat]]).cpu().double()


def apart(one: Tensor, other: Tensor) -> float:
    """In proportion."""
    return float((one - other).norm() / other.norm())
