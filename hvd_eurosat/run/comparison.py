"""Runs beside each other on one page: their results, the mean over seeds, and what two of them did differently."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_eurosat.errors import UserError
from hvd_eurosat.run import svg
from hvd_eurosat.run.page import PAGE, STATES
from hvd_eurosat.run.rendering import between, environment, shown
from hvd_eurosat.run.story import Story, defaults, read_story
from hvd_eurosat.training.files import write_text

SEED = "train.seed"
ABOUT_ITSELF = ("run.", "data.root", "data.cache_dir")  # keys that say where, not what


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold a run, and the runs right below the others. Raises UserError where there is none."""
    found = []
    for folder in folders:
        try:
            below = sorted(path for path in folder.iterdir() if (path / "metrics.jsonl").exists())
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from None
        found += [folder] if (folder / "metrics.jsonl").exists() else below
    if not found:
        raise UserError(f"no run in {', '.join(map(str, folders))}: the folder of a run has a metrics.jsonl")
    return found


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """The page of some runs. Raises UserError where a run is damaged, RunError where it cannot be written."""
    stories = [read_story(folder) for folder in folders]
    rows = [_row(story, name, out) for story, name in zip(stories, _names(stories), strict=True)]
    facts = {"runs": rows, "groups": groups(stories), "keys": _keys(stories)}
    write_text(out, environment().get_template("runs.html").render(page=facts))
    return out


def _names(stories: Sequence[Story]) -> list[str]:
    """Of the runs, their folders where two have the same."""
    names = [story.name for story in stories]
    return [name if names.count(name) == 1 else str(story.folder) for story, name in zip(stories, names, strict=True)]


def _row(story: Story, name: str, out: Path) -> dict[str, Any]:
    best, tested, trained = story.best, story.tested, story.of("train")
    link = os.path.relpath(story.folder / PAGE, out.parent) if (story.folder / PAGE).exists() else ""
    accuracies = [float(event["accuracy"]) for event in story.of("valid")]
    return {
        "name": name,
        "link": link.replace(os.sep, "/"),
        "state": story.state,
        "state_text": STATES[story.state],
        "error": story.status.get("error") or "",
        "data": Path(story.config["data.root"]).name,
        "split": story.split,
        "epochs": trained[-1]["epoch"] if trained else 0,
        "of": story.config["train.epochs"],
        "seed": story.config.get(SEED),
        "best": float(best["accuracy"]) if best else None,
        "test": tested.share if tested else None,
        "counts": f"{tested.correct} of {tested.total}" if tested else "",
        "between": between(*tested.interval) if tested else "",
        "rate": trained[-1].get("images_per_second") if trained else None,
        "seconds": sum(event.get("seconds", 0.0) for event in trained),
        "curve": svg.spark(accuracies, "validation accuracy over the epochs") if accuracies else "",
        "config": {key: shown(value) for key, value in (_beside(story) | story.config).items()},
    }


def _beside(story: Story) -> dict[str, Any]:
    """What the result of a run depends on, and no key says."""
    status = story.status
    ranks = story.summary.get("world_size") or status.get("world_size")
    version = " ".join(str(status[key]) for key in ("version", "commit") if status.get(key))
    return {"ranks": ranks, "split": story.split or None, "version": version or None}


def _keys(stories: Sequence[Story]) -> list[str]:
    """All keys of the configuration in their order, but run.dir, which is the run's name."""
    every = _beside(stories[0]) | defaults() | {key: None for story in stories for key in story.config}
    return [key for key in every if key != "run.dir"]


def groups(stories: Sequence[Story]) -> list[dict[str, Any]]:
    """Finished runs of one configuration, the seed apart: mean and standard deviation (of a sample) of accuracies."""
    same: dict[tuple[tuple[str, str], ...], list[tuple[str, Story]]] = {}
    for name, story in zip(_names(stories), stories, strict=True):
        if story.state != "done":
            continue
        what = {key: value for key, value in story.config.items() if key != SEED and not key.startswith(ABOUT_ITSELF)}
        what |= {"data": Path(story.config["data.root"]).name, **_beside(story), "version": None}
        key = tuple((k, shown(v)) for k, v in sorted(what.items()))
        same.setdefault(key, []).append((name, story))
    return [
        {
            "names": [name for name, _ in members],
            "seeds": ", ".join(str(story.config.get(SEED)) for _, story in members),
            "best": spread([float(story.best["accuracy"]) for _, story in members if story.best]),
            "test": spread([story.tested.share for _, story in members if story.tested]),
        }
        for members in same.values()
        if len(members) > 1
    ]


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard deviation of a sample (0 of one) and count; None of nothing."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "count": len(values)}
