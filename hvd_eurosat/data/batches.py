"""Batches from the packed arrays: a rank's shard of the training set, or a split in file order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from hvd_eurosat.cluster import World
from hvd_eurosat.config import Data, Place
from hvd_eurosat.data.images import Crop
from hvd_eurosat.data.packed import Packed, open_packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import UserError


@dataclass(frozen=True)
class Batch:
    """What one rank works on in one step; always of the full batch size B.

    indices: int64 [B], positions in the split; images: uint8 [B, 3, S, S], channels last; labels: int64 [B];
    weights: float32 [B], 1 for a sample that counts, 0 for padding; total: samples that count on all ranks.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor
    weights: Tensor
    total: int


class Images:
    """A packed split for a device: a resident copy on a GPU that has room for it, else the memory-mapped file."""

    def __init__(self, packed: Packed, device: torch.device) -> None:
        self.device = device
        resident = device.type == "cuda" and packed.images.nbytes < torch.cuda.mem_get_info(device)[0] // 2
        self.storage = device if resident else torch.device("cpu")
        self.images = torch.from_numpy(packed.images).to(self.storage)
        self.labels = torch.from_numpy(packed.labels).to(self.storage)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, real: int, total: int) -> Batch:
        """The samples at `indices` (int64 [B], on the storage's device), of which the first `real` count."""
        weights = (torch.arange(len(indices), device=self.device) < real).float()
        images, labels = (all_of.index_select(0, indices).to(self.device) for all_of in (self.images, self.labels))
        return Batch(indices.to(self.device), images.permute(0, 3, 1, 2), labels, weights, total)


def open_images(world: World, tree: Tree, splits: Sequence[str], data: Data, place: Place) -> dict[str, Images]:
    """The packed images of some splits, after one rank of each node has packed what was not. Collective."""
    packed = world.node_by_node(
        lambda: {split: open_packed(tree, split, data.image_size, place.cache_dir, Crop.of(data)) for split in splits}
    )
    return {split: Images(arrays, world.device) for split, arrays in packed.items()}


class TrainBatches:
    """One rank's batches of an epoch: its DistributedSampler shard in whole batches.

    The last batch is filled up with samples of weight 0 from the shard's beginning: every step has the same shape
    and well-filled BatchNorm statistics. A global batch is the same set of samples whatever the number of ranks.
    """

    def __init__(self, images: Images, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.length = len(images)
        if world_size > len(images):
            raise UserError(f"{world_size} ranks are more than the {len(images)} training images")
        shard = math.ceil(len(images) / world_size)
        if batch_size > shard:
            raise UserError(f"train.batch_size {batch_size} is larger than a rank's shard of {shard} training images")
        self._images = images
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._sampler: DistributedSampler[Tensor] = DistributedSampler(
            _Length(len(images)), world_size, rank, shuffle=True, seed=seed
        )
        self.steps = math.ceil(shard / batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, in its own order."""
        self._sampler.set_epoch(epoch)
        shard = torch.tensor(list(self._sampler))
        filled = torch.cat([shard, shard])[: self.steps * self._batch_size].to(self._images.storage)
        for step, indices in enumerate(filled.split(self._batch_size)):
            yield self._images.batch(indices, self._real(step), self.total(step))

    def total(self, step: int) -> int:
        """How many samples count in a step on all ranks."""
        first, end = (min(s * self._batch_size * self._world_size, len(self._images)) for s in (step, step + 1))
        return end - first

    def _real(self, step: int) -> int:
        """Samples that count: the shard's position p is the epoch's position p * world size + rank."""
        ours = math.ceil((len(self._images) - self._rank) / self._world_size)
        return min(self._batch_size, ours - step * self._batch_size)


class _Length(Dataset[Tensor]):
    """All that a DistributedSampler asks of its data set."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def ordered_batches(images: Images, batch_size: int, shard: int = 0, shards: int = 1) -> Iterator[Batch]:
    """A split in file order, in batches of one fixed size; shard i of n gets every n-th batch, from the i-th on.

    Batches are the same whatever the number of shards, and so is the arithmetic of each.
    """
    for first in range(shard * batch_size, len(images), shards * batch_size):
        real = min(batch_size, len(images) - first)
        indices = torch.arange(first, first + batch_size, device=images.storage).clamp(max=len(images) - 1)
        yield images.batch(indices, real, real)
