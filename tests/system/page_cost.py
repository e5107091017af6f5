"""What the page of a run costs: CPU seconds of writing it, and how often a job does.

    .venv/bin/python -m tests.system.page_cost                     a run of 10 classes after 50 epochs, made of files
    .venv/bin/python -m tests.system.page_cost --data.root …       a real job, with any keys of train; mpirun before it

CPU seconds are those of the thread that writes (time.thread_time), which is not training's.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hvd_eurosat import train
from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.sample import SCENES
from hvd_eurosat.run import signs
from hvd_eurosat.run.page import write_page
from tests.unit.runs import confusion, grow_run

SPENT: list[float] = []


def timed(folder: Path) -> Path:
    """The same, its CPU seconds noted."""
    before = time.thread_time()
    path = write_page(folder)
    SPENT.append(time.thread_time() - before)
    return path


def made_up() -> None:
    """First, with its imports, and the median of 20 more; with the images of 36 confused and others."""
    with tempfile.TemporaryDirectory() as place:
        folder = grow_run(Path(place) / "run", epochs=50, train__epochs=50, status={"classes": list(SCENES)})
        text, counts = (folder / "metrics.jsonl").read_text(), (np.eye(10, dtype=int) * 131 + 1).tolist()
        (folder / "metrics.jsonl").write_text(text.replace(json.dumps(confusion()), json.dumps(counts)))
        size = [timed(folder) for _ in range(21)][-1].stat().st_size
    print(f"first {SPENT[0]:.3f} s of CPU, then {statistics.median(SPENT[1:]):.3f}; {size:,} bytes")


def main(world: World, config: Config) -> int:
    """Train, and say what the page took of it."""
    status = train.train(world, config)
    if world.is_main:
        events = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(event.get("seconds", 0.0) for event in events if event["event"] in ("train", "valid"))
        each = f"{min(SPENT):.3f} to {max(SPENT):.3f} s of CPU each, {sum(SPENT):.3f} s in all"
        share = f"{100 * sum(SPENT) / seconds:.3f} % of a core in {seconds:.1f} s of epochs"
        print(f"written {len(SPENT)} times in {config.train.epochs} epochs, {each}: {share}")
    return status


if __name__ == "__main__":
    signs.write_page = timed  # type: ignore[attr-defined]
    made_up() if len(sys.argv) == 1 else job.run(load, main)
