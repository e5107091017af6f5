"""The running statistics of the BatchNorm layers, which every rank keeps for its own batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster import World
from hvd_eurosat.model.resnet import batch_norm_buffers


def get_statistics(model: nn.Module) -> Tensor:
    """All running means and variances, a flat float32 [n] copy."""
    return torch.cat([buffer.flatten() for buffer in batch_norm_buffers(model)])


def put_statistics(model: nn.Module, flat: Tensor) -> None:
    """The inverse of `get_statistics`, in place."""
    buffers = batch_norm_buffers(model)
    for buffer, piece in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(piece.view_as(buffer))


@contextlib.contextmanager
def averaged_statistics(model: nn.Module, world: World) -> Iterator[Tensor]:
    """Within the block the model has the average over the ranks; after it, this rank's own again. Collective.

    Yields the statistics of every rank, float32 [world size, n].
    """
    every = world.stack(get_statistics(model))
    put_statistics(model, every.mean(0))
    try:
        yield every
    finally:
        put_statistics(model, every[world.rank])
