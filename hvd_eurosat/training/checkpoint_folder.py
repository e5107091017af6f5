"""The checkpoints of a run: which are kept, which is the newest that is whole, and which the best."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.training.checkpoint import (
    Checkpoint,
    FrozenLostError,
    frozen_content,
    holds,
    load,
    load_mended,
    temperature,
    write,
    write_record,
)
from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.weights.stored import Blob, Record, read_record


class CheckpointFolder:
    """`checkpoints/` of a run: the newest `keep`, the best, and last.json and best.json, which name them.

    Each of the two holds file, epoch, step and metric (validation accuracy, a fraction; null between epochs). In the
    folder `numbered` all of every `interval` epochs stay, as model_checkpoint_<epoch>.pt (rmldnn's names).
    """

    def __init__(self, folder: Path, keep: int, numbered: Path | None = None, interval: int = 1) -> None:
        self.folder = folder
        self._keep = keep
        self._numbered, self._interval = numbered, interval
        self._frozen: Blob | None = None

    def records(self) -> list[Record]:
        """What the checkpoints here say of themselves, oldest first; files that say nothing readable are left out."""
        records = []
        for path in self.folder.glob("epoch-*.json"):
            with contextlib.suppress(UserError):
                records.append(read_record(path))
        return sorted(records, key=lambda record: (record.step, record.epoch))

    def newest(self, report: Callable[[str], None], weights: str | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are reported and set aside.

        weights: as in `load_mended`. Raises UserError where there are checkpoints and none is whole: the run is not
        begun again in silence.
        """
        order = {record.content.file: place for place, record in enumerate(self.records())}
        paths = [path.with_suffix(".pt") for path in self.folder.glob("epoch-*.json")]
        for path in sorted(paths, key=lambda path: order.get(path.name, -1), reverse=True):
            try:
                return load_mended(path, report, weights)
            except FrozenLostError:
                raise
            except UserError as error:
                _set_aside(path, error, report)
        if list(self.folder.glob("*.damaged")):
            raise UserError(f"no checkpoint in {self.folder} is whole: give another run.dir, or --run.resume never")
        return None

    def best(self) -> Record | None:
        """The validated checkpoint with the highest accuracy, the earliest of several."""
        validated = [record for record in self.records() if record.metric is not None]
        return max(validated, key=lambda record: record.metric or 0.0, default=None)

    def best_model(self, report: Callable[[str], None]) -> dict[str, Tensor]:
        """What trains of the best checkpoint's state dict; a damaged one is reported, and the next best is taken.

        Raises RunError where there is none.
        """
        while best := self.best():
            try:
                return load(self.path(best), frozen=False).model
            except UserError as error:
                _set_aside(self.path(best), error, report)
                self._point_at_newest_and_best()
        raise RunError(f"no validated checkpoint in {self.folder}")

    def calibrate_best(self, temperatures: Mapping[int, float]) -> None:
        """Note temperatures with the best checkpoint. Raises RunError where the disk is full or gone."""
        if best := self.best():
            write_record(self.path(best), best.model_copy(update={"temperatures": dict(temperatures)}))

    def temperature(self, views: int) -> float:
        """Of the best checkpoint."""
        best = self.best()
        return temperature(best.temperatures, views) if best else 1.0

    def path(self, record: Record) -> Path:
        """Where a checkpoint is."""
        return self.folder / record.content.file

    def add(self, checkpoint: Checkpoint) -> None:
        """Save, point last.json and best.json at the newest and the best, remove what is neither nor among `keep`.

        Of what a killed job has left of the same checkpoint only the rest is written. Raises RunError where the disk is
        full or gone; the earlier checkpoints are as they were, and no part of the new one is left.
        """
        path = self.folder / f"{checkpoint.name}.pt"
        self._write_frozen(checkpoint)
        if not holds(path, checkpoint):
            write(checkpoint, path, self._frozen)
        self._point_at_newest_and_best()
        if self._numbered and self._is_numbered(checkpoint):
            copy = self.numbered_path(checkpoint.epoch)
            if not holds(copy, checkpoint):
                write(checkpoint, copy, frozen=None)
        self.copy_numbered()
        self._remove_old()

    def numbered_path(self, epoch: int) -> Path:
        """Where the copy for good of an epoch's checkpoint is, if the folder `numbered` is wanted."""
        return (self._numbered or self.folder) / f"model_checkpoint_{epoch}.pt"

    def copy_numbered(self) -> None:
        """Write the copies for good that are missing, of what is still kept here."""
        for record in self.records() if self._numbered else []:
            copy = self.numbered_path(record.epoch)
            if self._is_numbered(record) and not copy.with_suffix(".json").exists():
                try:
                    whole = load(self.path(record))
                except UserError:  # a damaged one
                    continue
                write(whole, copy, frozen=None)

    def _is_numbered(self, saved: Checkpoint | Record) -> bool:
        return not saved.samples and saved.epoch > 0 and saved.epoch % self._interval == 0

    def _write_frozen(self, checkpoint: Checkpoint) -> None:
        if self._frozen or not checkpoint.frozen:
            return
        content = frozen_content(checkpoint.model, checkpoint.frozen)
        digest = Blob.of("", content).sha256
        blob = Blob.of(f"frozen-{digest[:16]}.safetensors", content)
        try:
            blob.read(self.folder)
        except UserError:
            with replacing(self.folder / blob.file) as file:
                file.write(content)
        self._frozen = blob

    def _point_at_newest_and_best(self) -> None:
        if records := self.records():
            self._point("last.json", records[-1])
            self._point("best.json", self.best() or records[-1])

    def _point(self, name: str, record: Record) -> None:
        note = {"file": record.content.file, "epoch": record.epoch, "step": record.step, "metric": record.metric}
        write_text(self.folder / name, json.dumps(note) + "\n")

    def cut(self, step: int) -> None:
        """Remove what was saved after a step from which an elastic job begins again."""
        newer = [record for record in self.records() if record.step > step]
        self._remove(newer)
        if newer:
            self._point_at_newest_and_best()

    def _remove_old(self) -> None:
        records, best = self.records(), self.best()
        kept = {record.content.file for record in [*records[-self._keep :], *([best] if best else [])]}
        self._remove(record for record in records if record.content.file not in kept)

    def _remove(self, records: Iterable[Record]) -> None:
        for record in records:
            self.path(record).with_suffix(".json").unlink(missing_ok=True)
            self.path(record).unlink(missing_ok=True)


def _set_aside(path: Path, error: UserError, report: Callable[[str], None]) -> None:
    parts = [part for part in (path.with_suffix(".json"), path) if part.exists()]
    if not parts:  # another file's word for it, which would be taken again and again
        raise RunError(str(error))
    report(f"{error}; it is set aside as {path.name}.damaged")
    for part in parts:
        part.rename(f"{part}.damaged")
