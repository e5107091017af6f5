"""How the page of a run begins: what the run is, what it has come to, where it stands and, if it died, why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hvd_eurosat.run.rendering import between, moment, percent
from hvd_eurosat.run.status import counted, span
from hvd_eurosat.run.story import Story, beginning

MOST_NAMED = 20  # classes, or hosts


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
        of = f"{tested.total:,} test images, which it had never seen"
        rightly = f"{percent(tested.share)} rightly (95 % interval {between(*tested.interval)})"
        return f"{first} Of {of}, it classifies {rightly}."
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
    confusion, names = story.confusion, story.classes
    if not confusion or not confusion.worst_pairs:
        return ""
    shares = [confusion.of_class(n)[0] for n in range(len(names))]
    worst = min((n for n, of in enumerate(shares) if of.total), key=lambda n: (shares[n].share, -shares[n].total))
    most = confusion.worst_pairs[:3]
    pairs = "; ".join(f"{names[t]} taken for {names[g]} ({n} of {shares[t].total})" for t, g, n in most)
    found = f"{shares[worst].correct} of {shares[worst].total} images are recognised"
    when = "" if confusion.split == "test" else f" (validation after epoch {confusion.epoch})"
    return f"It is weakest on {names[worst]}, of which {found}{when}. Most frequent mistakes: {pairs}."


def trouble(story: Story) -> dict[str, Any] | None:
    """Why it is not running, and what to do about it, where that is not as it should be."""
    status, state = story.status, story.state
    if state not in ("failed", "stale", "stopped"):
        return None
    epoch, epochs = status.get("epoch", 0), status.get("epochs", story.config["train.epochs"])
    where = f"in epoch {epoch} of {epochs}, after {counted(status.get('step', 0), 'step')}"
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
    rows.append(("start", beginning(story.config)))
    if names := story.classes:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        rows.append(("classes", ", ".join(names[:MOST_NAMED]) + more))
    if story.split:
        rows.append(("split", story.split))
    hosts = status.get("hosts", {})
    if hosts:
        some = list(hosts.items())[:MOST_NAMED]
        named = ", ".join(f"{host} ({counted(count, 'rank')})" for host, count in some)
        more = f" and {len(hosts) - MOST_NAMED} more" if len(hosts) > MOST_NAMED else ""
        rows.append((f"host{'s' * (len(hosts) > 1)}", named + more))
    if version := status.get("version"):
        commit = f", commit {status['commit']}" if status.get("commit") else ""
        rows.append(("software", f"hvd_eurosat {version}{commit}"))
    starts = status.get("starts", [])
    if starts:
        rows.append(("started", moment(starts[0]["time"])))
    resumes = [f"after epoch {s['epoch']}, step {s['step']:,} ({moment(s['time'])})" for s in starts[1:]]
    if resumes:
        rows.append((f"resumed {counted(len(resumes), 'time')}", "; ".join(resumes)))
    return rows


def stand(story: Story) -> list[dict[str, Any]]:
    """Where it stands, in a few large figures: label, value, note; since: of a note that grows old while it is read."""
    status, tiles = story.status, []

    def tile(label: str, value: str, note: str = "", since: float | None = None) -> None:
        tiles.append({"label": label, "value": value, "note": note, "since": since})

    trained = story.of("train")
    epochs = int(story.config["train.epochs"])
    done = trained[-1]["epoch"] if trained else 0
    tile("epoch", f"{status.get('epoch', done)} of {epochs}", f"{done} complete")
    if story.state == "running" and status.get("seconds_left") is not None:
        tile("left", span(status["seconds_left"]), status.get("phase", ""))
    else:
        seconds = sum(e.get("seconds", 0.0) for e in trained)
        tile("trained for", span(seconds) if trained else "less than an epoch", counted(status.get("step", 0), "step"))
    rate = status.get("images_per_second") or (trained[-1].get("images_per_second") if trained else None)
    if rate:
        tile("speed", f"{rate:,.0f}", "images per second, all ranks")
    if best := story.best:
        tile("best validation", percent(best["accuracy"]), f"after epoch {best['epoch']}")
    if story.tested:
        tile("test", percent(story.tested.share), f"{story.tested.correct:,} of {story.tested.total:,} images")
    if story.checkpoints:
        newest = story.checkpoints[-1]
        live = story.state == "running"
        old = span(float(status.get("updated") or time.time()) - newest["time"])
        note = f"{old} old" if live else newest["file"]
        tile("last checkpoint", f"epoch {newest['epoch']}", note, newest["time"] if live else None)
    return tiles
