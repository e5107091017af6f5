"""All that rank 0 says and writes during a run; on every other rank the same calls do nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvd_eurosat import __version__
from hvd_eurosat.cluster import World
from hvd_eurosat.config import Config
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import RunError
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.display import Display
from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.run_directory import RunDirectory


class Journal:
    """A run's display and directory. Making one creates the folders and refuses an unwritable place. Collective."""

    def __init__(self, world: World, config: Config, tree: Tree) -> None:
        self._world = world
        self._config = config
        self._tree = tree
        self.display = Display(world.is_main)
        self._files = world.together(lambda: RunDirectory(config) if world.is_main else None)

    def find_start(self) -> Checkpoint | None:
        """The checkpoint to go on from, on every rank, by `run.resume`. Collective."""
        return self._world.on_main(self._find_start)

    def _find_start(self) -> Checkpoint | None:
        start = self._files.start(self._config.run.resume) if self._files else None
        if start:
            start.check_resumable(self._config, self._tree.classes, self._tree.digest)
        return start

    def is_finished(self) -> bool:
        """Whether the run was completed before, with as many epochs; if so, shows its result. Collective."""
        finished = bool(self._files and self._files.finished_epochs() >= self._config.train.epochs)
        if self._files and finished:
            self.display.say(f"{self._files.path} holds a finished run; raise train.epochs to go on")
            self.display.result("test", self._files.tested(), self._tree.classes)
        return self._world.from_main(finished)

    def begin(self, start: Checkpoint | None, header: Mapping[str, str]) -> None:
        """From here on the run directory is this run's; its history is cut back to the checkpoint."""
        self.display.header(header)
        if self._files:
            self._files.begin(start)
            if not start:
                self._files.record("start", 0, step=0, world_size=self._world.size, version=__version__)
        if start:
            self.display.say(f"resuming after epoch {start.epoch}")
        elif self._config.model.weights == "none" and self._config.model.trainable != "all":
            self.display.warn("the convolutions are frozen as random numbers: give --model.weights, or train all")

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """An epoch (from 1) of training."""
        self.display.begin(epoch, self._config.train.epochs, steps)

    def stepped(self, step: int, sums: Sums) -> None:
        """Progress, now and then, from the sums of rank 0's shard."""
        if self.display.is_due():
            self.display.progress(step, sums, self._world.size)

    def trained(self, epoch: int, step: int, sums: Sums, learning_rate: float, seconds: float) -> None:
        """The end of an epoch (from 1) of training, with the sums over all ranks."""
        self.display.end()
        if not math.isfinite(sums.loss):
            raise RunError(f"the loss of epoch {epoch} is not finite: try a lower optim.lr")
        if self._files:
            self._files.record(
                "train",
                epoch,
                step=step,
                loss=sums.loss,
                accuracy=sums.accuracy,
                learning_rate=learning_rate,
                images_per_second=sums.samples / seconds,
                seconds=seconds,
            )

    def validated(self, state: Checkpoint, validation: Evaluation) -> None:
        """An epoch's validation; a checkpoint every checkpoint_interval, at the best so far and at the end."""
        if not self._files:
            return
        is_best = validation.accuracy > self._files.best_accuracy()
        self._files.record("valid", state.epoch, step=state.step, **validation.event())
        self.display.epoch(self._config.train.epochs, self._files.events("train")[-1], validation, is_best)
        due = state.epoch % self._config.run.checkpoint_interval == 0 or state.epoch == self._config.train.epochs
        if due or is_best:
            self._files.save(state)

    def best_checkpoint(self) -> Checkpoint | None:
        """The best checkpoint, on rank 0 alone."""
        return self._files.best_checkpoint() if self._files else None

    def finish(self, test: Evaluation, facts: Mapping[str, Any]) -> None:
        """The test result: in the plots, in summary.json and, last, on the terminal."""
        if self._files:
            self._files.finish(test, facts, self._tree)
            self.display.result("test", test, self._tree.classes)
