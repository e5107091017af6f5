"""rmldnn's two logs of a run: x_train.txt with a line for each step, x_test.txt with one for each validation."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from hvd_eurosat.errors import RunError
from hvd_eurosat.training.files import write_text
from hvd_eurosat.training.metrics import Evaluation

TRAIN = "time epoch batch loss gradient_norm learning_rate"
TEST = "time epoch loss accuracy"


class Outfile:
    """The logs of run.outfile, which rank 0 writes with every checkpoint.

    time: seconds of training and validation, over all starts of the run; epoch and batch: from 1; loss: the mean over
    the global batch; accuracy: a fraction. On resume the lines after `epochs` and `batches` of the next are cut off,
    where batches are the steps that were made of it, on however many ranks.
    """

    def __init__(self, path: Path, epochs: int, batches: int) -> None:
        self._batch = batches
        self._steps: list[tuple[float, int, int, float, Tensor]] = []
        self._began = time.perf_counter()
        self._train, self._test = _paths(path)
        kept = [_begin(self._train, TRAIN, epochs, batches), _begin(self._test, TEST, epochs, 0)]
        self._began -= max(kept)

    def stepped(self, epoch: int, loss: Tensor, norm: Tensor, rate: float) -> None:
        """After a step of an epoch (from 1); loss and gradient norm are float32 [] on the device, and stay there."""
        self._batch += 1
        seconds = time.perf_counter() - self._began
        self._steps.append((seconds, epoch, self._batch, rate, torch.stack([loss, norm])))

    def flush(self) -> None:
        """Write the lines of the steps so far."""
        lines = [
            _line(seconds, epoch, batch, *both.tolist(), rate) for seconds, epoch, batch, rate, both in self._steps
        ]
        _append(self._train, lines)
        self._steps = []

    def validated(self, epoch: int, validation: Evaluation) -> None:
        """The line of an epoch's validation."""
        self.flush()
        self._batch = 0
        seconds = time.perf_counter() - self._began
        _append(self._test, [_line(seconds, epoch, validation.loss, validation.accuracy)])


def filled(path: Path) -> list[Path]:
    """Those of run.outfile's two logs that have more than their first line."""
    return [log for log in _paths(path) if log.exists() and len(log.read_bytes().splitlines()) > 1]


def _paths(path: Path) -> tuple[Path, Path]:
    train, test = (path.with_name(f"{path.stem}_{kind}{path.suffix}") for kind in ("train", "test"))
    return train, test


def _append(log: Path, lines: list[str]) -> None:
    try:
        with log.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise RunError(f"cannot write {log}: {error.strerror}") from None


def _line(seconds: float, *values: float) -> str:
    return f"{seconds:.3f} {' '.join(f'{value:.6g}' for value in values)}"


def _begin(path: Path, header: str, epochs: int, batches: int) -> float:
    """Leave the lines of the first epochs, and batches of the next; returns the time of the last."""
    try:
        lines = path.read_text(errors="replace").splitlines()[1:] if epochs or batches else []
    except OSError:
        lines = []
    rows = [line.split() for line in lines]
    rows = [row for row in rows if len(row) == len(header.split()) and row[1].isdecimal()]
    kept = [row for row in rows if int(row[1]) <= epochs or (int(row[1]) == epochs + 1 and float(row[2]) <= batches)]
    write_text(path, "".join(f"{' '.join(row)}\n" for row in [header.split(), *kept]))
    return float(kept[-1][0]) if kept else 0.0
