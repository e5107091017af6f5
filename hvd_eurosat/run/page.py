"""RUN/index.html: a run for people, in one file that needs no network. Made from the run's files; needs no torch."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from hvd_eurosat.errors import UserError
from hvd_eurosat.run import svg
from hvd_eurosat.run.examples import in_turn
from hvd_eurosat.run.opening import lead, stand, trouble, weak, what
from hvd_eurosat.run.rendering import between, environment, shown
from hvd_eurosat.run.story import Story, defaults, meaning, read_story
from hvd_eurosat.run.svg import Curve, Mark
from hvd_eurosat.training.files import write_text
from hvd_eurosat.training.scores import calibration_error

PAGE = "index.html"
RELOAD_SECONDS = 20
MOST_SECONDS = 120.0  # between two pages of a running job, however long its epochs are
PATIENCE = 300.0  # seconds after which a page that is not written anew is that of a dead job
SHOWN = 12  # of the worst mistakes, and of the least certain images
MOST_CLASSES = 60  # of a confusion matrix that can be looked at
MOST_RANKS = 64  # of which the time is shown
STATES = {
    "running": "Running",
    "stopped": "Stopped",
    "done": "Done",
    "failed": "Failed",
    "stale": "No sign of life",
    "unknown": "Unfinished",
}


def write_page(folder: Path) -> Path:
    """Make the page of a run from its files. Raises UserError where they are damaged, RunError where it cannot be."""
    write_text(folder / PAGE, render(read_story(folder)))
    return folder / PAGE


def render(story: Story) -> str:
    """The page. Raises UserError where the files do not hold what they should."""
    try:
        facts = contents(story)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise UserError(f"{story.folder}: its metrics.jsonl, status.json or a checkpoint's .json is damaged") from None
    return environment().get_template("page.html").render(page=facts)


def contents(story: Story) -> dict[str, Any]:
    """All that the page says, in its order."""
    status = story.status
    written = float(status.get("updated") or time.time())
    return {
        "name": story.name,
        "state": story.state,
        "state_text": STATES[story.state],
        "live": story.state == "running",
        "reload": RELOAD_SECONDS,
        "written": written,
        "patience": PATIENCE,
        "again": f"python -m hvd_eurosat.report page --run.dir {shlex.quote(str(story.folder))}",
        "lead": lead(story),
        "weak": weak(story),
        "trouble": trouble(story),
        "what": what(story),
        "stand": stand(story),
        "charts": charts(story),
        "epochs": _epochs(story),
        "result": _result(story),
        "per_class": per_class(story),
        "matrix": matrix(story),
        "images": images(story),
        "calibration": _calibration(story),
        "phases": phases(story),
        "ranks": _ranks(story),
        "noted": noted(story),
        "settings": settings(story),
        "checkpoints": _checkpoints(story),
        "frozen": story.checkpoints[-1].get("frozen") if story.checkpoints else None,
        "commands": commands(story),
    }


# --- how it went ---


def charts(story: Story) -> list[dict[str, Any]]:
    """Loss, accuracy, rate and speed over the epochs, with the best validation and where the run was resumed."""
    events = {kind: {e["epoch"]: e for e in story.of(kind)} for kind in ("train", "valid")}
    x = sorted(events["train"].keys() | events["valid"].keys())
    if not x:
        return []
    starts = story.status.get("starts", [])[1:]
    resumed = [Mark(s["epoch"], f"resumed after epoch {s['epoch']}, step {s['step']}") for s in starts]
    resumed = [mark for mark in resumed if mark.x >= x[0]]

    def curve(kind: str, key: str) -> Curve:
        values = [_finite(events[kind][epoch].get(key)) if epoch in events[kind] else None for epoch in x]
        return Curve({"train": "training", "valid": "validation"}[kind], kind, values)

    drawn = []
    for key, title, form, kinds in (
        ("loss", "Loss", "{:.4f}", ("train", "valid")),
        ("accuracy", "Accuracy", "{:.2%}", ("train", "valid")),
        ("learning_rate", "Learning rate", "{:.4g}", ("train",)),
        ("images_per_second", "Images per second, all ranks", "{:,.0f}", ("train",)),
    ):
        marks, best, note = list(resumed), story.best, ""
        if best and "valid" in kinds and _finite(best[key]) is not None:
            marks.append(Mark(best["epoch"], f"best validation, epoch {best['epoch']}", best[key]))
            note = f"best: {svg.written(best[key], form)}, epoch {best['epoch']}"
        curves = [curve(kind, key) for kind in kinds]
        drawing = svg.chart(title, x, curves, form, marks, least=0.0 if key == "images_per_second" else None)
        drawn.append({"title": title, "svg": drawing, "curves": curves, "note": note, "resumed": bool(resumed)})
    return drawn


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < float("inf") else None


def _epochs(story: Story) -> list[dict[str, Any]]:
    """The figures behind the curves, a row for each epoch."""
    valid = {event["epoch"]: event for event in story.of("valid")}
    return [{"epoch": e["epoch"], "train": e, "valid": valid.get(e["epoch"])} for e in story.of("train")]


def _result(story: Story) -> dict[str, Any] | None:
    confusion = story.confusion
    if not confusion:
        return None
    of_all = {"all": confusion.all, "between": between(*confusion.all.interval)}
    return {"is_test": confusion.split == "test", "epoch": confusion.epoch, **of_all}


def per_class(story: Story) -> list[dict[str, Any]]:
    """Of each class: images, how many were found (recall), how many of those so called are right (precision), F1."""
    if not story.confusion:
        return []
    rows = []
    for n, name in enumerate(story.classes):
        found, given = story.confusion.of_class(n)
        f1 = 2 * found.correct / max(found.total + given.total, 1)
        rows.append({"name": name, "found": found, "given": given, "between": between(*found.interval), "f1": f1})
    return rows


def matrix(story: Story) -> dict[str, Any] | None:
    """The confusion matrix, rows the true classes; or, of too many classes to look at, its worst pairs."""
    if not story.confusion:
        return None
    counts, names = story.confusion.counts, story.classes
    shown = {(image["true"], image["given"]) for image in story.examples.get("images", [])}
    pairs = [{"true": t, "given": g, "count": n} for t, g, n in story.confusion.worst_pairs[:40]]
    rows = [
        [
            {"count": int(n), "share": round(float(n / max(row.sum(), 1)), 3), "images": (true, given) in shown}
            for given, n in enumerate(row)
        ]
        for true, row in enumerate(counts)
    ]
    return {"classes": names, "rows": rows if len(names) <= MOST_CLASSES else [], "pairs": pairs}


def images(story: Story) -> dict[str, list[dict[str, Any]]]:
    """The examples, each once: the worst mistakes, the least certain, and the rest, which the matrix shows."""
    every = [{**image, "cell": f"{image['true']}-{image['given']}"} for image in story.examples.get("images", [])]
    worst = [image for image in every if image["true"] != image["given"]][:SHOWN]
    others = [image for image in every if image not in worst]
    doubt = np.argsort([image["probability"] for image in others], kind="stable")
    pairs = np.array([len(story.classes) * image["true"] + image["given"] for image in others], dtype=np.int64)
    unsure = [others[n] for n in in_turn(doubt, pairs)[:SHOWN]]
    return {"worst": worst, "unsure": unsure, "rest": [image for image in others if image not in unsure]}


def _calibration(story: Story) -> dict[str, Any] | None:
    found = story.calibration
    return {"svg": svg.reliability(found), "error": calibration_error(found)} if found is not None else None


# --- what it took ---


def phases(story: Story) -> list[dict[str, Any]]:
    """Seconds of each phase over all starts of the run (preparing: of the last), and their share."""
    spent = {
        "preparing": story.status.get("preparing_seconds") or 0.0,
        "training": sum(e.get("seconds", 0.0) for e in story.of("train")),
        "validation": sum(e.get("seconds", 0.0) for e in story.of("valid")),
        "test": sum(e.get("seconds", 0.0) for e in story.of("test")),
    }
    total = sum(spent.values()) or 1.0
    return [{"name": name, "seconds": s, "share": s / total} for name, s in spent.items() if s]


def _ranks(story: Story) -> list[dict[str, Any]]:
    """The slowest ranks first, with their share of the slowest one's time."""
    ranks = sorted(story.status.get("ranks", []), key=lambda one: -one["step_seconds"])[:MOST_RANKS]
    most = ranks[0]["step_seconds"] if ranks else 1.0
    return [{**one, "share": one["step_seconds"] / (most or 1.0)} for one in ranks]


