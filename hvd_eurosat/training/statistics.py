"""The running statistics of the BatchNorm layers, which every rank keeps for its own batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster.world import World
from hvd_eurosat.model.resnet import batch_norm_buffers


class Statistics:
    """All running means and variances of a model, which become slices of one tensor: `flat`, float32 [n]."""

    def __init__(self, model: nn.Module) -> None:
        buffers = batch_norm_buffers(model)
        self.flat = torch.cat([buffer.flatten() for buffer in buffers])
        for buffer, piece in zip(buffers, self.flat.split([b.numel() for b in buffers]), strict=True):
            buffer.set_(piece.view_as(buffer))

    @contextlib.contextmanager
    def averaged(self, world: World) -> Iterator[Tensor]:
        """Within the block the model has the average over the ranks; after it, this rank's own again. Collective.

        Yields the statistics of every rank, float32 [world size, n].
        """
        every = world.stack(self.flat)
        self.flat.copy_(every.mean(0))
        try:
            yield every
        finally:
            self.flat.copy_(every[world.rank])
