"""The files of a run: config.toml, metrics.jsonl, summary.json, checkpoints/, tensorboard/, plots/."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from hvd_eurosat.config import Config
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.training import checkpoint, plots
from hvd_eurosat.training.checkpoint import Checkpoint, CheckpointFolder
from hvd_eurosat.training.files import make_folder, write_text
from hvd_eurosat.training.metrics import Evaluation

Event = dict[str, Any]


class RunDirectory:
    """Rank 0's files. Opening it creates the folders; raises UserError where it cannot write."""

    def __init__(self, config: Config) -> None:
        self.path = config.run.path
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", config.run.keep)
        self._config = config
        self._history: list[Event] = []
        self._make_folders()

    def _make_folders(self) -> None:
        run = self._config.run
        for key in ("numbered_checkpoints", "predictions"):
            if folder := getattr(run, key):
                make_folder(folder, f"run.{key}")
        if run.outfile:
            make_folder(run.outfile.parent, "run.outfile")
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
            write_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()
            for partial in self.checkpoints.folder.glob(".epoch-*"):  # of a job that was killed while it saved
                partial.unlink()
        except (OSError, RunError) as error:
            raise UserError(f"run.dir {self.path}: {error}") from None

    def _set_aside(self) -> None:
        if not (self.path / "metrics.jsonl").exists():
            return
        number = next(n for n in range(1, 10**6) if not Path(f"{self.path}.{n}").exists())
        old = self.path.rename(f"{self.path}.{number}")
        print(f"the earlier run is now in {old}", flush=True)
        self._make_folders()

    def start(self, resume: str) -> Checkpoint | None:
        """The checkpoint that `run.resume` means, if any. An earlier run that it does not go on with is set aside."""
        last = self.checkpoints.last()
        if resume == "auto":
            return checkpoint.load(self.checkpoints.path(last)) if last else None
        chosen = checkpoint.load(Path(resume).expanduser()) if resume != "never" else None
        if not (chosen and last and Path(resume).expanduser().samefile(self.checkpoints.path(last))):
            self._set_aside()
        return chosen

    def finished_epochs(self) -> int:
        """The epochs of the run that was completed here; 0 if none was."""
        return int(self._summary().get("epochs", 0))

    def tested(self) -> Evaluation:
        """The test of the run that was completed here."""
        summary = self._summary()
        return Evaluation(summary["test_loss"], torch.tensor(summary["test_confusion"]))

    def begin(self, start: Checkpoint | None) -> None:
        """Write config.toml, and cut metrics.jsonl back to the start, so that it reads as one undisturbed run."""
        self._history = list(start.history) if start else []
        (self.path / "summary.json").unlink(missing_ok=True)
        write_text(self.path / "config.toml", self._config.to_toml())
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in self._history))
        epoch = self._history[-1]["epoch"] if self._history else -1
        if start and not self.checkpoints.last():
            self.checkpoints.add(start, self.events("valid")[-1]["accuracy"])
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch + 1)

    def record(self, event: str, epoch: int, **values: Any) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars."""
        line = {"event": event, "epoch": epoch, **values}
        self._history.append(line)
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None
        for name, value in values.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(f"{name}/{event}", value, epoch)
        self._tensorboard.flush()

    def events(self, event: str) -> list[Event]:
        """The events of one kind so far, oldest first."""
        return [line for line in self._history if line["event"] == event]

    def best_accuracy(self) -> float:
        """Of the best checkpoint so far; -1 before there is one."""
        best = self.checkpoints.best()
        return float(best["metric"]) if best else -1.0

    def best_checkpoint(self) -> Checkpoint:
        """The checkpoint with the best validation accuracy."""
        best = self.checkpoints.best()
        if best is None:
            raise RunError(f"no best checkpoint in {self.checkpoints.folder}")
        return checkpoint.load(self.checkpoints.path(best))

    def save(self, state: Checkpoint) -> None:
        """A checkpoint, which carries the history up to and with itself."""
        accuracy = self.events("valid")[-1]["accuracy"]
        self.record("checkpoint", state.epoch, step=state.step)
        state = dataclasses.replace(state, history=self._history)
        self.checkpoints.add(state, accuracy)
        run = self._config.run
        if run.numbered_checkpoints and state.epoch % run.checkpoint_interval == 0:
            checkpoint.save(state, run.numbered_checkpoints / f"model_checkpoint_{state.epoch}.pt")

    def finish(self, test: Evaluation, facts: Mapping[str, Any], tree: Tree) -> None:
        """The plots, and last of all summary.json."""
        trained, validated = self.events("train"), self.events("valid")
        best = self.checkpoints.best() or {}
        seconds = sum(event["seconds"] for event in trained)
        self.record("test", best["epoch"], **test.event())
        plots.learning_curves(self._history, self.path / "plots" / "learning_curves.png")
        title = f"{self.path.name}: {test.line('test')}"
        plots.confusion_matrix(
            test.confusion.numpy(), tree.classes, self.path / "plots" / "confusion_matrix.png", title
        )
        summary = {
            "test_accuracy": test.accuracy,
            "valid_accuracy": validated[-1]["accuracy"],
            "best_valid_accuracy": best["metric"],
            "best_epoch": best["epoch"],
            "epochs": trained[-1]["epoch"],
            **facts,
            "images_per_second": sum(e["images_per_second"] * e["seconds"] for e in trained) / seconds,
            "seconds": seconds,
            "synthetic": tree.synthetic,
            "classes": list(tree.classes),
            "test_loss": test.loss,
            "test_confusion": test.confusion.tolist(),
        }
        self.record("end", trained[-1]["epoch"])
        self._tensorboard.close()
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def _summary(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "summary.json").read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise UserError(f"{self.path / 'summary.json'}: unreadable; remove it to run again") from None
