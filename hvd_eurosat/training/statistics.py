"""The running statistics of the BatchNorm layers, which every rank keeps for its own batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster.world import World
from hvd_eurosat.data.batches import Images
from hvd_eurosat.model.resnet import LandCoverResNet, batch_norm_buffers
from hvd_eurosat.training.inference import Network

BATCHES, BATCH = 10, 128  # of an estimate; 10 of 128 took 3 % of an epoch of EuroSAT


class Statistics:
    """All running means and variances of a model, which become slices of one tensor: `flat`, float32 [n]."""

    def __init__(self, model: LandCoverResNet) -> None:
        buffers = batch_norm_buffers(model)
        self.flat = torch.cat([buffer.flatten() for buffer in buffers])
        for buffer, piece in zip(buffers, self.flat.split([b.numel() for b in buffers]), strict=True):
            buffer.set_(piece.view_as(buffer))

    @torch.no_grad()
    def estimate(self, world: World, network: Network, images: Images) -> Tensor:
        """Of the model as it is: the mean over batches of plain images, float32 [n]; `flat` stays. Collective.

        The same on all ranks, whatever their number, for they share the batches out (Izmailov et al. 2018, "Averaging
        Weights Leads to Wider Optima").
        """
        kept = {name: buffer.clone() for name, buffer in network.model.named_buffers()}
        total = torch.zeros_like(self.flat, dtype=torch.float64)
        batches = images.spread(BATCH, BATCHES)
        mine = batches[world.rank :: world.size]
        images.want(mine.flatten().tolist())
        _set_momentum(network.model, 1.0)  # the statistics are a batch's own
        for indices in mine:
            network.features(images.batch(indices, images.weights(len(indices), len(indices)), len(indices)).images)
            total += self.flat
            world.tick()
        _set_momentum(network.model, network.model.details.momentum)
        for name, buffer in network.model.named_buffers():
            buffer.copy_(kept[name])
        return (world.sum(total) / len(batches)).to(self.flat.dtype)


def _set_momentum(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
