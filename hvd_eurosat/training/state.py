"""Everything that changes while a run trains: taken as a checkpoint, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import RunError
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.metrics import Sums
from hvd_eurosat.training.optimiser import build_optimiser
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.statistics import Statistics


class TrainingState:
    """Model, optimiser, BatchNorm statistics, and how far the run has come.

    epoch: completed ones; samples: seen of the epoch in progress by all ranks; step: in all; sums: of this rank.
    """

    def __init__(self, world: World, config: Config, tree: Tree, model: LandCoverResNet, precision: Precision) -> None:
        self._world, self._config, self._tree = world, config, tree
        self.model = model
        self.precision = precision
        self.optimiser = build_optimiser(model, config.optim)
        self.statistics = Statistics(model)
        self.sums = Sums(world)
        self.epoch = self.samples = self.step = 0
        self._frozen: dict[str, Tensor] = {}  # on the CPU, copied once

    def advance(self, samples: int) -> None:
        """A step was made with so many samples."""
        self.samples += samples
        self.step += 1

    def end_epoch(self) -> None:
        """The epoch was trained and validated."""
        self.epoch, self.samples = self.epoch + 1, 0
        self.sums.total.zero_()

    def restore(self, saved: Checkpoint) -> None:
        """Put a checkpoint back; of another number of ranks, each goes on with the average of the statistics."""
        world = self._world
        same_world = len(saved.rank_buffers) == world.size
        self.model.load_state_dict(saved.model)
        self.optimiser.load_state_dict(_copy(saved.optimiser))  # it keeps the tensors that it is given
        self.statistics.flat.copy_(saved.rank_buffers[world.rank] if same_world else saved.rank_buffers.mean(0))
        self.epoch, self.samples, self.step = saved.epoch, saved.samples, saved.step
        if same_world:
            self.sums.total.copy_(saved.sums[world.rank])
        elif world.is_main:
            self.sums.total.copy_(saved.sums.sum(0))

    def snapshot(self) -> Checkpoint | None:
        """A copy of the state, on rank 0 alone unless the job is elastic. Collective.

        Raises RunError if it is not finite.
        """
        sums = self._world.stack(self.sums.total)
        with self.statistics.averaged(self._world) as every:
            if not (self._world.is_main or self._world.is_elastic):
                return None
            frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
            self._frozen = self._frozen or _copy(frozen)
            changing = {name: t for name, t in self.model.state_dict().items() if name not in frozen}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in changing.values()):
                raise RunError("the weights are not finite any more: try a lower optim.lr")
            return Checkpoint(
                model=self._frozen | _copy(changing),
                frozen=list(frozen),
                optimiser=_copy(self.optimiser.state_dict()),
                rank_buffers=every.cpu(),
                sums=sums.cpu(),
                epoch=self.epoch,
                samples=self.samples,
                step=self.step,
                config=self._config.model_dump(mode="json"),
                classes=list(self._tree.classes),
                digest=self._tree.digest,
                precision=self.precision.name,
                image_side=self._tree.image_size,
            )

    def verify(self) -> None:
        """Raise on every rank, naming the culprits, unless all have the same trainable weights. Collective."""
        trainable = [p.detach() for p in self.model.parameters() if p.requires_grad]
        digests = self._world.stack(torch.stack([digest(p) for p in trainable]).sum()[None]).flatten().tolist()
        right = max(digests, key=digests.count)
        wrong = [str(rank) for rank, digest in enumerate(digests) if digest != right]
        if wrong:
            raise SharedError(f"the weights of rank {', '.join(wrong)} differ from the others' at step {self.step}", 1)


def digest(tensor: Tensor) -> Tensor:
    """Of a float32 tensor, dense; int64 []: the bits times odd numbers, so that any one that flips changes the sum."""
    bits = tensor.as_strided((tensor.numel(),), (1,)).view(torch.int32).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def _copy(value: Any) -> Any:
    """Nested dictionaries and lists with copies of their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
