"""RUN/index.html: a run for people, in one file that needs no network. Made from the run's files; needs no torch."""

from __future__ import annotations

import functools
import re
import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hvd_eurosat.errors import UserError
from hvd_eurosat.run import svg
from hvd_eurosat.run.examples import in_turn
from hvd_eurosat.run.status import STALE_SECONDS, span
from hvd_eurosat.run.story import Counted, Story, defaults, meaning, read_story
from hvd_eurosat.run.svg import Curve, Mark
from hvd_eurosat.training.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "index.html"
RELOAD_SECONDS = 20
SHOWN = 12  # of the worst mistakes, and of the least certain images
MOST_CLASSES = 60  # of a confusion matrix that can be looked at
MOST_RANKS = 64  # of which the time is shown
ABOUT_ITSELF = ("run.", "data.root", "data.cache_dir")  # keys that say where, not what
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


@functools.cache
def environment() -> Environment:
    """Of the templates: HTML is escaped, and a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    loader = PackageLoader("hvd_eurosat.run", "templates")
    made = Environment(
        loader=loader,
        autoescape=select_autoescape(["html", "css", "js"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "span": span,
        "moment": moment,
        "number": "{:,}".format,
        "cell": cell,
        "breakable": breakable,
    }
    return made


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
        "patience": _patience(story),
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
        "commands": commands(story),
    }


def percent(share: float) -> str:
    """96.67 %."""
    return f"{100 * share:.2f} %"


def breakable(text: str) -> Markup:
    """A name that may be broken where its words meet: HerbaceousVegetation_12.jpg."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[_.-])", text))


def cell(text: object) -> str:
    """Any text, for a table in Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def moment(seconds: float) -> str:
    """A time for people, in this machine's zone."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%d %B %Y, %H:%M %Z}".lstrip("0")


def _patience(story: Story) -> float:
    """Seconds after which a page that is not written anew is that of a dead job: twice an epoch, and some more."""
    longest = max((e.get("seconds", 0.0) for e in story.of("train")), default=0.0)
    return 2 * longest + 2 * max((e.get("seconds", 0.0) for e in story.of("valid")), default=0.0) + 10 * STALE_SECONDS


# --- what it is ---


def lead(story: Story) -> str:
    """One or two sentences for someone who knows nothing of the run."""
    config, classes = story.config, len(story.classes)
    count = story.status.get("images", {}).get("train") or story.summary.get("train_images")
    of_images = f"{count:,} images of " if count else "the images of "
    learns = {"done": "has learnt", "running": "is learning"}.get(story.state, "was learning")
    kinds = f"{classes} classes of images" if classes else "classes of images"
    first = f"A {config['model.arch']} {learns} to tell {kinds} apart, from {of_images}{_data(story)}."
    tested = story.tested
    if tested:
        low, high = tested.interval
        of = f"{tested.total:,} test images, which it had never seen"
        return f"{first} Of {of}, it classifies {percent(tested.share)} rightly (95 % interval {_between(low, high)})."
    best = story.best
    if best:
        return f"{first} The best validation so far is {percent(best['accuracy'])}, after epoch {best['epoch']}."
    return f"{first} No epoch is complete yet."


def _data(story: Story) -> str:
    name = Path(story.config["data.root"]).name
    synthetic = story.status.get("synthetic") or story.summary.get("synthetic")
    return f"{name} (the synthetic sample, which only looks a little like satellite images)" if synthetic else name


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def weak(story: Story) -> str:
    """Where it fails most."""
    confusion = story.confusion
    if not confusion or not confusion.worst_pairs:
        return ""
    names, counts = story.classes, confusion.counts
    shares = [Counted(int(row[n]), int(row.sum())) for n, row in enumerate(counts)]
    worst = min(range(len(shares)), key=lambda n: (shares[n].share, -shares[n].total))
    most = sorted(confusion.worst_pairs, key=lambda pair: -pair[2])[:3]
    pairs = "; ".join(f"{names[t]} taken for {names[g]} ({n} of {shares[t].total})" for t, g, n in most)
    found = f"{shares[worst].correct} of {shares[worst].total} images are recognised"
    return f"It is weakest on {names[worst]}, of which {found}. Most frequent mistakes: {pairs}."


