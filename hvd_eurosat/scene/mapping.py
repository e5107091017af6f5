"""From the blocks of a scene to the class of each window, on every rank, with the next block read meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.data.ahead import made_ahead
from hvd_eurosat.data.augment import resized
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.parts import NONE, Parts
from hvd_eurosat.scene.plan import Plan
from hvd_eurosat.scene.source import Scene
from hvd_eurosat.scene.windows import Block
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.inference import Network, answer, temper

AT_ONCE = 8  # batches at most that cores work on, some 100 MB each
LARGEST = 128 * 64**2  # pixels, as the network sees them, of such a batch


@dataclass(frozen=True)
class Mapper(Network):
    """A network in evaluation mode, and what is made of its answers (training/inference.py)."""

    saved: Checkpoint
    device: torch.device
    temperature: float


@dataclass(frozen=True)
class Read:
    """A block as it was read.

    pixels: uint8 or uint16 [bands, h, w]; classified: bool [rows, columns], the windows that have enough pixels;
    preview: uint8 [H, W, 4], red, green, blue and whether there is anything.
    """

    block: Block
    pixels: NDArray[Any]
    classified: NDArray[np.bool_]
    preview: NDArray[np.uint8]


def map_blocks(
    world: World,
    network: Mapper,
    scene: Scene,
    plan: Plan,
    parts: Parts,
    todo: list[int],
    stop: Callable[[], bool],
    progress: Callable[[], None],
) -> tuple[int, float]:
    """Do this rank's blocks; returns its windows, and the seconds it took for them.

    Where `stop` comes true, or a block cannot be read, all ranks leave between two batches. Raises UserError.
    """
    windows, began = 0, time.perf_counter()
    mine = parts.claimed(todo, world.rank, world.size)
    try:
        # It is the reading thread that ticks: who waits for it cannot tell a disk that hangs from one that is slow.
        reads = (partial(read_block, scene, plan, plan.blocks[index], world.tick) for index in mine)
        for read in made_ahead(reads, 1):
            values = classify(network, plan, read, lambda: stop() or parts.is_stopped(), progress)
            if values is None:
                parts.stop()
                break
            parts.write(read.block.index, values, read.preview)
            windows += len(values)
    except UserError:
        parts.stop()
        raise
    return windows, time.perf_counter() - began


def read_block(scene: Scene, plan: Plan, block: Block, tick: Callable[[], None] = lambda: None) -> Read:
    """A block, with its preview and where it has too few pixels. tick: called as reading goes on."""
    pixels, masked = scene.read(slice(block.top, block.bottom), tick=tick)
    tops = plan.windows.tops[block.first : block.end] - block.top
    counts = masked_counts(masked, tops, plan.windows.lefts, plan.windows.side)
    classified = counts <= plan.max_masked * plan.windows.side**2
    seen = np.moveaxis(scene.wants.picture(np.moveaxis(pixels, 0, -1)), -1, 0)
    return Read(block, pixels, classified, preview(seen, masked, block, plan.preview_step))


def masked_counts(
    masked: NDArray[np.bool_], tops: NDArray[np.int64], lefts: NDArray[np.int64], side: int
) -> NDArray[np.int64]:
    """Masked pixels in each window, int64 [rows, columns]. masked: bool [h, w]; windows begin at tops and lefts."""
    if not masked.any():
        return np.zeros((len(tops), len(lefts)), np.int64)
    columns = np.stack([masked[top : top + side].sum(0, dtype=np.int64) for top in tops])
    sums = np.pad(columns.cumsum(1), ((0, 0), (1, 0)))
    counted: NDArray[np.int64] = sums[:, lefts + side] - sums[:, lefts]
    return counted


def preview(pixels: NDArray[np.uint8], masked: NDArray[np.bool_], block: Block, step: int) -> NDArray[np.uint8]:
    """The block's rows of the scene's preview: means of step x step pixels, uint8 [H, W, 4].

    A preview row is of the block in which it begins; what of it lies beyond the block's end is left out.
    """
    first, end = math.ceil(block.top / step), math.ceil(block.next_top / step)
    rows = slice(first * step - block.top, min(end * step, block.bottom) - block.top)
    if first == end:
        return np.empty((0, math.ceil(pixels.shape[2] / step), 4), np.uint8)
    there = ~masked[rows] * np.uint8(255)
    means = [np.asarray(Image.fromarray(layer).reduce(step)) for layer in (*pixels[:3, rows], there)]
    means[3] = (means[3] >= 128) * np.uint8(255)
    return np.stack(means, 2)


def classify(
    network: Mapper,
    plan: Plan,
    read: Read,
    stop: Callable[[], bool],
    progress: Callable[[], None],
) -> NDArray[np.uint8] | None:
    """Class and percents of each window of a block, uint8 [N, 1 + classes], NONE where it has none; None if stopped.

    The block goes to the device once. Its batches depend on the block and the kind of device alone.
    """
    progress()
    if stop():
        return None
    block, windows = read.block, plan.windows
    pixels = send(read.pixels, network.device)
    rows, columns = np.nonzero(read.classified)
    tops, lefts = windows.tops[block.first : block.end][rows] - block.top, windows.lefts[columns]
    values = np.full((read.classified.size, 1 + network.model.fc.out_features), NONE, np.uint8)

    def work(batch: NDArray[np.int64]) -> Tensor:
        return judge(network, cut(pixels, tops[batch], lefts[batch], windows.side))

    answers: list[Tensor] = []
    batches = split(len(rows), plan.batch_size, network.data.input_side, network.device)
    for judged in at_once((partial(work, batch) for batch in batches), network.device):
        answers.append(judged)
        progress()
        if len(answers) < len(batches) and stop():
            return None
    if answers:
        values[read.classified.ravel()] = torch.cat(answers).cpu().numpy()
    return values


def split(count: int, batch_size: int, side: int, device: torch.device) -> list[NDArray[np.int64]]:
    """The batches of so many windows, as indices. side: of the images that the network sees.

    On cores their number is a multiple of AT_ONCE, so that all threads end together.
    """
    together = 1
    if device.type == "cpu":
        together, batch_size = AT_ONCE, max(1, min(batch_size, LARGEST // side**2))
    batches = math.ceil(count / (batch_size * together)) * together
    return np.array_split(np.arange(count), min(batches, count)) if count else []


def at_once(works: Iterator[Callable[[], Tensor]], device: torch.device) -> Iterator[Tensor]:
    """What each gives, in order. On cores many go on at a time: threads that share one would wait at every layer.

    The number of threads divides AT_ONCE, and cores that are left share the batches, so that all cores work.
    """
    cores = torch.get_num_threads() if device.type == "cpu" else 1  # asked first, it stays this thread's own
    threads = max((AT_ONCE, AT_ONCE // 2, AT_ONCE // 4, 1), key=lambda n: cores // n * n)
    if threads == 1:
        return (work() for work in works)
    return made_ahead(works, threads, threads, partial(torch.set_num_threads, cores // threads))


def send(pixels: NDArray[Any], device: torch.device) -> Tensor:
    """A block to the device; to a GPU from pinned memory, so that the host does not wait. uint16 goes as int16."""
    tensor = torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.view(np.int16))  # CUDA hardly knows uint16
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def cut(pixels: Tensor, tops: NDArray[np.int64], lefts: NDArray[np.int64], side: int) -> Tensor:
    """The windows [N, bands, side, side] of a block [bands, h, w], wherever they begin (int64 [N])."""
    views = [pixels[:, y : y + side, x : x + side] for y, x in zip(tops.tolist(), lefts.tolist(), strict=True)]
    return torch.stack(views)  # row by row; indexing by tensors goes number by number


@torch.no_grad()
def judge(network: Mapper, images: Tensor) -> Tensor:
    """The class and the percents of each image [N, bands, S, S], as uint8 [N, 1 + classes] on its device.

    Images are uint8, or uint16 as int16.
    """
    if images.dtype == torch.int16:
        images = images.view(torch.uint16).float()
    each = network.show(resized(images, network.data.image_size))
    log_probabilities = temper(answer(each.float()), network.temperature)
    percents = (100 * log_probabilities.exp()).round()
    return torch.cat([log_probabilities.argmax(1, keepdim=True).float(), percents], 1).to(torch.uint8)
