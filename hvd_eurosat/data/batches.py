"""Batches from the packed arrays: a rank's shard of the training set, or a split in file order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data, Place
from hvd_eurosat.data.ahead import Reader, ahead, made_ahead
from hvd_eurosat.data.augment import mix
from hvd_eurosat.data.images import BadFilesError, Crop
from hvd_eurosat.data.mixing import partners
from hvd_eurosat.data.packed import Packed, open_packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import UserError

IN_HAND = 2  # batches that are ready, or being made, when one is taken


@dataclass(frozen=True)
class Partners:
    """What the samples of a batch are mixed with: indices, images and labels, as Batch has them."""

    indices: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """What one rank works on in one step; always of the full batch size B.

    indices: int64 [B], positions in the split; images: uint8 [B, C, S, S], channels last, or float32 with the numbers
    of uint16 files; labels: int64 [B]; weights: float32 [B], 1 for a sample that counts, 0 for padding; total: samples
    that count on all ranks; partners: with train.mixup or train.cutmix.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor
    weights: Tensor
    total: int
    partners: Partners | None = None

    def complete(self, epoch: Tensor) -> Batch:
        """As a Draw's."""
        return self


@dataclass(frozen=True)
class Draw:
    """A batch whose images are still to be taken, from a split that lies on the device: a graph does that by itself.

    indices, weights, total: as a Batch has them.
    """

    indices: Tensor
    weights: Tensor
    total: int
    source: TrainBatches

    def complete(self, epoch: Tensor) -> Batch:
        """With its images and labels, and with its partners in an epoch, int64 []."""
        return self.source.take(self.indices, self.weights, self.total, epoch)