def trouble(story: Story) -> dict[str, Any] | None:
    """Why it is not running, and what to do about it, where that is not as it should be."""
    status, state = story.status, story.state
    if state not in ("failed", "stale", "stopped"):
        return None
    epoch, epochs = status.get("epoch", 0), status.get("epochs", story.config["train.epochs"])
    where = f"in epoch {epoch} of {epochs}, after {status.get('step', 0):,} steps"
    newest = story.checkpoints[-1] if story.checkpoints else None
    of = f"The newest checkpoint is of epoch {newest['epoch']}, step {newest['step']:,}." if newest else ""
    cure = f"{of} Start the same command again, and it goes on from there." if newest else "No checkpoint was saved."
    if state == "stopped":
        return {"what": f"It was asked to stop {where}, and saved its state first.", "error": "", "cure": cure}
    if state == "failed":
        return {"what": f"It failed {where}.", "error": status.get("error") or "", "cure": cure}
    why = "Its job was killed (out of memory, a time limit, a lost node), hangs, or cannot write here any more."
    since = f"It was last heard of on {moment(status['updated'])}, {where}."
    return {"what": since, "error": "", "cure": f"{why} The log of the job may say which. {cure}"}


def what(story: Story) -> list[tuple[str, str]]:
    """Facts by name: those of the run's first lines, where it ran, and with what."""
    status = story.status
    rows = [(name, str(value)) for name, value in status.get("header", {}).items()]
    if story.split:
        rows.append(("split", story.split))
    hosts = status.get("hosts", {})
    if hosts:
        named = ", ".join(f"{host} ({count} rank{'s' * (count > 1)})" for host, count in list(hosts.items())[:20])
        more = f" and {len(hosts) - 20} more" if len(hosts) > 20 else ""
        rows.append((f"host{'s' * (len(hosts) > 1)}", named + more))
    if version := status.get("version"):
        commit = f", commit {status['commit']}" if status.get("commit") else ""
        rows.append(("software", f"hvd_eurosat {version}{commit}"))
    starts = status.get("starts", [])
    if starts:
        rows.append(("started", moment(starts[0]["time"])))
    resumes = [f"after epoch {s['epoch']}, step {s['step']:,} ({moment(s['time'])})" for s in starts[1:]]
    if resumes:
        rows.append((f"resumed {len(resumes)} time{'s' * (len(resumes) > 1)}", "; ".join(resumes)))
    return rows


def stand(story: Story) -> list[dict[str, str]]:
    """Where it stands, in a few large figures: label, value, note."""
    status, tiles = story.status, []

    def tile(label: str, value: str, note: str = "") -> None:
        tiles.append({"label": label, "value": value, "note": note})

    trained = story.of("train")
    epochs = int(story.config["train.epochs"])
    done = trained[-1]["epoch"] if trained else 0
    tile("epoch", f"{status.get('epoch', done)} of {epochs}", f"{done} complete")
    if story.state == "running" and status.get("seconds_left") is not None:
        tile("left", span(status["seconds_left"]), status.get("phase", ""))
    else:
        tile("trained for", span(sum(e.get("seconds", 0.0) for e in trained)), f"{status.get('step', 0):,} steps")
    rate = status.get("images_per_second") or (trained[-1].get("images_per_second") if trained else None)
    if rate:
        tile("speed", f"{rate:,.0f}", "images per second, all ranks")
    if best := story.best:
        tile("best validation", percent(best["accuracy"]), f"after epoch {best['epoch']}")
    if story.tested:
        tile("test", percent(story.tested.share), f"{story.tested.correct:,} of {story.tested.total:,} images")
    if story.checkpoints:
        newest = story.checkpoints[-1]
        old = span(float(status.get("updated") or time.time()) - newest["time"])
        note = f"{old} old" if story.state == "running" else newest["file"]
        tile("last checkpoint", f"epoch {newest['epoch']}", note)
    return tiles


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
    low, high = confusion.all.interval
    is_test = confusion.split == "test"
    return {"is_test": is_test, "epoch": confusion.epoch, "all": confusion.all, "between": _between(low, high)}


def per_class(story: Story) -> list[dict[str, Any]]:
    """Of each class: images, how many were found (recall), how many of those so called are right (precision), F1."""
    if not story.confusion:
        return []
    rows = []
    counts = story.confusion.counts
    for n, name in enumerate(story.classes):
        hit, true, said = int(counts[n, n]), int(counts[n].sum()), int(counts[:, n].sum())
        found = Counted(hit, true)
        low, high = found.interval
        shares = {"recall": found.share, "precision": Counted(hit, said).share, "f1": 2 * hit / max(true + said, 1)}
        rows.append({"name": name, "images": true, "correct": hit, "between": _between(low, high), **shares})
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
    found = story.examples.get("calibration")
    return {"svg": svg.reliability(found["bins"]), "error": found["error"]} if found else None


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


def shown(value: Any) -> str:
    """A value of the configuration as one would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


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