def noted(story: Story) -> list[str]:
    """Stragglers and skipped steps."""
    lines = []
    for event in story.of("train"):
        for one in event.get("stragglers", []):
            slower = f"{100 * one['slower']:.0f} % slower than the others"
            lines.append(f"Epoch {event['epoch']}: rank {one['rank']} ({one['host']}) was {slower}.")
        if skipped := event.get("skipped_steps"):
            count = f"{skipped} steps were" if skipped > 1 else "a step was"
            lines.append(f"Epoch {event['epoch']}: {count} skipped; loss or gradients were not finite.")
    return lines


# --- how to go on ---


def settings(story: Story) -> list[dict[str, Any]]:
    """The whole configuration, by section, what differs from the defaults marked."""
    usual, sections = defaults(), []
    for section in dict.fromkeys(key.partition(".")[0] for key in usual | story.config):
        keys = [key for key in usual | story.config if key.partition(".")[0] == section]
        rows: list[dict[str, Any]] = [
            {
                "key": key,
                "value": shown(story.config.get(key)),
                "usual": shown(usual.get(key)),
                "differs": shown(story.config.get(key)) != shown(usual.get(key)),
                "meaning": meaning(key),
            }
            for key in keys
        ]
        sections.append({"name": section, "rows": rows, "differ": sum(row["differs"] for row in rows)})
    return sections


def _checkpoints(story: Story) -> list[dict[str, Any]]:
    best = max((c for c in story.checkpoints if c["metric"] is not None), key=lambda c: c["metric"], default=None)
    return [
        {**c, "is_best": c is best, "is_last": c is story.checkpoints[-1], "sha256": c["content"]["sha256"]}
        for c in reversed(story.checkpoints)
    ]


def commands(story: Story) -> list[tuple[str, str]]:
    """What one does with the best checkpoint, ready to be copied."""
    if not story.checkpoints:
        return []
    best, data, again, test = (
        shlex.quote(str(path))
        for path in (
            story.folder / "checkpoints" / "best.json",
            story.config["data.root"],
            story.folder / "config.toml",
            f"{story.config['data.root']}/test",
        )
    )
    program = "python -m hvd_eurosat"
    return [
        ("Evaluate it", f"{program}.evaluate --checkpoint {best} --data.root {data} --split test"),
        ("Classify images", f"{program}.predict --checkpoint {best} --input {test} --out predictions"),
        ("Map a scene", f"{program}.map --checkpoint {best} --scene SCENE --out maps"),
        ("Hand it on", f"{program}.export --checkpoint {best} --format onnx --out exported"),
        ("Repeat the run", f"{program}.train --config {again} --run.dir {shlex.quote(f'{story.folder}-again')}"),
    ]
