"""Everything that changes while a run trains: taken as a checkpoint, and put back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import Images
from hvd_eurosat.data.inputs import Inputs
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import Stopped
from hvd_eurosat.model.convolution import Convolution
from hvd_eurosat.model.resnet import LandCoverResNet, batch_norm_buffers
from hvd_eurosat.training.average import EVERY, Average
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.copies import arrival, copied, highest
from hvd_eurosat.training.inference import Network, Stop
from hvd_eurosat.training.metrics import Sums
from hvd_eurosat.training.optimiser import build_optimiser
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.statistics import Statistics

PIECE = {"cpu": 2**16, "cuda": 2**24}  # numbers at a time: as many as stay in a CPU's cache
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class TrainingState:
    """Model, optimiser, BatchNorm statistics, and how far the run has come.

    epoch: completed ones; samples: seen of the epoch in progress by all ranks; step: in all; sums: of this rank;
    inputs: what the numbers in the images are, for whoever uses the network later; average: of the weights, with
    train.ema.
    """

    def __init__(
        self,
        world: World,
        config: Config,
        tree: Tree,
        model: LandCoverResNet,
        precision: Precision,
        inputs: Inputs | None = None,
    ) -> None:
        self._world, self._config, self._tree = world, config, tree
        self.model = model
        self.precision = precision
        self.inputs = inputs
        self.optimiser = build_optimiser(model, config.optim)
        self.statistics = Statistics(model)
        decay = config.train.ema
        self.average = Average(self._trainable(), decay) if decay else None
        self.sums = Sums(world)
        self.epoch = self.samples = self.step = 0
        self.weights: str | None = None  # the digest of the file that the run began with
        self._frozen: dict[str, Tensor] = {}  # on the CPU, copied once
        self._seals: dict[int, tuple[object, Tensor]] = {}

    @property
    def averages(self) -> bool:
        """Whether the step that comes counts for the average of the weights."""
        return self.average is not None and self.step % EVERY == 0

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
        self.model.load_state_dict(saved.model | saved.live)
        self.optimiser.load_state_dict(copied(saved.optimiser))  # it keeps the tensors that it is given
        if self.average:
            self.average.restore(saved.model, saved.share, self.statistics.flat.clone() if saved.epoch else None)
        self.statistics.flat.copy_(saved.rank_buffers[world.rank] if same_world else saved.rank_buffers.mean(0))
        self.epoch, self.samples, self.step = saved.epoch, saved.samples, saved.step
        self.weights = saved.weights
        if same_world:
            self.sums.total.copy_(saved.sums[world.rank])
        elif world.is_main:
            self.sums.total.copy_(saved.sums.sum(0))

    @contextlib.contextmanager
    def validated(self, images: Images, stop: Stop) -> Iterator[None]:
        """As `averaged`, at an epoch's end. Collective.

        With train.ema, BatchNorm's statistics are estimated from training images: those of training are of other
        weights. Raises Stopped on every rank if `stop` came true on one; then, or if validation does, they are as
        before: a checkpoint at this step has one content.
        """
        average = self.average
        before = average.statistics if average else None
        try:
            if average:
                with average.shown():
                    network = Network(self.model, self._config.data, self.precision, 1)
                    average.statistics = self.statistics.estimate(self._world, network, images, stop)
            with self.averaged():
                yield
        except Stopped:
            if average:
                average.statistics = before
            raise

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Tensor]:
        """Within the block the model is as it is validated and saved, after it as this rank trains it. Collective.

        Its statistics are the mean over the ranks. With train.ema its weights are averages, and the statistics those of
        the last estimate, if there was one. Yields the statistics of every rank: float32 [world size, n].
        """
        flat, average = self.statistics.flat, self.average
        every = self._world.stack(flat)
        kept = flat.clone()
        flat.copy_(every.mean(0) if average is None or average.statistics is None else average.statistics)
        try:
            with average.shown() if average else contextlib.nullcontext():
                yield every
        finally:
            flat.copy_(kept)

    def snapshot(self) -> Checkpoint | None:
        """A copy of the state, on rank 0 alone unless the job is elastic. Collective.

        From a GPU it is yet to come: see copies.whole, which also says if it is not finite. Else raises NotFiniteError.
        """
        sums = self._world.stack(self.sums.total)
        saves = self._world.is_main or self._world.is_elastic
        trains = self._trainable() if self.average and saves else {}
        live, values = copied(trains), highest(trains.values())
        share = self.average.share if self.average else sums.new_zeros(())
        with self.averaged() as every:
            if not saves:
                return None
            frozen = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
            self._frozen = self._frozen or {name: p.to("cpu", copy=True) for name, p in frozen.items()}
            changing = {name: t for name, t in self.model.state_dict().items() if name not in frozen}
            model, optimiser, every, totals = copied([changing, self.optimiser.state_dict(), every, sums])
            arrived = arrival([*values, *highest(changing.values())], share)
            return Checkpoint(
                model=self._frozen | model,
                frozen=list(frozen),
                optimiser=optimiser,
                rank_buffers=every,
                sums=totals,
                epoch=self.epoch,
                samples=self.samples,
                step=self.step,
                config=self._config.model_dump(mode="json"),
                classes=list(self._tree.classes),
                digest=self._tree.digest,
                precision=self.precision.name,
                image_side=self._tree.image_size,
                inputs=self.inputs.model_dump(mode="json") if self.inputs else None,
                weights=self.weights,
                live=live,
                share=0.0 if arrived else float(share),
                arrival=arrived,
            )

    def seal(self) -> None:
        """From here on what does not train must stay as it is."""
        self._seals = {}
        self._is_broken()

    def verify(self) -> None:
        """Raise on every rank, naming the culprits, unless all have the right weights. Collective.

        What does not train must be as it was at `seal`; what does, and what the optimiser keeps of it, the same on all
        ranks. The statistics of BatchNorm layers that train are each rank's own.
        """
        both = torch.stack([self._is_broken().long(), digest(self._moving(), self._world.device)])
        broken, moving = self._world.stack(both).T.tolist()
        if any(broken):
            culprits = _named([rank for rank, one in enumerate(broken) if one])
            raise SharedError(f"weights that do not train changed on {culprits}, found at step {self.step}", 1)
        if wrong := minority(moving):
            others = " from the others'" if len(wrong) < len(moving) else ""
            raise SharedError(f"the weights of {_named(wrong)} differ{others} at step {self.step}", 1)

    def _is_broken(self) -> Tensor:
        """bool []: whether anything that does not train, or a copy of it, changed since this first saw it."""
        norms = nn.ModuleList(m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d) and not m.training)
        fixed = [p.detach() for p in self.model.parameters() if not p.requires_grad] + batch_norm_buffers(norms)
        copies = [m.prepared() for m in self.model.modules() if isinstance(m, Convolution)]
        broken = torch.zeros((), dtype=torch.bool, device=self._world.device)
        for place, (what, tensors) in enumerate([(self.model, fixed), *copies]):
            now = digest(tensors, self._world.device)
            before, then = self._seals.get(place, (what, now))
            broken |= (now != then) & (what is before)
            self._seals[place] = what, now
        return broken

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The weights that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _moving(self) -> list[Tensor]:
        """The weights that train, with each what the optimiser keeps of it, and their averages."""
        averages = list(self.average.weights.values()) if self.average else []
        return [*averages, *(parameter.detach() for parameter in self._trainable().values()), *self.kept()]

    def kept(self) -> list[Tensor]:
        """The tensors that the optimiser keeps of the weights that train, where these are.

        An earlier version's Adagrad and RMSprop have left counts on the CPU, which are of no use now.
        """
        states = (self.optimiser.state.get(parameter, {}) for parameter in self._trainable().values())
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [tensor for tensor in tensors if tensor.device.type == self._world.device.type]


def digest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """int64 []: the bits of dense tensors times odd numbers, so that any one that flips changes the sum."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    room = PIECE[device.type]
    odd = torch.arange(1, 2 * room, 2, dtype=torch.int32, device=device)
    for tensor in tensors:
        bits = tensor.as_strided((tensor.numel(),), (1,)).view(BITS[tensor.itemsize]).to(device)
        for piece in bits.split(room):
            total += (piece * odd[: len(piece)]).sum()
    return total


def minority(values: Sequence[int]) -> list[int]:
    """The places of those that are not the most frequent value; all places where no value is that alone."""
    ranked = Counter(values).most_common(2)
    tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return [place for place, value in enumerate(values) if tied or value != ranked[0][0]]


def _named(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
