"""rmldnn's two logs of a run: x_train.txt with a line for each step, x_test.txt with one for each validation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hvd_eurosat.cluster import World
from hvd_eurosat.config import Config
from hvd_eurosat.errors import RunError
from hvd_eurosat.training.files import write_text
from hvd_eurosat.training.metrics import Evaluation

TRAIN = "time epoch batch loss gradient_norm learning_rate"
TEST = "time epoch loss accuracy"


class Outfile:
    """The logs of run.outfile; without one, every call does nothing. Rank 0 writes, at the end of each epoch.

    time: seconds of training and validation, over all starts of the run; epoch and batch: from 1; loss: the mean over
    the global batch; accuracy: a fraction. On resume the lines after `epochs` are cut off.
    """

    def __init__(self, world: World, config: Config, epochs: int) -> None:
        self._world = world
        self._path = config.run.outfile
        self._steps: list[tuple[float, float, Tensor]] = []
        self._began = time.perf_counter()
        if self._path and world.is_main:
            kept = [_begin(self._named("train"), TRAIN, epochs), _begin(self._named("test"), TEST, epochs)]
            self._began -= max(kept)

    def stepped(self, loss: Tensor, parameters: Iterable[nn.Parameter], rate: float) -> None:
        """After a step: this rank's part of the loss, the parameters with their gradients. Waits for nothing."""
        if self._path:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self._steps.append((time.perf_counter() - self._began, rate, torch.stack([loss, norm])))

    def trained(self, epoch: int) -> None:
        """The lines of an epoch (from 1). Collective."""
        if not self._path:
            return
        seconds, rates, values = zip(*self._steps, strict=True)
        self._steps = []
        losses, norms = torch.stack(values, 1)
        losses = self._world.sum(losses)
        rows = enumerate(zip(seconds, losses.tolist(), norms.tolist(), rates, strict=True), start=1)
        self._append("train", [_line(first, epoch, number, *rest) for number, (first, *rest) in rows])

    def validated(self, epoch: int, validation: Evaluation) -> None:
        """The line of an epoch's validation."""
        if self._path:
            seconds = time.perf_counter() - self._began
            self._append("test", [_line(seconds, epoch, validation.loss, validation.accuracy)])

    def _named(self, kind: str) -> Path:
        path = self._path or Path()
        return path.with_name(f"{path.stem}_{kind}{path.suffix}")

    def _append(self, kind: str, lines: list[str]) -> None:
        if not self._world.is_main:
            return
        try:
            with self._named(kind).open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise RunError(f"cannot write {self._named(kind)}: {error.strerror}") from None


def _line(seconds: float, *values: float) -> str:
    return f"{seconds:.3f} {' '.join(f'{value:.6g}' for value in values)}"


def _begin(path: Path, header: str, epochs: int) -> float:
    """Leave the lines of the first epochs; returns the time of the last."""
    try:
        lines = path.read_text(errors="replace").splitlines()[1:] if epochs else []
    except OSError:
        lines = []
    rows = [line.split() for line in lines]
    rows = [row for row in rows if len(row) == len(header.split()) and row[1].isdecimal() and int(row[1]) <= epochs]
    write_text(path, "".join(f"{' '.join(row)}\n" for row in [header.split(), *rows]))
    return float(rows[-1][0]) if rows else 0.0
