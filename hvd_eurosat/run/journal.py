"""All that rank 0 says and writes during a run; on every other rank the same calls do nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from hvd_eurosat import __version__
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import Images
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import Tree, split_of
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.run.directory import RunDirectory
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.examples import EXAMPLES, write_examples
from hvd_eurosat.run.outfile import Outfile
from hvd_eurosat.run.page import write_page
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.run.signs import Signs
from hvd_eurosat.run.status import FAILURE, leave_failure, read_failure
from hvd_eurosat.run.timer import Timer
from hvd_eurosat.training.calibration import Calibration
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.copies import whole
from hvd_eurosat.training.inference import Values
from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from hvd_eurosat.training.stragglers import slow_ranks
from hvd_eurosat.training.trained_on import note_images

LOCK_SECONDS = 180.0  # a shared disk keeps the lock of a lost host's rank 0 for a while (NFS: 90 s)
REGROUPING = ("HorovodInternalError", "HostsUpdatedInterrupt")  # Horovod's, when ranks are lost or join
MOMENT = 0.5  # seconds, in which rank 0 has written a page that it had begun
COMMIT_SECONDS = 10.0  # of work, which an elastic job may lose with a rank
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
        self._signs: Signs | None = None
        self._reached: dict[str, int] = {}
        self._outfile: Outfile | None = None
        self._commit_timer = Timer(COMMIT_SECONDS if world.is_elastic else 0)
        self._save_timer = Timer(config.run.checkpoint_seconds)
        self._save_is_due = False

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
        self._train_images = len(self._tree.files("train"))
        hosts = Counter(self._world.gather(socket.gethostname()))
        self._world.together(lambda: self._begin(start, first, header, hosts))
        self._world.last_words(self._config.run.path / FAILURE)
        if start:
            between = f", step {start.step}" if start.samples else ""
            self.display.say(f"resuming after epoch {start.epoch}{between}")
        elif self._config.model.weights == "none" and self._config.model.trainable != "all":
            self.display.warn("the convolutions are random and do not train: give --model.weights, or train all")
        valid, shard = len(self._tree.files("valid")), self._train_images // self._world.size
        alone = self._config.valid.ranks(self._world.size, self._world.device.type) < self._world.size
        if valid > VALIDATION_SHARE * shard and alone:
            waste = f"a rank trains on {shard:,} images an epoch, then waits for rank 0 to validate {valid:,}"
            self.display.warn(f"{waste}: with --valid.sharded true all ranks validate")

    def _begin(
        self, start: Checkpoint | None, first: Checkpoint | None, header: Mapping[str, str], hosts: Mapping[str, int]
    ) -> None:
        if not self._files or not first:
            return
        self._files.check_space(first.size_on_disk(copies=self._config.run.keep + 2))
        self._files.begin(start)
        note_images(self._files.checkpoints.folder, self._tree)
        if not start:
            self._files.record("start", 0, step=0, world_size=self._world.size, version=__version__)
        if self._config.run.outfile:
            before = max((event["step"] for event in self._files.events("train")), default=0)
            self._outfile = Outfile(self._config.run.outfile, first.epoch, first.step - before)
        stop_at_once = self._config.run.on_save_error == "stop"
        self._saver = Saver(self._files.checkpoints, stop_at_once, self.display.warn)
        self._signs = Signs(self._files.path, self._config, self.display.warn)
        self._signs.begin(start is not None, first.epoch, **self._facts(first, header, hosts))

    def _facts(self, first: Checkpoint, header: Mapping[str, str], hosts: Mapping[str, int]) -> dict[str, Any]:
        """What the run's signs of life say of it from the beginning on."""
        return {
            "phase": "training",
            "epoch": min(first.epoch + 1, self._config.train.epochs),
            "epochs": self._config.train.epochs,
            "step": first.step,
            "samples": first.samples,
            "world_size": self._world.size,
            "hosts": dict(hosts),
            "header": dict(header),
            "preparing_seconds": process_seconds(),
            "classes": list(self._tree.classes),
            "synthetic": self._tree.synthetic,
            "images": {split: len(self._tree.files(split)) for split in SPLITS},
            "split": split_of(self._tree),
            "skipped_steps": 0,
        } | self._results()

    def _results(self) -> dict[str, Any]:
        """Of the epochs that are complete."""
        events = self._files.events("valid") if self._files else []
        if not events:
            return {}
        best = max(events, key=lambda event: float(event["accuracy"]))
        accuracies = {"valid_accuracy": events[-1]["accuracy"], "best_valid_accuracy": best["accuracy"]}
        return {**accuracies, "best_epoch": best["epoch"]}

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """An epoch (from 1) of training, of which so many steps are left; the seconds of its earlier part count."""
        self._began, self._carried = time.perf_counter() - self._carried, 0.0
        self._ended: float | None = None
        self._steps, self._epoch_began = steps, time.perf_counter()
        self.display.begin(epoch, self._config.train.epochs, steps)
        if self._signs:
            self._signs.tell(phase="training", epoch=epoch)

    def stepped(self, number: int, step: Step, state: TrainingState, samples: int) -> None:
        """After step `number` and `samples` samples since begin_epoch: progress, now and then, of rank 0's shard."""
        self._reached = {"step": state.step, "samples": state.samples}
        if self._outfile:
            rate = state.optimiser.param_groups[0]["lr"]
            self._outfile.stepped(state.epoch + 1, step.loss.clone(), step.gradient_norm(), rate)
        if self.display.is_due():
            self.display.progress(number, state.sums, samples)
        if self._signs and self._signs.is_due():
            self._signs.tell(**self._progress(number, state, samples))

    def _progress(self, number: int, state: TrainingState, samples: int) -> dict[str, Any]:
        """What status.json says of an epoch in progress."""
        seconds = time.perf_counter() - self._epoch_began
        rate = samples / seconds
        epochs = self._config.train.epochs - state.epoch - 1
        left = seconds / number * (self._steps - number) + epochs * self._train_images / rate
        validations = [event.get("seconds", 0.0) for event in self._files.events("valid")] if self._files else []
        left += (epochs + 1) * (validations[-1] if validations else 0.0)
        return {
            "step": state.step,
            "samples": state.samples,
            "loss": state.sums.loss,
            "accuracy": state.sums.accuracy,
            "learning_rate": state.optimiser.param_groups[0]["lr"],
            "images_per_second": rate,
            "seconds_left": left,
        }

    def trained(self, samples: int, ranks: Sequence[tuple[str, float]]) -> None:
        """The end of an epoch of training, of so many samples. ranks: host and seconds of work of each."""
        self.display.end()
        self._ended = time.perf_counter()
        self._stragglers, self._samples = slow_ranks(ranks), samples
        if self._signs:
            steps = max(self._steps, 1)
            work = [{"rank": n, "host": host, "step_seconds": s / steps} for n, (host, s) in enumerate(ranks)]
            self._signs.tell(phase="validation", ranks=work)

    def _seconds(self) -> float:
        """Of training in this epoch so far, over all starts of the run."""
        return (self._ended or time.perf_counter()) - self._began

    def _with_history(self, state: Checkpoint, history: list[dict[str, Any]]) -> Checkpoint:
        """The state as it is saved."""
        return dataclasses.replace(state, history=history, seconds=self._seconds() if state.samples else 0.0)

    def validated(self, epoch: int, step: int, learning_rate: float, sums: Sums, validation: Evaluation) -> None:
        """An epoch (from 1) is complete: `sums` of its training over all ranks, and its validation. Collective."""
        validating = time.perf_counter() - (self._ended or self._began)
        if self._files:
            self._note(self._files, epoch, step, learning_rate, sums, validation, validating)
        self._wait_for_saver(self._waits(epoch))

    def _note(
        self,
        files: RunDirectory,
        epoch: int,
        step: int,
        learning_rate: float,
        sums: Sums,
        validation: Evaluation,
        validating: float,
    ) -> None:
        """An epoch in the files and on the terminal. validating: seconds."""
        facts = {"loss": sums.loss, "accuracy": sums.accuracy, "learning_rate": learning_rate}
        seconds = self._seconds()
        times = {"images_per_second": self._samples / seconds, "seconds": seconds, "stragglers": self._stragglers}
        files.record("train", epoch, step=step, skipped_steps=sums.skipped, **facts, **times)
        for one in self._stragglers:
            slower = f"{100 * one['slower']:.0f} % slower than the other ranks"
            self.display.warn(f"rank {one['rank']} ({one['host']}) was {slower} in epoch {epoch}")
        if sums.skipped:
            self.display.warn(f"{sums.skipped} steps of epoch {epoch} were skipped: loss or gradients were not finite")
        files.record("valid", epoch, step=step, seconds=validating, **validation.event())
        if self._signs:
            skipped = sum(event.get("skipped_steps", 0) for event in files.events("train"))
            facts |= {"images_per_second": self._samples / seconds}
            self._signs.tell(step=step, samples=self._samples, skipped_steps=skipped, **facts, **self._results())
            self._signs.draw()
        if self._outfile:
            self._outfile.validated(epoch, validation)
        trained = files.events("train")[-1]
        self.display.epoch(self._config.train.epochs, trained, validation, files.last_is_best())

    def save(self, state: Checkpoint | None) -> None:
        """A checkpoint, in the background, which carries the history up to and with itself.

        At the end of an epoch: every checkpoint_interval, at the best so far and at the end. Left out if the one before
        is still being written, for which all ranks would wait in silence; where it must not be, they have waited.
        Raises NotFiniteError of a state that nobody writes, too.
        """
        if not self._files or not self._saver or not state:
            return
        if self._outfile:
            self._outfile.flush()
        is_due = bool(state.samples) or self._is_due(state.epoch)
        if is_due and not state.samples:
            self._files.record("checkpoint", state.epoch, step=state.step)
        if is_due and not self._saver.is_busy:
            self._save_timer.start()
            self._save_is_due = False
            self._saver.save(self._with_history(state, self._files.history()))
        else:
            whole(state)

    def _is_due(self, epoch: int) -> bool:
        """Whether the checkpoint of an epoch that ends is to be written. On rank 0."""
        return self._is_needed(epoch) or epoch % self._config.run.checkpoint_interval == 0

    def _is_needed(self, epoch: int) -> bool:
        """Whether it is the best so far or the last."""
        is_best = self._files is not None and self._files.last_is_best()
        return is_best or epoch == self._config.train.epochs

    def _waits(self, epoch: int) -> bool:
        """Whether an epoch waits for the checkpoint before to be written: always on cores, where a save is the shorter.

        On GPUs if it must not be left out itself: it is needed, or kept for good.
        """
        for_good = self._config.run.numbered_checkpoints is not None and self._is_due(epoch)
        return self._world.device.type == "cpu" or self._is_needed(epoch) or for_good

    def wants_state(self) -> bool:
        """Whether rank 0's clock asks all ranks for the state, which `keep` is given some steps later."""
        if not self._files:
            return False
        commits, saves = self._commit_timer.rings(), self._save_timer.rings()
        self._save_is_due |= saves
        return commits or saves

    def keep(self, state: Checkpoint | None) -> None:
        """The state within an epoch: saved by run.checkpoint_steps or _seconds, and committed. Collective."""
        every = self._config.run.checkpoint_steps
        if state and (self._save_is_due or (every and state.step % every == 0)):
            self.save(state)
        self.commit(state)

    def commit(self, state: Checkpoint | None) -> None:
        """Where ranks may be lost or join, keep the state in memory, with the history so far. Collective."""
        if self._world.is_elastic and state:
            self._commit_timer.start()
            history = self._world.from_main(self._files.history() if self._files else [])
            self._world.commit(self._with_history(whole(state), history))

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
        if self._signs and state:
            self._signs.end(state="stopped", step=state.step, samples=state.samples, seconds_left=None)
        if self._files and state:
            self.display.say(
                f"stopped on request at step {state.step}, saved in {self._files.path}; start again to resume"
            )

    def _wait_for_saver(self, waits: bool = True) -> None:
        """Until nothing is being written, if rank 0 waits for it, of which the others hear. Collective."""

        def wait() -> None:
            if self._saver and (waits or not self._saver.is_busy):  # where it is not busy, to hear of its errors
                self._saver.wait(self._world.tick)

        self._world.together(wait)

    def best_model(self) -> dict[str, Tensor]:
        """What of the best checkpoint's state dict is not frozen, on every rank, for the test. Collective."""
        self._testing = time.perf_counter()
        if self._signs:
            self._signs.tell(phase="test", seconds_left=None)
        return self._world.on_main(self._best_model)

    def _best_model(self) -> dict[str, Tensor]:
        return self._files.checkpoints.best_model(self.display.warn) if self._files else {}

    def calibrated(self, calibration: Calibration) -> None:
        """Keep the temperatures with the best checkpoint. Collective."""
        self._world.together(lambda: self._files.calibrated(calibration) if self._files else None)
        before, after = calibration.before, calibration.after
        self.display.say(
            f"temperature {calibration.temperatures[self._config.valid.views]:.3f}: validation calibration error "
            f"{100 * before.calibration_error:.2f}% -> {100 * after.calibration_error:.2f}%, "
            f"loss {before.loss:.4f} -> {after.loss:.4f}"
        )

    def temperature(self) -> float:
        """Of the best checkpoint, for valid.views. Collective."""
        views = self._config.valid.views
        return self._world.on_main(lambda: self._files.checkpoints.temperature(views) if self._files else 1.0)

    def failed(self, error: BaseException) -> None:
        """The run ends by an error of this rank, or of all: where status.json and the page say so, others can see why.

        A rank that fails alone leaves a note, because rank 0 is ended before it knows.
        """
        lost = type(error).__name__ in REGROUPING
        folder = self._config.run.path
        if self._signs and lost and self._world.is_elastic:
            self._signs.end(phase="waiting for ranks")
        elif self._signs:
            noted = read_failure(folder)
            words = noted["error"] if noted else self._words(error)
            self._signs.end(state="failed", error=words, seconds_left=None, **self._reached)
        elif not (self._world.is_main or lost or isinstance(error, SharedError)):
            leave_failure(folder, self._words(error))
            with contextlib.suppress(Exception):  # the job ends by another error than this
                if self._config.run.page:
                    write_page(folder)
                    time.sleep(MOMENT)  # rank 0 may have been writing another, which knows nothing of it
                    write_page(folder)

    def _words(self, error: BaseException) -> str:
        """The error, and of which rank it is where not of all."""
        text = str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}"
        if type(error).__name__ in REGROUPING:
            text = "lost the other ranks"
        if self._world.size == 1 or isinstance(error, SharedError):
            return text
        return f"{text} (rank {self._world.rank} on {socket.gethostname()})"

    def close(self) -> None:
        """Let another job, or this one once its ranks have changed, use the directory."""
        self.display.end()
        if self._signs:
            self._signs.end()
        if self._saver:
            self._saver.close()
        if self._files:
            self._files.close()

    def show_examples(self, values: Values | None, images: Images) -> None:
        """Keep the test images worth a look for the page. values: log-probabilities [N, C], on rank 0.

        Not to be able to is no reason to fail.
        """
        best = self._files.checkpoints.best() if self._files else None
        if not self._files or values is None or best is None or not self._config.run.page:
            return
        names = [name.removeprefix("test/") for name in self._tree.files("test")]
        pixels, labels = images.images.cpu().numpy(), images.labels.cpu().numpy()
        try:
            pixels = self._tree.inputs.picture(pixels)
            write_examples(self._files.path / EXAMPLES, names, values, labels, pixels, best.epoch)
        except Exception as error:
            self.display.warn(f"the page is without images: {error}")

    def finish(self, test: Evaluation, facts: Mapping[str, Any]) -> None:
        """The test result: in the plots, in summary.json and, last, on the terminal. Collective."""
        self._world.together(lambda: self._finish(test, facts))
        self.display.result("test", test, self._tree.classes)

    def _finish(self, test: Evaluation, facts: Mapping[str, Any]) -> None:
        if not self._files:
            return
        self._files.finish(test, time.perf_counter() - self._testing, facts, self._tree)
        if self._signs:
            self._signs.end(state="done", phase="done", seconds_left=None, test_accuracy=test.accuracy)


def process_seconds() -> float:
    """Since this process was started: what it took to get ready, once the first step begins."""
    import psutil

    return time.time() - float(psutil.Process().create_time())
