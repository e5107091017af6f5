"""What a person sees on the terminal of rank 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.scores import macro_f1, wilson

BAR_SECONDS = 0.5
LINE_SECONDS = 20.0


def worth(evaluation: Evaluation) -> str:
    """A line: interval, F1, likelihood and calibration."""
    low, high = wilson(evaluation.correct, evaluation.count)
    return (
        f"95% interval {100 * low:.2f} to {100 * high:.2f}%, macro F1 {100 * macro_f1(evaluation.confusion):.2f}%, "
        f"negative log-likelihood {evaluation.loss:.4f}, calibration error {100 * evaluation.calibration_error:.2f}%"
    )


class Display:
    """Rank 0's words; on every other rank (`speaks` False) the same calls say nothing.

    Results go to standard output, and so do plain progress lines; a live bar goes to standard error if that is a
    terminal.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._live = speaks and sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=None, status="")

    def say(self, text: str) -> None:
        """A line on standard output."""
        if self._speaks:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """A line on standard error that nobody need mind."""
        if self._speaks:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line on standard error."""
        if self._speaks:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        """A line on standard error, of what could not be done while the rest goes on."""
        if self._speaks:
            print(f"error: {text}", file=sys.stderr, flush=True)

    def header(self, rows: Mapping[str, str]) -> None:
        """What is about to happen, a line for each fact."""
        self.say("\n".join(f"{name:<13}{value}" for name, value in rows.items()))

    def begin(self, epoch: int, epochs: int, steps: int) -> None:
        """A new progress bar for an epoch (from 1)."""
        self.start(f"epoch {epoch}/{epochs}", steps)

    def start(self, name: str, steps: int, unit: str = "step") -> None:
        """A new progress bar for so many steps, or whatever they are."""
        self._name, self._steps, self._unit = name, steps, unit
        self._began = self._shown = time.perf_counter()
        self._bar.reset(self._task, description=self._name, total=steps, status="")
        self._bar.start()

    def is_due(self) -> bool:
        """Whether it is time to show progress again; only then is the device asked for its sums."""
        interval = BAR_SECONDS if self._live else LINE_SECONDS
        return self._speaks and time.perf_counter() - self._shown > interval

    def progress(self, step: int, sums: Sums, samples: int) -> None:
        """After `step` steps and `samples` samples since `begin`, with the sums of this rank's shard of the epoch."""
        rate = samples / (time.perf_counter() - self._began)
        self.show(step, f"loss {sums.loss:.4f}  accuracy {100 * sums.accuracy:.1f}%  {rate:,.0f} images/s")

    def show(self, step: int, status: str) -> None:
        """After `step` steps since `start`."""
        self._shown = time.perf_counter()
        seconds = self._shown - self._began
        self._bar.update(self._task, completed=step, status=status)
        if not self._live:
            left = seconds / max(step, 1) * (self._steps - step)
            self.say(f"  {self._name}  {self._unit} {step}/{self._steps}  {status}  {left:.0f} s left")

    def end(self) -> None:
        """The bar goes."""
        self._bar.stop()

    def epoch(self, epochs: int, trained: Mapping[str, Any], validation: Evaluation, is_best: bool) -> None:
        """The line of an epoch."""
        self.say(
            f"epoch {trained['epoch']}/{epochs}  "
            f"train loss {trained['loss']:.4f}  accuracy {100 * trained['accuracy']:.2f}%  "
            f"valid loss {validation.loss:.4f}  accuracy {100 * validation.accuracy:.2f}%"
            f"{' (best)' if is_best else ''}  "
            f"{trained['images_per_second']:,.0f} images/s  {trained['seconds']:.0f} s"
        )

    def result(self, split: str, evaluation: Evaluation, classes: Sequence[str]) -> None:
        """What the figures are worth, the per-class table and then, last, the accuracy with its counts."""
        if not self._speaks:
            return
        self.say(worth(evaluation))
        table = Table(title=f"{split} set", box=box.SIMPLE_HEAD)
        for column in ("class", "images", "correct", "recall", "precision", "F1"):
            table.add_column(column, justify="left" if column == "class" else "right")
        confusion = evaluation.confusion
        hits, true, said = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
        for name, hit, n, m in zip(classes, hits, true, said, strict=True):
            shares = (hit / max(n, 1), hit / max(m, 1), 2 * hit / max(n + m, 1))
            table.add_row(name, str(n), str(hit), *(f"{100 * share:.1f}%" for share in shares))
        Console(force_terminal=False).print(table)  # mpirun gives each rank a terminal, whatever it writes to itself
        self.say(evaluation.line(split))
