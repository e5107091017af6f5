"""How the page of a run begins: what the run is, what it has come to, where it stands and, if it died, why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hvd_eurosat.run.rendering import between, moment, percent
from hvd_eurosat.run.status import span
from hvd_eurosat.run.story import Counted, Story


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
        return f"{first} Of {of}, it classifies {percent(tested.share)} rightly (95 % interval {between(low, high)})."
    best = story.best
    if best:
        return f"{first} The best validation so far is {percent(best['accuracy'])}, after epoch {best['epoch']}."
    return f"{first} No epoch is complete yet."


def _data(story: Story) -> str:
    name = Path(story.config["data.root"]).name
    synthetic = story.status.get("synthetic") or story.summary.get("synthetic")
    return f"{name} (the synthetic sample, which only looks a little like satellite images)" if synthetic else name


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
    if split := status.get("split"):
        rows.append(("split", split))
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