class Images:
    """A packed split for a device: a resident copy on a GPU that has room for it, else the memory-mapped file.

    reader: of that file, from disk; None of a copy.
    """

    def __init__(self, packed: Packed, device: torch.device) -> None:
        self.device = device
        resident = device.type == "cuda" and packed.images.nbytes < torch.cuda.mem_get_info(device)[0] // 2
        self.storage = device if resident else torch.device("cpu")
        self.checksum = packed.checksum
        mapped = packed.images if isinstance(packed.images, np.memmap) and len(packed.images) else None
        self.reader = Reader(mapped) if mapped is not None and not resident else None
        self.images = torch.from_numpy(packed.images).to(self.storage)
        self._is_wide = self.images.dtype == torch.uint16
        self.labels = torch.from_numpy(packed.labels).to(self.storage)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def on_device(self) -> bool:
        """Whether taking some of them is the device's work, which a graph can do."""
        return self.storage.type == "cuda"

    def want(self, rows: Sequence[int]) -> None:
        """Images at these places are needed before long."""
        if self.reader:
            self.reader.want(rows)

    def sample(self, count: int) -> NDArray[Any]:
        """So many images, or fewer, spread evenly: uint8 or uint16 [n, S, S, bands]."""
        return np.asarray(self.images[:: -(-len(self) // count)].cpu())

    def spread(self, size: int, count: int) -> Tensor:
        """The places of so many batches, or fewer, each spread evenly over the split: int64 [count, size], or less."""
        size = min(size, len(self))
        count = min(count, len(self) // size)
        places = torch.arange(size * count, device=self.storage) * len(self) // (size * count)
        return places.view(size, count).T

    def weights(self, size: int, real: int) -> Tensor:
        """Of a batch whose first `real` samples count: float32 [size]."""
        return (torch.arange(size, device=self.device) < real).float()

    @property
    def travels(self) -> bool:
        """Whether each batch goes from this host's memory to a GPU."""
        return self.storage != self.device

    def batch(self, indices: Tensor, weights: Tensor, total: int, others: Tensor | None = None) -> Batch:
        """The samples at `indices`, mixed with those at `others` (both int64 [B], on the storage's device)."""
        return self.send(self.hold(indices, weights, total, others))

    def hold(self, indices: Tensor, weights: Tensor, total: int, others: Tensor | None = None) -> Batch:
        """As `batch`, but images are as the split has them, and where that is; pinned if they are to travel."""
        partners = None if others is None else Partners(*self._chosen(others))
        return Batch(*self._chosen(indices), weights, total, partners)

    def send(self, held: Batch) -> Batch:
        """What is held, on the device; from pinned memory, so that the host does not wait for it."""
        partners = held.partners and Partners(*self._sent(held.partners))
        return Batch(*self._sent(held), held.weights, held.total, partners)

    def _chosen(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, images and labels."""
        stored = self.images.view(torch.int16) if self._is_wide else self.images  # CUDA does not index uint16
        if not self.travels:
            return indices, stored.index_select(0, indices), self.labels.index_select(0, indices)
        count = len(indices)
        images, labels = (torch.index_select(one, 0, indices, out=_pinned(count, one)) for one in (stored, self.labels))
        return _pinned(count, indices).copy_(indices), images, labels

    def _sent(self, held: Batch | Partners) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, images and labels."""
        indices, images, labels = held.indices, held.images, held.labels
        if self.travels:
            indices, images, labels = (t.to(self.device, non_blocking=True) for t in (indices, images, labels))
        if self._is_wide:
            images = images.view(torch.uint16).float()
        return indices, images.permute(0, 3, 1, 2), labels


def _pinned(count: int, like: Tensor) -> Tensor:
    """Room for so many samples, from which a GPU can copy by itself; torch hands the same out again."""
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, pin_memory=True)


def open_images(world: World, tree: Tree, splits: Sequence[str], data: Data, place: Place) -> dict[str, Images]:
    """The packed images of some splits, the same on all ranks, after one of each node has packed what was not.

    Ranks may see copies of the data, whose times differ: what the images show decides. Collective.
    """
    world.agree("data", {"classes": tree.classes, "content": tree.digest if is_checked(tree) else _names(tree)})

    def read() -> dict[str, Packed]:
        crop, size = Crop.of(data), data.image_size
        if not size:
            raise UserError("data.image_size 0, the images' own, is for train: give the size")
        packed, bad = {}, []
        for split in splits:
            try:
                packed[split] = open_packed(tree, split, size, place.cache_dir, crop, world.tick)
            except BadFilesError as error:  # those of the other splits are to be named with them
                bad.append(error)
        if bad:
            raise BadFilesError.together(bad, sum(len(tree.files(split)) for split in splits))
        return packed

    packed = world.node_by_node(read)
    world.agree("data", {f"content of {split}/": arrays.checksum for split, arrays in packed.items()})
    return {split: Images(arrays, world.device) for split, arrays in packed.items()}


def is_checked(tree: Tree) -> bool:
    """Whether the digest is of the files' bytes, as `prepare` found them, and not of their sizes and times."""
    return tree.checksums.are_known


def by_content(tree: Tree, images: dict[str, Images]) -> Tree:
    """The tree, named by what the images of all its splits show, wherever they are and whenever they were copied."""
    if is_checked(tree):
        return tree
    shown = "".join(f"{split} {one.checksum}\n" for split, one in images.items())
    return replace(tree, digest=hashlib.sha256(f"{_names(tree)}\n{shown}".encode()).hexdigest())


def _names(tree: Tree) -> str:
    digest = hashlib.sha256()
    for number, name in enumerate(tree.checksums):
        digest.update(f"{chr(0) if number else ''}{name}".encode(errors="surrogateescape"))
    return digest.hexdigest()


class TrainBatches:
    """One rank's batches of an epoch: its DistributedSampler shard in whole batches, from any sample on.

    The order is that of DistributedSampler, and so is the interleaving: of the epoch's position p on, rank r of W has
    p + r, p + W + r, ... It is drawn here as there, for a DistributedSampler knows no offset, and makes lists.
    The last batch goes on from the order's beginning with samples of weight 0: every step has the same shape and
    well-filled BatchNorm statistics. A global batch is the same set of samples whatever the number of ranks, and with
    `mixes` each sample has the same partner.
    """

    def __init__(
        self, images: Images, batch_size: int, rank: int, world_size: int, seed: int, mixes: bool = False
    ) -> None:
        self.length = len(images)
        self.shard = math.ceil(self.length / world_size)
        self.global_batch = batch_size * world_size
        if world_size > self.length:
            few = f"{world_size} ranks are more than the {self.length} training images"
            raise UserError(f"{few}: start {self.length} at most")
        if batch_size > self.shard:
            most = (self.length - 1) // (batch_size - 1)  # ranks whose shards are large enough
            fewer = f", or start {most} rank{'s' if most > 1 else ''} at most" if most else ""
            raise UserError(
                f"train.batch_size {batch_size} is larger than a rank's shard of {self.shard} training images: "
                f"give {self.shard} or less{fewer}"
            )
        self._images, self._seed, self._mixes = images, seed, mixes
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        # The epoch is added to it: seed s + 1 would have the orders of seed s, an epoch earlier.
        self._order_seed = int(mix(seed, torch.zeros((), dtype=torch.int64)))

    def steps(self, samples: int = 0) -> int:
        """Steps of an epoch of which `samples` have been seen."""
        return math.ceil((self.length - samples) / self.global_batch)

    def epoch(self, epoch: int, samples: int = 0) -> Iterator[Batch | Draw]:
        """The batches of an epoch in its own order, from the sample at position `samples` on."""
        images, drawn = self._images, self._drawn(epoch, samples)
        if images.on_device:
            yield from (Draw(*one, self) for one in drawn)
        elif images.travels:
            yield from map(images.send, made_ahead((partial(self._hold, *one, epoch) for one in drawn), IN_HAND))
        else:
            yield from (self.take(*one, epoch) for one in drawn)

    def _drawn(self, epoch: int, samples: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Of each step the positions of its samples, their weights, and how many count on all ranks."""
        order = self._order(epoch)
        full = self._images.weights(self._batch_size, self._batch_size)

        def choose(first: int) -> Tensor:
            return order[first + self._rank : first + self.global_batch : self._world_size]

        def want(first: int) -> None:
            rows = choose(first)
            others = partners(self._seed, rows, epoch, self.length) if self._mixes else rows[:0]
            self._images.want([*rows.tolist(), *others.tolist()])

        starts = range(samples, self.length, self.global_batch)
        for first in ahead(starts, want if self._images.reader else None):
            real = min(self._batch_size, len(range(first + self._rank, self.length, self._world_size)))
            total = min(self.global_batch, self.length - first)
            chosen = choose(first)
            weights = full if real == self._batch_size else self._images.weights(self._batch_size, real)
            yield chosen, weights, total

    def _order(self, epoch: int) -> Tensor:
        """What DistributedSampler makes a list of: int64 [N + B], the first samples again at the end for padding."""
        drawn = torch.randperm(self.length, generator=torch.Generator().manual_seed(self._order_seed + epoch))
        places = torch.arange(self.length + self.global_batch) % self.length
        return drawn[places].to(self._images.storage)

    def take(self, chosen: Tensor, weights: Tensor, total: int, epoch: int | Tensor) -> Batch:
        """The batch of the samples at `chosen`, int64 [B]."""
        return self._images.send(self._hold(chosen, weights, total, epoch))

    def _hold(self, chosen: Tensor, weights: Tensor, total: int, epoch: int | Tensor) -> Batch:
        others = partners(self._seed, chosen, epoch, self.length) if self._mixes else None
        return self._images.hold(chosen, weights, total, others)


def ordered_batches(images: Images, batch_size: int, shard: int = 0, shards: int = 1) -> Iterator[Batch]:
    """A split in file order, in batches of one fixed size; shard i of n gets every n-th batch, from the i-th on.

    Batches are the same whatever the number of shards, and so is the arithmetic of each.
    """

    def want(first: int) -> None:
        images.want(range(first, min(first + batch_size, len(images))))

    def drawn() -> Iterator[tuple[Tensor, Tensor, int]]:
        starts = range(shard * batch_size, len(images), shards * batch_size)
        for first in ahead(starts, want if images.reader else None):
            real = min(batch_size, len(images) - first)
            indices = torch.arange(first, first + batch_size, device=images.storage).clamp(max=len(images) - 1)
            yield indices, images.weights(batch_size, real), real

    if images.travels:
        yield from map(images.send, made_ahead((partial(images.hold, *one) for one in drawn()), IN_HAND))
    else:
        yield from (images.batch(*one) for one in drawn())
