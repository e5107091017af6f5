"""A run as its files tell it, finished or not, whatever of them there is. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.config.schema import Config, flatten
from hvd_eurosat.errors import UserError
from hvd_eurosat.run.examples import read_examples
from hvd_eurosat.run.status import Status, read_status
from hvd_eurosat.training.scores import wilson

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Event = dict[str, Any]


@dataclass(frozen=True)
class Counted:
    """Images judged, and how many of them rightly."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """A fraction 0..1; 0 of none."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share, by Wilson's score, which holds for few images too."""
        return wilson(self.correct, self.total) if self.total else (0.0, 1.0)


@dataclass(frozen=True)
class Confusion:
    """How a split was classified after an epoch. counts: int64 [C, C], rows are the true classes."""

    split: str
    epoch: int
    counts: NDArray[np.int64]

    @property
    def all(self) -> Counted:
        """Of all classes."""
        return Counted(int(self.counts.trace()), int(self.counts.sum()))

    def of_class(self, n: int) -> tuple[Counted, Counted]:
        """Of its images those that were given it (recall); of the images given it those that are of it (precision)."""
        hits = int(self.counts[n, n])
        return Counted(hits, int(self.counts[n].sum())), Counted(hits, int(self.counts[:, n].sum()))

    @property
    def worst_pairs(self) -> list[tuple[int, int, int]]:
        """True class, given class and count of each kind of mistake, the most frequent first."""
        pairs = [(int(t), int(g), int(self.counts[t, g])) for t, g in np.argwhere(self.counts) if t != g]
        return sorted(pairs, key=lambda pair: -pair[2])


@dataclass(frozen=True)
class Story:
    """What the files of a run say. status: {} of a run of an earlier version; config: flat; summary: {} until the end.

    examples: {} unless of the tested checkpoint; checkpoints: their records, oldest first.
    """

    folder: Path
    status: Status
    config: dict[str, Any]
    events: list[Event]
    summary: dict[str, Any]
    examples: dict[str, Any]
    checkpoints: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def state(self) -> str:
        """running, stopped, done, failed, stale, or unknown."""
        return str(self.status.get("state") or ("done" if self.summary else "unknown"))

    @property
    def split(self) -> str:
        """How its images came to their splits; "" of a run of an earlier version."""
        return str(self.status.get("split") or self.summary.get("split") or "")

    def of(self, kind: str) -> list[Event]:
        """Its events of a kind, oldest first."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def best(self) -> Event | None:
        """The validation of the best epoch, the earliest of several."""
        return max(self.of("valid"), key=lambda event: float(event["accuracy"]), default=None)

    @cached_property
    def confusion(self) -> Confusion | None:
        """Of the test or, before it, of the last validation."""
        found = [e for e in self.events if e["event"] in ("valid", "test") and "confusion" in e]
        if not found:
            return None
        counts = np.array(found[-1]["confusion"], dtype=np.int64)
        return Confusion(str(found[-1]["event"]), int(found[-1]["epoch"]), counts)

    @property
    def tested(self) -> Counted | None:
        """The test result."""
        return self.confusion.all if self.confusion and self.confusion.split == "test" else None

    @property
    def calibration(self) -> NDArray[np.float64] | None:
        """Of the test: scores.reliability's sums, [3, bins]."""
        found = [event["reliability"] for event in self.of("test") if "reliability" in event]
        return np.array(found[-1], dtype=np.float64) if found else None

    @property
    def classes(self) -> list[str]:
        """Their names, as far as they are known."""
        known = self.status.get("classes") or self.summary.get("classes")
        count = len(self.confusion.counts) if self.confusion else 0
        return list(known or [f"class {n}" for n in range(count)])


def read_story(folder: Path) -> Story:
    """All there is in the folder of a run. Raises UserError where there is none, or a file is damaged."""
    events, summary = read_events(folder / "metrics.jsonl"), read_summary(folder / "summary.json")
    status: Status = {}
    if (folder / "status.json").exists():
        status = read_status(folder)
    examples = read_examples(folder)
    if not any(e["event"] == "test" and e["epoch"] == examples.get("epoch") for e in events):
        examples = {}
    return Story(folder, status, read_config(folder / "config.toml"), events, summary, examples, _records(folder))


def read_events(path: Path) -> list[Event]:
    """The events of a metrics.jsonl. Raises UserError where it is missing or damaged."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --run.dir wants the folder of a run") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not text") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the run is writing it just now
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            wanted = ("epoch", "loss", "accuracy") if event["event"] in ("train", "valid") else ()
            for key in wanted:
                float(event[key])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path} is damaged in line {number}") from None
        events.append(event)
    return events


def read_summary(path: Path) -> dict[str, Any]:
    """What summary.json holds; nothing of a run that is not finished. Raises UserError where it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is damaged") from None


def read_config(path: Path) -> dict[str, Any]:
    """The flat configuration of a run, what config.toml leaves out filled in; only defaults where it is missing."""
    try:
        given = flatten(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        given = {}
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged") from None
    return defaults() | given


def defaults() -> dict[str, Any]:
    """Of every key, whatever the environment says."""
    sections = {name: field.default for name, field in Config.model_fields.items() if name != "config"}
    return flatten({name: section.model_dump(mode="json") for name, section in sections.items()})


def beginning(config: Mapping[str, Any]) -> str:
    """The weights that a run of this configuration begins with, and what of them trains."""
    weights, trains = Path(config["model.weights"]).name, config["model.trainable"]
    known = {"all": "all of them train", "bn+head": "the BatchNorm layers and the head (the last layer) train"}
    known |= {"head": "the head (the last layer) trains"}
    return f"{'random' if weights == 'none' else weights} weights; {known.get(trains, f'{trains} trains')}"


def meaning(key: str) -> str:
    """What a key of the configuration is for; "" of one that this version does not know."""
    section, _, name = key.partition(".")
    fields = getattr(getattr(Config.model_fields.get(section), "annotation", None), "model_fields", {})
    return " ".join((fields[name].description or "").split()) if name in fields else ""


def _records(folder: Path) -> list[dict[str, Any]]:
    """Of the checkpoints that are there, with when they were written."""
    found = []
    for path in (folder / "checkpoints").glob("epoch-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(path.read_bytes())
            found.append({**record, "file": record["content"]["file"], "time": path.stat().st_mtime})
    return sorted(found, key=lambda record: (record["step"], record["epoch"]))
