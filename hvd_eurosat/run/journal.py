"""All that rank 0 says and writes during a run; on every other rank the same calls do nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from hvd_eurosat import __version__
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.run.directory import RunDirectory
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.outfile import Outfile
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step

LOCK_SECONDS = 180.0  # a shared disk keeps the lock of a lost host's rank 0 for a while (NFS: 90 s)
VALIDATION_SHARE = 2  # validating two images takes about as long as training on one, of bn+head


class Journal:
    """A run's display and directory. Making one creates the folders and refuses an unwritable place. Collective."""

    def __init__(self, world: World, config: Config, tree: Tree) -> None:
        self._world = world
        self._config = config
        self._tree = tree
        self.display = Display(world.is_main)
        self._committed = cast(Checkpoint | None, world.committed())
        self._files = world.together(self._open)
        self._saver: Saver | None = None
        self._outfile: Outfile | None = None

    def _open(self) -> RunDirectory | None:
        if not self._world.is_main:
            return None
        patience = LOCK_SECONDS if self._committed else 0.0
        return RunDirectory(self._config, self.display.warn, patience, self._world.tick)

    def find_start(self) -> Checkpoint | None:
        """What to go on from, on every rank: the last commit, or a checkpoint by `run.resume`. Collective."""
        if self._committed:
            return self._committed
        return self._world.on_main(lambda: self._files.start(self._config, self._tree) if self._files else None)

    def is_finished(self) -> bool:
        """Whether the run was completed before, with as many epochs. Collective."""
        wanted = self._config.train.epochs
        return self._world.on_main(lambda: self._files is not None and self._files.finished_epochs() >= wanted)

    def show_finished(self) -> None:
        """The result of a run that was completed before, and what is wanted now and cannot be had. Collective."""
        self._world.on_main(self._show_finished)

    def _show_finished(self) -> None:
        if not self._files:
            return
        self.display.say(f"{self._files.path} holds a finished run; raise train.epochs to go on")
        if lacking := self._files.cannot_be_had():
            self.display.warn(f"only training itself writes this, and it is over: {', '.join(lacking)}")
        self.display.result("test", self._files.tested(), self._tree.classes)

    def begin(self, start: Checkpoint | None, header: Mapping[str, str], first: Checkpoint | None) -> None:
        """From here on the run directory is this run's; its history is cut back to the checkpoint. Collective.

        first: the state as it will be saved, by which the room on the disk is checked.
        """
        self.display.header(header)
        self._carried = start.seconds if start else 0.0
        self._world.together(lambda: self._begin(start, first))
        if start:
            between = f", step {start.step}" if start.samples else ""
            self.display.say(f"resuming after epoch {start.epoch}{between}")
        elif self._config.model.weights == "none" and self._config.model.trainable != "all":
            self.display.warn("the convolutions are random and do not train: give --model.weights, or train all")
        valid, shard = len(self._tree.files("valid")), len(self._tree.files("train")) // self._world.size
        if valid > VALIDATION_SHARE * shard and not self._config.valid.sharded and self._world.size > 1:
            waste = f"a rank trains on {shard:,} images an epoch, then waits for rank 0 to validate {valid:,}"
            self.display.warn(f"{waste}: with --valid.sharded true all ranks validate")

    def _begin(self, start: Checkpoint | None, first: Checkpoint | None) -> None:
        if not self._files or not first:
            return
        self._files.check_space(first.size_on_disk(copies=self._config.run.keep + 2))
        self._files.begin(start)
        if not start:
            self._files.record("start", 0, step=0, world_size=self._world.size, version=__version__)
        if self._config.run.outfile:
            before = max((event["step"] for event in self._files.events("train")), default=0)
            self._outfile = Outfile(self._config.run.outfile, first.epoch, first.step - before)
        stop_at_once = self._config.run.on_save_error == "stop"
        self._saver = Saver(self._files.checkpoints, stop_at_once, self.display.warn)

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """An epoch (from 1) of training, of which so many steps are left; the seconds of its earlier part count."""
        self._began, self._carried = time.perf_counter() - self._carried, 0.0
        self._ended: float | None = None
        self.display.begin(epoch, self._config.train.epochs, steps)

    def stepped(self, number: int, step: Step, state: TrainingState, samples: int) -> None:
        """After step `number` and `samples` samples since begin_epoch: progress, now and then, of rank 0's shard."""
        if self._outfile:
            rate = state.optimiser.param_groups[0]["lr"]
            self._outfile.stepped(state.epoch + 1, step.loss.clone(), step.gradient_norm(), rate)
        if self.display.is_due():
            self.display.progress(number, state.sums, samples)

    def trained(self, samples: int, stragglers: list[dict[str, Any]]) -> None:
        """The end of an epoch of training, of so many samples."""
        self.display.end()
        self._ended = time.perf_counter()
        self._stragglers, self._samples = stragglers, samples

    def _seconds(self) -> float:
        """Of training in this epoch so far, over all starts of the run."""
        return (self._ended or time.perf_counter()) - self._began

    def _with_history(self, state: Checkpoint, history: list[dict[str, Any]]) -> Checkpoint:
        """The state as it is saved."""
        return dataclasses.replace(state, history=history, seconds=self._seconds() if state.samples else 0.0)

    def validated(self, epoch: int, step: int, learning_rate: float, sums: Sums, validation: Evaluation) -> None:
        """An epoch (from 1) is complete: `sums` of its training over all ranks, and its validation. Collective."""
        self._wait_for_saver()
        if not self._files:
            return
        facts = {"loss": sums.loss, "accuracy": sums.accuracy, "learning_rate": learning_rate}
        seconds = self._seconds()
        times = {"images_per_second": self._samples / seconds, "seconds": seconds, "stragglers": self._stragglers}
        self._files.record("train", epoch, step=step, skipped_steps=sums.skipped, **facts, **times)
        for one in self._stragglers:
            slower = f"{100 * one['slower']:.0f} % slower than the other ranks"
            self.display.warn(f"rank {one['rank']} ({one['host']}) was {slower} in epoch {epoch}")
        if sums.skipped:
            self.display.warn(f"{sums.skipped} steps of epoch {epoch} were skipped: loss or gradients were not finite")
        self._files.record("valid", epoch, step=step, **validation.event())
        if self._outfile:
            self._outfile.validated(epoch, validation)
        trained = self._files.events("train")[-1]
        self.display.epoch(self._config.train.epochs, trained, validation, self._files.last_is_best())

    def save(self, state: Checkpoint | None) -> None:
        """A checkpoint, in the background, which carries the history up to and with itself.

        At the end of an epoch: every checkpoint_interval, at the best so far and at the end. Within one: unless the
        one before is still being written, for which all ranks would wait in silence.
        """
        if not self._files or not self._saver or not state:
            return
        due = state.epoch % self._config.run.checkpoint_interval == 0 or state.epoch == self._config.train.epochs
        if self._outfile:
            self._outfile.flush()
        if state.samples and self._saver.is_busy:
            return
        if state.samples or due or self._files.last_is_best():
            if not state.samples:
                self._files.record("checkpoint", state.epoch, step=state.step)
            self._saver.save(self._with_history(state, self._files.history()))

    def commit(self, state: Checkpoint | None) -> None:
        """Where ranks may be lost or join, keep the state in memory, with the history so far. Collective."""
        if self._world.is_elastic and state:
            history = self._world.from_main(self._files.history() if self._files else [])
            self._world.commit(self._with_history(state, history))

    def saved(self) -> None:
        """Wait until the last checkpoint is on the disk. Collective."""
        self._world.together(lambda: self._saver.finish(self._world.tick) if self._saver else None)

    def stopped(self, state: Checkpoint | None) -> None:
        """The run was asked to stop: save, and say how it goes on. Collective."""
        self.display.end()
        self._wait_for_saver()
        if state and state.samples:
            self.save(state)
        self.saved()
        if self._files and state:
            self.display.say(
                f"stopped on request at step {state.step}, saved in {self._files.path}; start again to resume"
            )

    def _wait_for_saver(self) -> None:
        """Until nothing is being written, of which the other ranks hear. Collective."""
        self._world.together(lambda: self._saver.wait(self._world.tick) if self._saver else None)

    def best_model(self) -> dict[str, Tensor]:
        """What of the best checkpoint's state dict is not frozen, on every rank. Collective."""
        return self._world.on_main(self._best_model)

    def _best_model(self) -> dict[str, Tensor]:
        return self._files.checkpoints.best_model(self.display.warn) if self._files else {}

    def close(self) -> None:
        """Let another job, or this one once its ranks have changed, use the directory."""
        self.display.end()
        if self._saver:
            self._saver.close()
        if self._files:
            self._files.close()

    def finish(self, test: Evaluation, facts: Mapping[str, Any]) -> None:
        """The test result: in the plots, in summary.json and, last, on the terminal. Collective."""
        self._world.together(lambda: self._files.finish(test, facts, self._tree) if self._files else None)
        self.display.result("test", test, self._tree.classes)
