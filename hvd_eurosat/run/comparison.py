"""Runs beside each other on one page: their results, the mean over seeds, and what two of them did differently."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_eurosat.errors import UserError
from hvd_eurosat.run import svg
from hvd_eurosat.run.page import ABOUT_ITSELF, PAGE, STATES, environment, shown
from hvd_eurosat.run.story import Story, defaults, read_story
from hvd_eurosat.training.files import write_text

SEED = "train.seed"


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
    facts = {"runs": [_row(story, out) for story in stories], "groups": groups(stories), "keys": _keys(stories)}
    write_text(out, environment().get_template("runs.html").render(page=facts))
    return out


def _row(story: Story, out: Path) -> dict[str, Any]:
    best, tested, trained = story.best, story.tested, story.of("train")
    link = os.path.relpath(story.folder / PAGE, out.parent) if (story.folder / PAGE).exists() else ""
    accuracies = [float(event["accuracy"]) for event in story.of("valid")]
    return {
        "name": story.name,
        "link": link.replace(os.sep, "/"),
        "state": story.state,
        "state_text": STATES[story.state],
        "split": story.split,
        "epochs": trained[-1]["epoch"] if trained else 0,
        "of": story.config["train.epochs"],
        "seed": story.config.get(SEED),
        "best": float(best["accuracy"]) if best else None,
        "test": tested.share if tested else None,
        "counts": f"{tested.correct} of {tested.total}" if tested else "",
        "rate": trained[-1].get("images_per_second") if trained else None,
        "seconds": sum(event.get("seconds", 0.0) for event in trained),
        "curve": svg.spark(accuracies, "validation accuracy over the epochs") if accuracies else "",
        "config": {key: shown(value) for key, value in story.config.items()},
    }


def _keys(stories: Sequence[Story]) -> list[str]:
    """All keys of the configuration, in their order."""
    return list(defaults() | {key: None for story in stories for key in story.config})


def groups(stories: Sequence[Story]) -> list[dict[str, Any]]:
    """Finished runs of one configuration, the seed apart: mean and standard deviation (of a sample) of accuracies."""
    same: dict[tuple[tuple[str, str], ...], list[Story]] = {}
    for story in stories:
        if story.state != "done":
            continue
        what = {key: value for key, value in story.config.items() if key != SEED and not key.startswith(ABOUT_ITSELF)}
        data = (("data", Path(story.config["data.root"]).name), ("split", story.split))
        key = (*data, *((k, shown(v)) for k, v in sorted(what.items())))
        same.setdefault(key, []).append(story)
    return [
        {
            "names": [story.name for story in members],
            "seeds": ", ".join(str(story.config.get(SEED)) for story in members),
            "best": spread([float(story.best["accuracy"]) for story in members if story.best]),
            "test": spread([story.tested.share for story in members if story.tested]),
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
