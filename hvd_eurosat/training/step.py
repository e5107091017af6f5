"""One optimiser step: from a batch to new weights."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Config, mixes, schedule_epochs
from hvd_eurosat.data.augment import network_input
from hvd_eurosat.data.batches import Batch, Draw, Images
from hvd_eurosat.data.mixing import mixed_input, quantiles
from hvd_eurosat.errors import Stopped, UserError
from hvd_eurosat.model.convolution import Convolution
from hvd_eurosat.training import capture
from hvd_eurosat.training.compilation import obstacle
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.gradients import GradientBuckets
from hvd_eurosat.training.large_batch import unless
from hvd_eurosat.training.metrics import Sums
from hvd_eurosat.training.schedule import image_size, image_sizes, rate_share
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.stragglers import Stopwatch

GPU_LAG = 4  # steps that the host is behind the device when it reads what the step found
NON_FINITE_STEPS = 3
RECOMPILES = 8  # for each size; torch goes on uncompiled after eight in all
WIRE = {"none": torch.float32, "fp16": torch.float16}  # Horovod 0.28.1 adds no bfloat16


def class_weights(config: Config, images: Images, classes: int) -> Tensor | None:
    """train.class_weights, of mean 1 over the training images, float32 [classes]. Raises UserError."""
    if not config.train.class_weights:
        return None
    if len(config.train.class_weights) != classes:
        given = f"train.class_weights has {len(config.train.class_weights)} weights for {classes} classes"
        raise UserError(f"{given}: give one for each, in the order of their names")
    weights = torch.tensor(config.train.class_weights, device=images.device)
    return weights / weights[images.labels.to(images.device)].mean()


def sample_losses(log_probabilities: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """The loss of each sample, float32 [B], times the weight of its own class (float32 [C]).

    log_probabilities: [B, C]; labels: int64 [B]. torch's cross entropy, told `weight`, multiplies the smoothed target
    of each other class by that class's weight too: what it holds best is then wrong, a rare class draws all to it.
    """
    # On log-probabilities cross entropy is the negative log-likelihood; it knows label smoothing.
    losses = F.cross_entropy(log_probabilities, labels, reduction="none", label_smoothing=smoothing)
    return losses if weights is None else losses * weights[labels]


class Step:
    """Augment, forward, backward, sum the gradients over the ranks, update. Compiled if every rank can. Collective.

    On GPUs all before the sum is a CUDA graph, and all after it another, wherever that can be had (capture.py).
    Nothing but Horovod waits for the device.

    The loss of a step is the mean over the samples that count on all ranks: each rank divides its sum by their
    number, and Horovod adds. With the gradients the ranks add their losses, their requests to stop and rank 0's to keep
    the state: all come to the same decision after the same step.

    `features` keeps what the head sees, where it trains alone; in epochs that these know, only the head is computed.
    """

    def __init__(
        self,
        state: TrainingState,
        world: World,
        config: Config,
        class_weights: Tensor | None,
        features: Features | None = None,
    ) -> None:
        self._state = state
        self.features = features if features and features.keeps else None
        self._config = config
        self._class_weights = class_weights
        self._epochs = schedule_epochs(config.optim, config.train)
        self._device, self._ranks = world.device, world.size
        self._trainable = [p for p in state.model.parameters() if p.requires_grad]
        self.uncaptured = capture.obstacle(world, config)  # why; None if the step is captured
        self.captured = self.uncaptured is None
        wire = WIRE[config.optim.compression]
        self.gradients = GradientBuckets(world, self._trainable, notes=3, dtype=wire, at_once=self.captured)
        self._input: Callable[..., Any] = mixed_input if mixes(config.train) else network_input
        self._quantiles = [quantiles(alpha, world.device) for alpha in (config.train.mixup, config.train.cutmix)]
        self._network: Callable[[Tensor], Tensor] = state.model
        self.obstacle = obstacle(world) if config.train.compile else None
        self.compiled = config.train.compile and not self.obstacle
        if self.compiled:
            self._compile()
        groups = len(state.optimiser.param_groups)
        self._numbers = torch.zeros(4 + groups, dtype=torch.float64, device=world.device)  # see _tell
        self._before = torch.zeros_like(state.statistics.flat)
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._found = torch.zeros(3, device=world.device)
        self._learn: Callable[[int, Batch | Draw], None] = self._forward_and_backward
        self._improve: Callable[[bool], None] = self._update
        if self.captured:
            graphs = capture.Graphs(world)
            self._learn, self._improve = (capture.Captured(work, graphs) for work in (self._learn, self._improve))
        self._findings = _Findings(GPU_LAG if world.device.type == "cuda" else 0, world.waiting)
        self._skipped_in_a_row = 0
        self.stopwatch = Stopwatch(world.device)

    def __call__(self, batch: Batch | Draw, learning_rate: float, stop: bool, keep: bool = False) -> None:
        """Train on a batch; `stop` asks all ranks to stop after it, `keep` to keep the state. Then `check` tells."""
        state = self._state
        side = image_size(self._config.data, self._config.train, self._epochs, state.epoch)
        self._tell(batch.total, learning_rate, stop, keep)
        self._learn(0 if self.features and self.features.knows(state.epoch) else side, batch)
        self.stopwatch.wait()
        self.gradients.wait()
        self.stopwatch.work()
        self._improve(state.averages)
        self._findings.add(self._found)
        state.advance(batch.total)

    def begin_epoch(self) -> None:
        """Before the steps of an epoch, or of what is left of it."""
        if self.features:
            self.features.begin(self._state.epoch, self._state.samples)
        self.stopwatch.work()

    def end_epoch(self) -> None:
        """After its last step. Collective."""
        if self.features:
            self.features.end(self._state.epoch)

    def _tell(self, total: int, learning_rate: float, stop: bool, keep: bool) -> None:
        """What the host knows of the step goes to the device in one copy: epoch, samples, wishes, rates of groups."""
        state, optim = self._state, self._config.optim
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate * rate_share(optim, group["depth"], state.epoch)
        rates = [group["lr"] for group in state.optimiser.param_groups]
        numbers, pinned = [state.epoch, total, stop, keep, *rates], self._device.type == "cuda"
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned), non_blocking=True)

    def _forward_and_backward(self, size: int, drawn: Batch | Draw) -> None:
        """The gradients, and what else the ranks are to add up, into the buckets.

        size: of the images that the network is shown; 0 where it is shown none, for what the head sees is known.
        """
        state, gradients = self._state, self.gradients
        epoch, total, wishes = self._numbers[0].long(), self._numbers[1].float(), self._numbers[2:4]
        self._before.copy_(state.statistics.flat)
        gradients.zero()
        batch = drawn.complete(epoch)
        images, share = self._prepare(batch, epoch, size) if size else (batch.images, None)
        with state.precision.autocast(self._device):
            log_probabilities = self._answer(images, batch, epoch, recall=not size)
        loss = self._losses(log_probabilities, batch, share) @ batch.weights
        gradients.notes[0].copy_(loss.detach() / total)
        gradients.notes[1:].copy_(wishes / self._ranks)
        gradients.backward(loss / total)
        self._sums.copy_(Sums.of(log_probabilities.detach(), _most_of(batch, share), batch.weights))

    def _answer(self, images: Tensor, batch: Batch, epoch: Tensor, recall: bool) -> Tensor:
        """Log-probabilities, float32 [B, C], of what the network is shown, or of what the head saw of these images."""
        if not self.features:
            return self._network(images)
        if recall:
            return self._state.model.classify(self.features.of(batch, epoch))
        seen = self._state.model.features(images)
        self.features.keep(seen, batch, epoch)
        return self._state.model.classify(seen)

    def _update(self, averages: bool) -> None:
        """From the summed gradients to new weights, unless one of the numbers is not finite: all stays then."""
        state, gradients = self._state, self.gradients
        total = torch.stack([buffer.sum() for buffer in gradients.buffers]).sum()  # not finite if any of them is not
        skip = ~total.isfinite()
        self._optimise(skip)
        state.statistics.flat.copy_(torch.where(skip, self._before, state.statistics.flat))
        state.sums.add(self._sums, skip)
        if state.average and averages:
            state.average.update(skip)
        self._found.copy_(torch.cat([skip.float()[None], gradients.notes[1:]]))

    def _optimise(self, skip: Tensor) -> None:
        optimiser = self._state.optimiser
        rates = capture.rates_from(self._numbers[4:].float(), optimiser) if self.captured else contextlib.nullcontext()
        with rates:
            if optimiser.defaults.get("fused"):  # it leaves everything as it is where found_inf is 1
                optimiser.found_inf = skip.float()  # type: ignore[attr-defined]
                optimiser.step()
            elif self.captured or self._device.type == "cuda":
                with unless(skip, [*self._trainable, *self._state.kept()]):
                    optimiser.step()
            elif not skip:
                optimiser.step()

    def _compile(self) -> None:
        """Each size of the images has code of its own; on GPUs the network is a CUDA graph, or part of the step's."""
        sizes = image_sizes(self._config.data.input_side, self._config.train.start_size)
        torch._dynamo.config.recompile_limit = RECOMPILES * len(sizes)  # torch.compile takes it from 2.12 on alone
        compiled: Callable[..., Any] = partial(torch.compile, dynamic=False)
        graphs = self._config.train.graphs and not self.captured  # torch's own, of the network alone
        self._network = compiled(self._state.model, mode="reduce-overhead" if graphs else "default")
        if self._device.type == "cuda":  # a CPU needs half a minute for it and gains nothing
            self._input = compiled(self._input)
            with self._state.precision.autocast(self._device):
                for module in self._state.model.modules():
                    if isinstance(module, Convolution):
                        module.prepare()

    @property
    def loss(self) -> Tensor:
        """Of the last step, the mean over all ranks, float32 []."""
        return self.gradients.notes[0]

    def gradient_norm(self) -> Tensor:
        """Of the last step's gradients, summed over all ranks, float32 []."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None])

    def fits(self, batch_size: int) -> bool:
        """Whether the memory is enough for a batch of so many images; nothing that it computes is of use afterwards."""
        torch.cuda.empty_cache()
        self.gradients.zero()
        try:
            side = self._config.data.image_size
            bands = len(self._state.model.bands)
            images = torch.zeros(batch_size, bands, side, side, device=self._device)
            with self._state.precision.autocast(self._device), self.gradients.no_sync():
                self._state.model(images.contiguous(memory_format=torch.channels_last)).sum().backward()
        except torch.OutOfMemoryError:
            return False
        return True

    def check(self) -> bool:
        """Whether a rank wanted the state kept, GPU_LAG steps ago on GPUs. On every rank alike.

        Raises Stopped if one was asked to stop, SharedError after too many skipped steps.
        """
        wanted = False
        for skipped, stop, keep in self._findings.read():
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if self._skipped_in_a_row == NON_FINITE_STEPS:
                raise SharedError(
                    f"loss or gradient was not finite in {NON_FINITE_STEPS} steps in a row, up to step "
                    f"{self._state.step}: try a lower optim.lr",
                    status=1,
                )
            if stop:
                raise Stopped
            wanted |= keep > 0
        return wanted

    def _losses(self, log_probabilities: Tensor, batch: Batch, share: Tensor | None) -> Tensor:
        """Of each sample, float32 [B]; of one that keeps a share of itself, the rest by its partner's label."""
        smoothing = self._config.train.label_smoothing
        own = sample_losses(log_probabilities, batch.labels, self._class_weights, smoothing)
        if batch.partners is None or share is None:
            return own
        other = sample_losses(log_probabilities, batch.partners.labels, self._class_weights, smoothing)
        return other.lerp(own, share.to(own.dtype))

    def _prepare(self, batch: Batch, epoch: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """What the network is shown, and with partners the share that each sample keeps of itself."""
        drawn = self._config.train.seed, epoch, size, self._config.data
        if batch.partners is None:
            return self._input(batch.images, batch.indices, *drawn), None
        others = batch.partners
        mixed: tuple[Tensor, Tensor] = self._input(
            batch.images, batch.indices, others.images, others.indices, *drawn, *self._quantiles
        )
        return mixed


def _most_of(batch: Batch, share: Tensor | None) -> Tensor:
    """The class that each image shows most of, its own or its partner's: int64 [B]."""
    if batch.partners is None or share is None:
        return batch.labels
    return torch.where(share < 0.5, batch.partners.labels, batch.labels)


class _Findings:
    """Numbers on their way from the device to the host, which reads them `lag` steps later and so never waits.

    But where another rank hangs: this is then the place at which a GPU's host waits for it, within `waiting()`.
    """

    def __init__(self, lag: int, waiting: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._lag, self._waiting = lag, waiting
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, numbers: Tensor) -> None:
        event = None
        if not self._lag:
            numbers = numbers.clone()
        else:
            numbers = torch.empty(len(numbers), pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((numbers, event))

    def read(self) -> list[list[float]]:
        read = []
        while len(self._queue) > self._lag:
            numbers, event = self._queue.popleft()
            if event:
                with self._waiting():
                    event.synchronize()
            read.append(numbers.tolist())
        return read
