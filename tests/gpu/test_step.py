"""The step on a GPU: right by the CPU's, without waiting for the device, the same as graphs, and how fast.

The cheap and decisive tests come first; each has its own limit of time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data, Model, Optim, Train, mixes
from hvd_eurosat.data.augment import augment, network_input
from hvd_eurosat.data.batches import Images, TrainBatches
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import capture
from hvd_eurosat.training.precision import choose_algorithms, precision_of
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from tests.gpu.conftest import Note

CLASSES, SIDE = 10, 64
NAMES = tuple(map(str, range(CLASSES)))
TREE = Tree(Path("nowhere"), NAMES, "d", synthetic=True, image_size=SIDE, checksums=Checksums.of({}))
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
OPTIMISERS = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3, "lars": 1.0, "lamb": 1e-3}


class Loop:
    """Steps on one device; graphs: as CUDA graphs, or kernel by kernel."""

    def __init__(self, config: Config, device: torch.device, graphs: bool = True, count: int = 0) -> None:
        self.config = config
        size = config.train.batch_size
        pixels = np.random.default_rng(0).integers(0, 256, (count or 6 * size, SIDE, SIDE, 3), dtype=np.uint8)
        labels = np.arange(len(pixels), dtype=np.int64) % CLASSES
        images = Images(Packed(pixels, labels, ()), device)
        world = World(rank=0, size=1, local_rank=0, local_size=1, device=device, threads=1)
        choose_algorithms(device, config.train.deterministic)
        model = build(config.model.arch, CLASSES, config.model.trainable, 0).to(device)
        precision = precision_of(config.train.precision, config.train.precision)
        self.state = TrainingState(world, config, TREE, model, precision)
        with pytest.MonkeyPatch.context() as patch:
            if not graphs:
                patch.setattr(capture, "obstacle", lambda *_: "not wanted")
            self.step = Step(self.state, world, config, None)
        self._batches = TrainBatches(images, size, 0, 1, 0, mixes(config.train))
        self.steps = self._endless()

    def _endless(self) -> Iterator[None]:
        while True:
            for batch in self._batches.epoch(self.state.epoch, self.state.samples):
                self.step(batch, self.config.optim.lr, False)
                self.step.check()
                yield
            self.state.end_epoch()

    def losses(self, steps: int) -> list[float]:
        """Of so many steps."""
        found = []
        for _ in range(steps):
            next(self.steps)
            found.append(self.step.loss.clone())
        return torch.stack(found).tolist()


def configuration(optim: str = "adam", trainable: str = "bn+head", **train: object) -> Config:
    """Of a small run in fp32."""
    words = {"batch_size": 16, "precision": "fp32", "epochs": 8} | train
    return Config(
        data=Data(image_size=SIDE),
        model=Model(arch="resnet50", weights="none", trainable=trainable),
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


@pytest.mark.timeout(60)
def test_augmentation_is_the_cpus(note: Note) -> None:
    data = Data(image_size=SIDE, max_shift=4, random_erase=0.5, random_horizontal_flip=0.5)
    images = torch.randint(0, 256, (32, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    indices, epoch = torch.arange(32), torch.tensor(3)
    assert torch.equal(
        augment(images.to(GPU), indices.to(GPU), 1, epoch.to(GPU), data).cpu(), augment(images, indices, 1, epoch, data)
    )
    shown = network_input(images.to(GPU), indices.to(GPU), 1, epoch.to(GPU), SIDE, data).cpu()
    wanted = network_input(images, indices, 1, epoch, SIDE, data)
    note("network input, greatest difference from the CPU's", float((shown - wanted).abs().max()))
    torch.testing.assert_close(shown, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("trainable", ["head", "bn+head", "all"])
def test_a_step_is_the_cpus(trainable: str, note: Note) -> None:
    """Kernel by kernel, in fp32: loss, gradients and statistics."""
    config = configuration("sgd", trainable)
    ours, theirs = Loop(config, GPU, graphs=False), Loop(config, CPU)
    assert ours.losses(1) == pytest.approx(theirs.losses(1), rel=1e-4)
    found, wanted = (torch.cat([b.cpu() for b in loop.step.gradients.buffers]) for loop in (ours, theirs))
    note(f"{trainable}: gradients from the CPU's, in proportion", f"{apart(found, wanted):.2e}")
    assert apart(found, wanted) < 1e-3
    assert apart(weights(ours), weights(theirs)) < 1e-4


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_graphs_are_the_step(name: str, note: Note) -> None:
    """With every optimiser, and with algorithms that repeat their bits; the last batch of an epoch is padded."""
    config = configuration(name, "all", deterministic=True, ema=0.9, mixup=0.2, cutmix=1.0)
    loops = [Loop(config, GPU, graphs, count=91) for graphs in (True, False)]
    assert [loop.step.captured for loop in loops] == [True, False]
    losses = [loop.losses(30) for loop in loops]
    assert loops[0].step._learn._graphs.works, "a capture failed: its warning says why"  # type: ignore[attr-defined]
    found, wanted = map(weights, loops)
    note(f"{name}: graphs give the same bits", bool(torch.equal(found, wanted)))
    note(f"{name}: weights of graphs from the step's, in proportion", f"{apart(found, wanted):.2e}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert apart(found, wanted) < 1e-2


@pytest.mark.timeout(60)
def test_a_step_that_is_not_finite_changes_nothing() -> None:
    """As a graph; the steps around it count."""
    loop = Loop(configuration("lamb", "all"), GPU)
    loop.losses(6)
    first = next(p for p in loop.state.model.parameters() if p.requires_grad)
    kept = first.detach().clone()
    with torch.no_grad():
        first[(0,) * first.ndim] = torch.inf
    before = weights(loop)
    loop.losses(2)
    torch.cuda.synchronize()
    assert torch.equal(weights(loop), before)
    with torch.no_grad():
        first.copy_(kept)
    loop.losses(1)
    assert not torch.equal(weights(loop), before)
    assert loop.state.sums.skipped == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("graphs", [True, False])
def test_the_host_waits_for_no_number(graphs: bool) -> None:
    """But for those some steps old, which wait by an event."""
    loop = Loop(configuration("adam", "all", precision="bf16"), GPU, graphs, count=32 * 16)
    loop.losses(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(loop.steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(60)
def test_each_size_of_the_images_has_a_graph(capfd: pytest.CaptureFixture[str]) -> None:
    loop = Loop(configuration(epochs=2, start_size=32), GPU, count=16 * 6)
    loop.losses(12)
    assert len(loop.step._learn._captured) == 2  # type: ignore[attr-defined]
    assert "no CUDA graph" not in capfd.readouterr().err


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("trainable", ["bn+head", "all"])
@pytest.mark.parametrize("graphs", [False, True])
def test_images_per_second(trainable: str, size: int, graphs: bool, note: Note) -> None:
    """In bf16, of 20 steps; and the host's own share."""
    loop = Loop(configuration("adam", trainable, batch_size=size, precision="bf16"), GPU, graphs, count=4 * size)
    for _ in range(8):
        next(loop.steps)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        next(loop.steps)
    torch.cuda.synchronize()
    rate = 20 * size / (time.perf_counter() - began)
    how = "graphs" if graphs else "kernel by kernel"
    note(f"{trainable}, batches of {size}, {how}: images/s", rate)
    note(f"{trainable}, batches of {size}, {how}: GiB", torch.cuda.max_memory_allocated() / 2**30)
    assert rate > 0
