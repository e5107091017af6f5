"""What a rank of a job measures of the way of the data: alone, and beside its steps, from memory and from disk."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hvd_eurosat.cluster.world import World
from hvd_eurosat.data.ahead import Reader
from hvd_eurosat.data.batches import Batch, Draw, Images, TrainBatches

if TYPE_CHECKING:
    from hvd_eurosat.benchmarks.job import Loop

PIECE = 1 << 20  # bytes read at a time
MEMORY, DISK, NONE = "memory", "disk", "none"


def measure(world: World, loop: Loop, images: Images, steps: int) -> dict[str, Any]:
    """Of each place the data come from: "alone", seconds of each batch; "beside", seconds of each step in each thing.

    "cached": the share of the file that was in memory before; "images": of a step, on all ranks. "none" is the step
    with one batch over and over. What lies on a GPU comes from no disk. Collective.
    """
    found: dict[str, Any] = {"alone": {}, "beside": {}, "cached": {}, "images": 0.0}
    for place in (NONE, MEMORY, *([DISK] if images.reader else [])):
        if place != NONE:
            found["cached"][place] = _prepare(world, images, place)
            found["alone"][place] = list(_times(world, loop.batches, steps))
            _prepare(world, images, place)
        loop.feed(itertools.repeat(next(loop.batches.epoch(0))) if place == NONE else loop.endless())
        world.gather(None)
        loop.clock.seconds()
        found["images"] = float(sum(next(loop) for _ in range(steps)) / steps)
        found["beside"][place] = loop.clock.seconds()
    return found


def _times(world: World, batches: TrainBatches, steps: int) -> Iterator[float]:
    """Seconds of each of the first batches of an epoch, on the device."""
    epoch = torch.zeros((), dtype=torch.int64, device=world.device)
    coming: Iterator[Batch | Draw] = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    world.gather(None)
    for _ in range(steps):
        began = time.perf_counter()
        next(coming).complete(epoch)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - began


def _prepare(world: World, images: Images, place: str) -> float:
    """All of the images in memory, or none of them; returns the share that is. Collective."""
    if not images.reader:
        return 1.0
    if place == MEMORY:
        for start in range(0, os.fstat(images.reader.file).st_size, PIECE):
            os.pread(images.reader.file, PIECE, start)
    else:
        images.reader.mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        world.gather(None)  # a page that any rank has mapped stays
        os.posix_fadvise(images.reader.file, 0, 0, os.POSIX_FADV_DONTNEED)
    world.gather(None)
    return cached(images.reader)


def cached(reader: Reader) -> float:
    """The share of a file's pages that are in memory; 1 where the kernel does not tell."""
    with mmap.mmap(reader.file, 0, prot=mmap.PROT_READ) as whole:
        pages = np.frombuffer(whole, np.uint8)
        there = np.ones(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        library = ctypes.CDLL(None, use_errno=True)
        library.mincore(
            ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(len(pages)), there.ctypes.data_as(ctypes.c_char_p)
        )
        del pages
    return float((there & 1).mean())
