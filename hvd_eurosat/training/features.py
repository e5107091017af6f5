"""What the head sees of each image, kept where the head alone trains: all that comes before it stays as it is.

Flips and quarter turns come round in eight epochs (data.augment), and without them each epoch shows the same. So what
one epoch has computed is what the epoch eight later wants. Every rank keeps the features of all images, for each epoch
deals them to the ranks anew. They are kept in the numbers of the step, not rounded: where an image has the same
features whatever else is in its batch, as on CPUs, a run learns bit for bit what it would learn without this. So
nothing of it is saved, and a run that is resumed computes again what it lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_eurosat.cluster.node import available_memory
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data
from hvd_eurosat.data.augment import VIEWS
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import LandCoverResNet, is_trainable
from hvd_eurosat.training.state import TrainingState

SHARE = 0.5  # of the free memory, which all these may take
PIECE = 2**22  # numbers that travel at a time: 16 MiB
RANDOM = ("max_shift", "jitter_crop", *(name for name in Data.model_fields if name.startswith("random_")))


class Features:
    """Of the training images in each of their views, one table on the device: [views, N + 1, fc.in_features].

    obstacle: why none are kept, "" where nobody would expect it, None if they are. first: the epoch, from 0, from which
    on only the head is computed. nbytes: of the table. valid: those of the validation images, batch by batch and view
    by view, for `evaluate` to fill; None where they are not kept. All ranks agree. Making it is collective.
    """

    def __init__(self, world: World, config: Config, state: TrainingState, train: int, valid: int) -> None:
        self._world, self._epochs = world, config.train.epochs
        self._views, self._spare = VIEWS if config.data.augment else 1, train
        dtype = torch.bfloat16 if state.precision.name == "bf16" else torch.get_default_dtype()
        each = state.model.fc.in_features * dtype.itemsize
        self.nbytes = self._views * (train + 1) * each
        self.first = state.epoch + (state.samples > 0) + self._views
        self._whole = False
        self._known: set[int] = set()
        is_alone = _head_alone(state.model)
        self.obstacle = _change(config) if is_alone and self.first < self._epochs else ""
        if self.obstacle is None and not _fits(world, self.nbytes):
            self.obstacle = f"{self.nbytes / 1e9:.1f} GB a rank are more than {SHARE:.0%} of the free memory"
        beside = self.nbytes if self.keeps else 0
        has_room = is_alone and _fits(world, beside + config.valid.views * valid * each)
        self.valid: dict[int, list[Tensor]] | None = {} if has_room else None
        if self.keeps:
            shape = self._views, train + 1, state.model.fc.in_features
            self._table = torch.empty(shape, dtype=dtype, device=world.device)

    @property
    def keeps(self) -> bool:
        """Whether those of the training images are kept."""
        return self.obstacle is None

    def begin(self, epoch: int, samples: int) -> None:
        """Before an epoch, or what is left of it after so many samples."""
        self._whole = samples == 0
        if self.keeps and not self.knows(epoch):
            self._table[epoch % self._views].zero_()

    def knows(self, epoch: int) -> bool:
        """Whether all that an epoch wants is there."""
        return epoch % self._views in self._known

    def keep(self, features: Tensor, batch: Batch, epoch: Tensor) -> None:
        """Those of a batch, [B, fc.in_features], in an epoch, int64 []; padding goes aside, for other ranks have it."""
        rows = torch.where(batch.weights != 0, batch.indices, self._spare)
        self._table.flatten(0, 1).index_copy_(0, self._places(rows, epoch), features)

    def of(self, batch: Batch, epoch: Tensor) -> Tensor:
        """Those of a batch in an epoch, int64 [], that this knows: [B, fc.in_features]."""
        return self._table.flatten(0, 1).index_select(0, self._places(batch.indices, epoch))

    def _places(self, rows: Tensor, epoch: Tensor) -> Tensor:
        return epoch % self._views * self._table.shape[1] + rows

    def end(self, epoch: int) -> None:
        """After an epoch: every rank gets what the others have computed in it, if it comes round. Collective.

        Each image is one rank's, and zero bits on all others: added up as whole numbers, its bits stay what they are.
        """
        if not self.keeps or self.knows(epoch) or not self._whole or epoch + self._views >= self._epochs:
            return
        bits = self._table[epoch % self._views].view(torch.int32).flatten()
        for piece in bits.split(PIECE) if self._world.size > 1 else ():
            self._world.finish_sum(self._world.start_sum(piece, "features"))
            self._world.tick()
        self._known.add(epoch % self._views)


def _head_alone(model: LandCoverResNet) -> bool:
    """Whether nothing before the head trains, statistics of BatchNorm included."""
    others = [(name, module) for name, module in model.named_modules() if name != "fc"]
    return not any(is_trainable(name, module, model.trainable) for name, module in others)


def _change(config: Config) -> str | None:
    """The keys by which an image never looks the same again, or whose network is another one; None without any."""
    data, train = config.data, config.train
    keys = [f"data.{name}" for name in RANDOM if getattr(data, name)]
    keys += [f"train.{name}" for name in ("mixup", "cutmix", "compile") if getattr(train, name)]
    keys += ["train.start_size"] if 0 < train.start_size < data.input_side else []
    return ", ".join(keys) or None


def _fits(world: World, size: int) -> bool:
    """Whether each rank has room for so many bytes. Collective."""
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = available_memory() // world.local_size
    return all(world.gather(size <= SHARE * free))
