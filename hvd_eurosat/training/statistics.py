"""The running statistics of the BatchNorm layers, which every rank keeps for its own batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster.world import World
from hvd_eurosat.data.batches import Images
from hvd_eurosat.errors import Stopped
from hvd_eurosat.model.resnet import LandCoverResNet, batch_norm_buffers
from hvd_eurosat.training.inference import Network, Stop

BATCHES, BATCH = 10, 128  # of an estimate; the last weights of a run were as accurate with it as with training's own


class Statistics:
    """All running means and variances of a model, which become slices of one tensor: `flat`, float32 [n]."""

    def __init__(self, model: LandCoverResNet) -> None:
        buffers = batch_norm_buffers(model)
        self.flat = torch.cat([buffer.flatten() for buffer in buffers])
        for buffer, piece in zip(buffers, self.flat.split([b.numel() for b in buffers]), strict=True):
            buffer.set_(piece.view_as(buffer))

    @torch.no_grad()
    def estimate(self, world: World, network: Network, images: Images, stop: Stop) -> Tensor:
        """Of the model as it is: the mean over batches of plain images, float32 [n]; `flat` stays. Collective.

        The same on all ranks, whatever their number, for they share the batches out (Izmailov et al. 2018, "Averaging
        Weights Leads to Wider Optima"). Raises Stopped on every rank if `stop` came true on one.
        """
        norms = [module for module in network.model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        if not norms:
            return self.flat.clone()
        kept = {name: buffer.clone() for name, buffer in network.model.named_buffers()}
        places = images.spread(BATCH, BATCHES)
        mine = places[world.rank :: world.size]
        images.want(mine.flatten().tolist())
        _set_momentum(norms, 1.0)  # the statistics are a batch's own
        total, stopped = torch.zeros_like(self.flat, dtype=torch.float64), False
        for indices in mine:
            if stopped := stop():
                break
            batch = images.batch(indices, images.weights(len(indices), len(indices)), len(indices))
            network.features(batch.images)
            total += self.flat
            world.tick()
        _set_momentum(norms, network.model.details.momentum)
        for name, buffer in network.model.named_buffers():
            buffer.copy_(kept[name])
        sums = world.sum(torch.cat([total, total.new_tensor([stopped])]))
        if sums[-1]:
            raise Stopped
        return (sums[:-1] / len(places)).to(self.flat.dtype)


def _set_momentum(norms: Iterable[nn.BatchNorm2d], momentum: float) -> None:
    for norm in norms:
        norm.momentum = momentum
