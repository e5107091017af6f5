"""The files of a run: config.toml, metrics.jsonl, summary.json, checkpoints/, tensorboard/, plots/."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from hvd_eurosat.config import Config
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.training import plots
from hvd_eurosat.training.checkpoint import Checkpoint, CheckpointFolder
from hvd_eurosat.training.files import write_text
from hvd_eurosat.training.metrics import Evaluation

Event = dict[str, Any]


class RunDirectory:
    """Rank 0's files. Opening it creates the folders; raises UserError where it cannot write."""

    def __init__(self, config: Config) -> None:
        self.path = config.run.path
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", config.run.keep)
        self._config = config
        self._history: list[Event] = []
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            (self.path / "plots").mkdir(exist_ok=True)
            write_text(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except (OSError, RunError) as error:
            raise UserError(f"run.dir {self.path}: {error}") from None

    def set_aside(self) -> Path | None:
        """Move an earlier run out of the way; returns where it went."""
        if not (self.path / "metrics.jsonl").exists():
            return None
        number = next(n for n in range(1, 10**6) if not Path(f"{self.path}.{n}").exists())
        old = self.path.rename(f"{self.path}.{number}")
        RunDirectory(self._config)
        return old

    def finished_epochs(self) -> int:
        """The epochs of the run that was completed here; 0 if none was."""
        return int(self._summary().get("epochs", 0))

    def tested(self) -> Evaluation:
        """The test of the run that was completed here."""
        summary = self._summary()
        return Evaluation(summary["test_loss"], torch.tensor(summary["test_confusion"]))

    def begin(self, history: Iterable[Event]) -> None:
        """Write config.toml, and cut metrics.jsonl back to `history`, so that it reads as one undisturbed run."""
        self._history = list(history)
        (self.path / "summary.json").unlink(missing_ok=True)
        write_text(self.path / "config.toml", self._config.to_toml())
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in self._history))
        epoch = self._history[-1]["epoch"] if self._history else -1
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

    def save(self, state: Checkpoint, is_best: bool) -> None:
        """A checkpoint, which carries the history up to and with itself."""
        accuracy = self.events("valid")[-1]["accuracy"]
        self.record("checkpoint", state.epoch, step=state.step)
        self.checkpoints.add(dataclasses.replace(state, history=self._history), accuracy, is_best)

    def finish(self, test: Evaluation, facts: Mapping[str, Any], tree: Tree) -> None:
        """The plots, and last of all summary.json."""
        trained, validated = self.events("train"), self.events("valid")
        best = max(validated, key=lambda event: event["accuracy"])
        seconds = sum(event["seconds"] for event in trained)
        self.record("test", best["epoch"], loss=test.loss, accuracy=test.accuracy)
        plots.learning_curves(self._history, self.path / "plots" / "learning_curves.png")
        title = f"{self.path.name}: {test.line('test')}"
        plots.confusion_matrix(
            test.confusion.numpy(), tree.classes, self.path / "plots" / "confusion_matrix.png", title
        )
        summary = {
            "test_accuracy": test.accuracy,
            "valid_accuracy": validated[-1]["accuracy"],
            "best_valid_accuracy": best["accuracy"],
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
