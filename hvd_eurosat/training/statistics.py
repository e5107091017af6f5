"""The running statistics of the BatchNorm layers, which every rank keeps for its own batches."""

from __future__ import annotations

import torch
from torch import nn

from hvd_eurosat.model.resnet import batch_norm_buffers


class Statistics:
    """All running means and variances of a model, which become slices of one tensor: `flat`, float32 [n]."""

    def __init__(self, model: nn.Module) -> None:
        buffers = batch_norm_buffers(model)
        self.flat = torch.cat([buffer.flatten() for buffer in buffers])
        for buffer, piece in zip(buffers, self.flat.split([b.numel() for b in buffers]), strict=True):
            buffer.set_(piece.view_as(buffer))
