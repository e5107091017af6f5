"""The files of a run: config.toml, metrics.jsonl, summary.json, checkpoints/, tensorboard/, plots/.

What shows a run to people and to other machines while it goes on, status.json and index.html, is in signs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.tree import Tree, split_of
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.run import outfile, plots
from hvd_eurosat.run.predictions import CSV, HDF5
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.calibration import Calibration
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.files import free_name, make_folder, write_text
from hvd_eurosat.training.lock import FolderLock
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.scores import macro_f1, wilson
from hvd_eurosat.weights.stored import named

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Event = dict[str, Any]
OUTSIDE = ("numbered_checkpoints", "predictions", "outfile")


class RunDirectory:
    """Rank 0's files, which one job at a time may use.

    Opening it creates the folders; raises UserError where it cannot write, or another job has it open and goes on to
    have it for `patience` seconds, in which `tick` is called.
    """

    def __init__(
        self, config: Config, report: Callable[[str], None], patience: float, tick: Callable[[], None]
    ) -> None:
        self.path = config.run.path
        run = config.run
        self.checkpoints = CheckpointFolder(
            self.path / "checkpoints", run.keep, run.numbered_checkpoints, run.checkpoint_interval
        )
        self._config = config
        self._report = report
        self._history: list[Event] = []
        self._tensorboard: SummaryWriter | None = None
        self._calibration: dict[str, Any] = {}
        self._patience, self._tick = patience, tick
        self._open()

    def _open(self) -> None:
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
            self._lock = FolderLock(self.path, self._report)
            self._take_lock()
            for partial in self.checkpoints.folder.glob(".*"):  # of a job that was killed while it saved
                if partial.is_file():
                    partial.unlink()
        except OSError as error:
            raise UserError(f"run.dir {self.path}: {error.strerror}") from None

    def _take_lock(self) -> None:
        began = time.monotonic()
        while not self._lock.try_take():
            if time.monotonic() - began >= max(self._patience, self._lock.patience):
                owner = self._lock.owner()
                self._lock.close()
                raise UserError(f"run.dir {self.path} is in use by another job ({owner}): wait, or give another")
            self._tick()
            time.sleep(0.5)

    def start(self, config: Config, tree: Tree) -> Checkpoint | None:
        """The checkpoint that `run.resume` means, if any. An earlier run that it does not go on with is set aside.

        So is what lies where this run writes outside of its folder. Raises UserError where it cannot write there.
        """
        resume = config.run.resume
        if resume == "auto":
            start = self.checkpoints.newest(self._report, config.model.weights)
        elif resume != "never":
            start = checkpoint.load_mended(Path(resume).expanduser(), self._report, config.model.weights)
        else:
            start = None
        if start:
            start.check_resumable(config, tree.classes, tree.digest)
        goes_on = start is not None and (resume == "auto" or self._is_newest(Path(resume).expanduser()))
        if goes_on and self.finished_epochs() >= config.train.epochs:
            return start
        self._make_folders()
        if not goes_on:
            self._set_aside()
            self._set_outside_aside()
        return start

    def _make_folders(self) -> None:
        for key in OUTSIDE:
            if place := getattr(self._config.run, key):
                make_folder(place.parent if key == "outfile" else place, f"run.{key}")

    def _is_newest(self, path: Path) -> bool:
        records = self.checkpoints.records()
        return bool(records) and self.checkpoints.path(records[-1]).resolve() == named(path).resolve()

    def _holds_a_run(self) -> bool:
        """More than the first lines of one that was killed before it saved anything."""
        metrics = self.path / "metrics.jsonl"
        known = metrics.exists() and len(metrics.read_bytes().splitlines()) > 1
        return known or (self.path / "summary.json").exists() or any(self.checkpoints.folder.glob("epoch-*"))

    def _set_aside(self) -> None:
        if not self._holds_a_run():
            return
        old = free_name(self.path)
        try:
            self.path.rename(old)
        except OSError as error:
            raise UserError(f"cannot set run.dir {self.path} aside as {old}: {error.strerror}") from None
        self._lock.close()
        self._report(f"the earlier run is now in {old}")
        self._open()
        self._make_folders()  # which may have been within run.dir

    def _set_outside_aside(self) -> None:
        """What another run left outside of run.dir goes into a folder earlier.1, earlier.2, ... beside it."""
        numbered, predictions, logs = (getattr(self._config.run, key) for key in OUTSIDE)
        if numbered:
            self._move_aside(sorted(numbered.glob("model_checkpoint_*")))
        if predictions:
            self._move_aside([predictions / HDF5, predictions / CSV])
        if logs:  # copied, for those of a run that begins with another's checkpoint are cut off there
            self._move_aside(outfile.filled(logs), copied=True)

    def _move_aside(self, files: Sequence[Path], copied: bool = False) -> None:
        """Within their folder, which may be a mounted one. What this run begins with is left there as well."""
        there = [path for path in files if path.exists()]
        if not there:
            return
        given = [Path(path).expanduser() for path in (self._config.model.weights, self._config.run.resume)]
        begun = {path.with_suffix(suffix).resolve() for path in given for suffix in (".pt", ".json")}
        aside = free_name(there[0].with_name("earlier"))
        try:
            aside.mkdir()
            for path in there:
                (shutil.copy2 if copied or path.resolve() in begun else shutil.move)(path, aside / path.name)
        except OSError as error:
            raise UserError(f"cannot set {there[0]} aside in {aside}: {error.strerror}") from None
        self._report(f"what an earlier run left in {aside.parent} is now in {aside}")

    def check_space(self, wanted: int) -> None:
        """Raise UserError unless the disk has room for so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < wanted:
            room = f"{free / 1e6:,.0f} MB free, {wanted / 1e6:,.0f} MB wanted"
            raise UserError(f"run.dir {self.path}: {room}: make room, or give another run.dir or a smaller run.keep")

    def close(self) -> None:
        """Another job may use the directory."""
        self._lock.close()

    def finished_epochs(self) -> int:
        """The epochs of the run that was completed here; 0 if none was."""
        try:
            return int(json.loads((self.path / "summary.json").read_text())["epochs"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.path / 'summary.json'}: unreadable; remove it to run again") from None

    def tested(self) -> Evaluation:
        """The test of the run that was completed here."""
        try:
            lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
            test = next(line for line in reversed(lines) if line["event"] == "test")
            bins = torch.tensor(test["reliability"], dtype=torch.float64)
            return Evaluation(float(test["loss"]), torch.tensor(test["confusion"]), bins)
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            raise UserError(f"{self.path / 'metrics.jsonl'}: unreadable; remove summary.json to test again") from None

    def begin(self, start: Checkpoint | None) -> None:
        """Write config.toml, and cut metrics.jsonl back to the start, so that it reads as one undisturbed run."""
        self._history = list(start.history) if start else []
        (self.path / "summary.json").unlink(missing_ok=True)
        write_text(self.path / "config.toml", self._config.to_toml())
        self._write_history()
        if start:
            self.checkpoints.cut(start.step)
            self.checkpoints.add(start)
        from torch.utils.tensorboard import SummaryWriter

        epoch = self._history[-1]["epoch"] if self._history else -1
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch + 1)

    def record(self, event: str, epoch: int, **values: Any) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars. What cannot be written is reported, and kept."""
        self._history.append({"event": event, "epoch": epoch, **values})
        try:
            self._write_history()
        except RunError as error:
            self._report(f"{error}; it is tried again with the next event")
        with self._tensorboard_or_none() as tensorboard:
            for name, value in values.items():
                if tensorboard and isinstance(value, float):
                    tensorboard.add_scalar(f"{name}/{event}", value, epoch)
            if tensorboard:
                tensorboard.flush()

    @contextlib.contextmanager
    def _tensorboard_or_none(self) -> Any:
        """TensorBoard's writer until it first fails."""
        try:
            yield self._tensorboard
        except Exception as error:  # its own thread's, of whatever kind
            self._report(f"no more TensorBoard events: {error}")
            self._tensorboard = None

    def _write_history(self) -> None:
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in self._history))

    def history(self) -> list[Event]:
        """The events so far."""
        return list(self._history)

    def events(self, event: str) -> list[Event]:
        """The events of one kind so far, oldest first."""
        return [line for line in self._history if line["event"] == event]

    def last_is_best(self) -> bool:
        """Whether the last validation, if there was one, is better than all before it."""
        accuracies = [event["accuracy"] for event in self.events("valid")]
        return bool(accuracies) and accuracies[-1] > max(accuracies[:-1], default=-1.0)

    def cannot_be_had(self) -> list[str]:
        """Of a finished run: numbered checkpoints and logs that are wanted, missing, and no longer to be made."""
        run = self._config.run
        lacking = []
        if run.numbered_checkpoints:
            make_folder(run.numbered_checkpoints, "run.numbered_checkpoints")
            self.checkpoints.copy_numbered()
            epochs = range(run.checkpoint_interval, self.finished_epochs() + 1, run.checkpoint_interval)
            missing = [epoch for epoch in epochs if not self.checkpoints.numbered_path(epoch).exists()]
            if missing:
                lacking.append(f"{len(missing)} of {len(epochs)} run.numbered_checkpoints")
        if run.outfile and not outfile.filled(run.outfile):
            lacking.append("run.outfile")
        return lacking

    def calibrated(self, calibration: Calibration) -> None:
        """Keep temperatures, and what they did, until the end."""
        self.checkpoints.calibrate_best(calibration.temperatures)
        self._calibration = {
            "temperatures": calibration.temperatures,
            "valid_loss": [calibration.before.loss, calibration.after.loss],
            "valid_calibration_error": [calibration.before.calibration_error, calibration.after.calibration_error],
            "valid_reliability": [calibration.before.bins.tolist(), calibration.after.bins.tolist()],
        }

    def finish(self, test: Evaluation, took: float, facts: Mapping[str, Any], tree: Tree) -> None:
        """The plots, and last of all summary.json. took: seconds of the test."""
        trained, validated = self.events("train"), self.events("valid")
        best = self.checkpoints.best()
        if best is None:
            raise RunError(f"no validated checkpoint in {self.checkpoints.folder}")
        seconds = sum(event["seconds"] for event in trained)
        self.record("test", best.epoch, seconds=took, **test.event(), **self._calibration)
        plots.learning_curves(self._history, self.path / "plots" / "learning_curves.png")
        title = f"{self.path.name}{' (synthetic sample)' if tree.synthetic else ''}: {test.line('test')}"
        plots.confusion_matrix(
            test.confusion.numpy(), tree.classes, self.path / "plots" / "confusion_matrix.png", title
        )
        plots.reliability(plots.reliability_curves(self._history), self.path / "plots" / "reliability.png", title)
        summary = {
            "test_accuracy": test.accuracy,
            "test_interval": wilson(test.correct, test.count),
            "test_macro_f1": macro_f1(test.confusion),
            "test_loss": test.loss,
            "test_calibration_error": test.calibration_error,
            "valid_accuracy": validated[-1]["accuracy"],
            "best_valid_accuracy": best.metric,
            "best_epoch": best.epoch,
            "epochs": trained[-1]["epoch"],
            **facts,
            "images_per_second": sum(e["images_per_second"] * e["seconds"] for e in trained) / seconds,
            "seconds": seconds,
            "skipped_steps": sum(event["skipped_steps"] for event in trained),
            **{key: value for key, value in self._calibration.items() if key != "valid_reliability"},
            "stragglers": [{"epoch": e["epoch"], **one} for e in trained for one in e.get("stragglers", [])],
            "synthetic": tree.synthetic,
            "split": split_of(tree),
            "classes": list(tree.classes),
        }
        self.record("end", trained[-1]["epoch"])
        with self._tensorboard_or_none() as tensorboard:
            if tensorboard:
                tensorboard.close()
        self._write_history()
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
