"""The step on a GPU: right by the CPU's, without waiting for the device, and the same as graphs.

The cheap and decisive tests come first; each has its own limit of time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.augment import augment, network_input
from hvd_eurosat.data.inputs import IMAGENET_STD
from hvd_eurosat.errors import RunError
from hvd_eurosat.training.memory import room_for
from tests.gpu.conftest import Note
from tests.gpu.loop import CPU, OPTIMISERS, SIDE, Loop, Scale, apart, configuration, weights

# What an image is made of by whole numbers is the same bit for bit, what by others may be a level off.
EXACT = {"max_shift": 4, "random_erase": 0.5, "random_horizontal_flip": 0.5, "random_vertical_flip": 0.5}
ROUNDED = {"random_rotate": 30, "random_zoom": 0.2, "random_brightness": 0.2, "random_contrast": 0.2}
LEVEL = 1.01 / 255 / min(IMAGENET_STD)
# By how much loss and gradients may differ from the CPU's in fp32, in proportion. On CPUs images that are off by 1e-6
# do so by 2e-7 and 4e-3 (a ReLU is on its other side here and there), and bf16 by 1e-3 and 0.3.
PRECISIONS = {"fp32": (1e-5, 0.03), "tf32": (5e-3, 0.3), "bf16": (1e-2, 0.7)}
HOW = {"graphs": {}, "kernel by kernel": {"graphs": False}, "images from the host": {"resident": False}}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("keys", [EXACT, ROUNDED], ids=["exact", "rounded"])
def test_augmentation_is_the_cpus(keys: dict[str, Any], scale: Scale, note: Note) -> None:
    data = Data(image_size=SIDE, **keys)
    images = torch.randint(0, 256, (32, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    indices, epoch = torch.arange(32), torch.tensor(3)
    there, places, now = (one.to(scale.device) for one in (images, indices, epoch))
    shown, wanted = augment(there, places, 1, now, data).cpu(), augment(images, indices, 1, epoch, data)
    off = (shown.int() - wanted.int()).abs()
    if keys is EXACT:
        assert not off.any()
    note(
        f"augmented images, {'exact' if keys is EXACT else 'rounded'}: pixels that differ, %",
        100 * float((off > 0).float().mean()),
    )
    assert float((off > 1).float().mean()) < 1e-3  # where a rounded place is on another side of an edge
    for size in (32, 48, SIDE):
        shown = network_input(there, places, 1, now, size, data).cpu()
        far = (shown - network_input(images, indices, 1, epoch, size, data)).abs()
        note(f"network input of {size} pixels, greatest difference", float(far.max()))
        assert float((far > (1e-5 if keys is EXACT and size == SIDE else LEVEL)).float().mean()) < 1e-3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("trainable", ["head", "bn+head", "all"])
def test_a_step_is_the_cpus(trainable: str, scale: Scale, note: Note) -> None:
    """Kernel by kernel: loss, gradients and statistics; and how far a step is off in numbers with fewer bits."""
    theirs = Loop(configuration(scale, "sgd", trainable), CPU, graphs=False)
    loss = theirs.losses(1)
    wanted = torch.cat(theirs.step.gradients.buffers)
    for precision, (of_loss, of_gradients) in PRECISIONS.items():
        ours = Loop(configuration(scale, "sgd", trainable, precision=precision), scale.device, graphs=False)
        assert ours.losses(1) == pytest.approx(loss, rel=of_loss), precision
        far = apart(torch.cat([b.cpu() for b in ours.step.gradients.buffers]), wanted)
        note(f"{trainable}, {precision}: gradients from the CPU's in fp32, in proportion", f"{far:.1e}")
        assert far < of_gradients, precision
        assert apart(weights(ours), weights(theirs)) < 10 * of_loss, precision


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", HOW)
def test_the_host_waits_for_no_number(how: str, scale: Scale) -> None:
    """But for those some steps old, which wait by an event."""
    config = configuration(scale, "adam", "all", precision="bf16")
    loop = Loop(config, scale.device, count=20 * scale.batch, **HOW[how])
    loop.losses(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(loop.steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(60)
def test_images_from_the_host_are_the_same(scale: Scale) -> None:
    """Where they do not fit on the GPU."""
    config = configuration(scale, deterministic=True)
    loops = [Loop(config, scale.device, resident=resident) for resident in (True, False)]
    assert loops[0].losses(scale.steps) == pytest.approx(loops[1].losses(scale.steps), rel=1e-5)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_graphs_are_the_step(name: str, scale: Scale, note: Note) -> None:
    """With every optimiser, and with algorithms that repeat their bits; the last batch of an epoch is padded."""
    words = {"ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "class_weights": tuple(range(1, 11))}
    config = configuration(scale, name, "all", deterministic=True, **words)
    loops = [Loop(config, scale.device, graphs, count=6 * scale.batch - 1) for graphs in (True, False)]
    losses = [loop.losses(scale.steps) for loop in loops]
    if loops[0].step.captured:
        assert loops[0].graphs_work, "a capture failed: its warning says why"
    found, wanted = map(weights, loops)
    note(f"{name}: graphs give the same bits", bool(torch.equal(found, wanted)))
    note(f"{name}: ms a step of {scale.batch} images", 1000 * loops[0].seconds(5) / 5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert apart(found, wanted) < 1e-2


@pytest.mark.timeout(60)
def test_a_step_that_is_not_finite_changes_nothing(scale: Scale) -> None:
    """As a graph; the steps around it count."""
    loop = Loop(configuration(scale, "lamb", "all"), scale.device)
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
def test_each_size_of_the_images_has_a_graph(scale: Scale, capfd: pytest.CaptureFixture[str]) -> None:
    loop = Loop(configuration(scale, epochs=2, start_size=32), scale.device)
    loop.losses(12)
    assert len(loop.step._learn._captured) == 2  # type: ignore[attr-defined]
    assert "no CUDA graph" not in capfd.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("trainable", "deterministic"), [("bn+head", True), ("all", True), ("all", False)])
def test_the_same_bits_again(trainable: str, deterministic: bool, scale: Scale, note: Note) -> None:
    """With algorithms that are meant to repeat them; with those that are fastest nothing is promised."""
    scale = dataclasses.replace(scale, batch=4 * scale.batch)
    config = configuration(scale, "adam", trainable, precision="bf16", deterministic=deterministic)
    found, seconds = [], []
    for _ in range(2):
        loop = Loop(config, scale.device)
        loop.losses(scale.steps)
        found.append(weights(loop))
        seconds.append(loop.seconds(scale.steps) / scale.steps)
    what = f"{trainable}, {'repeatable' if deterministic else 'fastest'} algorithms"
    note(f"{what}: the same bits again", bool(torch.equal(*found)))
    note(f"{what}: ms a step of {scale.batch} images", 1000 * min(seconds))
    assert torch.equal(*found) or not deterministic


@pytest.mark.timeout(60)
def test_a_batch_that_is_too_large_says_which_fits(scale: Scale) -> None:
    """On a GPU that has 2 GiB left."""
    size = 64 * scale.batch
    loop = Loop(configuration(scale, "sgd", "all", batch_size=size), scale.device, count=size)
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(RunError, match=rf"{size} is too large, \d+ fits"), room_for(loop.step, size):
            next(loop.steps)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
