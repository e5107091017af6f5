"""Runs made of files alone, as training leaves them, for the tests of what shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.config.schema import Config
from hvd_eurosat.run.examples import EXAMPLES, write_examples
from hvd_eurosat.training.metrics import Evaluation

CLASSES = ["Forest", "Pasture", "River"]
NOW = 1_700_000_000.0  # seconds since 1970


def judged() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint8]]:
    """Log-probabilities, labels and images of 60 of each class: of the pastures 12 are taken for rivers, surely."""
    labels = np.repeat(np.arange(3), 60)
    random = np.random.default_rng(0)
    given = labels.copy()
    given[60:72] = 2
    sure = random.uniform(0.4, 0.99, len(labels))
    sure[60:72] = np.linspace(0.6, 0.99, 12)
    probabilities = np.full((len(labels), 3), ((1 - sure) / 2)[:, None])
    probabilities[np.arange(len(labels)), given] = sure
    images = random.integers(0, 256, (len(labels), 64, 64, 3), dtype=np.uint8)
    return np.log(probabilities).astype(np.float32), labels.astype(np.int64), images


def confusion() -> list[list[int]]:
    """Of `judged`."""
    return [[60, 0, 0], [0, 48, 12], [0, 0, 60]]


def grow_run(
    folder: Path, state: str = "done", epochs: int = 3, status: dict[str, Any] | None = None, **keys: Any
) -> Path:
    """A run after so many epochs. status: what its status.json says beside the usual; keys: section__key=value."""
    (folder / "checkpoints").mkdir(parents=True)
    sections: dict[str, dict[str, Any]] = {"data": {"root": "data/Patches"}, "train": {"epochs": 4}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    config = Config(**sections)
    (folder / "config.toml").write_text(config.to_toml())
    events = [{"event": "start", "epoch": 0, "step": 0}]
    for epoch in range(1, epochs + 1):
        events += epoch_events(epoch)
        record = {"epoch": epoch, "step": 10 * epoch, "samples": 0, "metric": 0.5 + 0.1 * epoch, "world_size": 2}
        blob = {"file": f"epoch-{epoch:04d}.pt", "size": 1000, "sha256": f"{epoch:064x}"}
        path = folder / "checkpoints" / f"epoch-{epoch:04d}.json"
        path.write_text(json.dumps({"format": 2, **record, "content": blob, "frozen": None, "versions": {}}))
    if state == "done":
        values, labels, images = judged()
        found = Evaluation.of(values, labels).event()
        events += [{"event": "test", "epoch": epochs, **found, "seconds": 1}, {"event": "end", "epoch": epochs}]
        names = [f"{CLASSES[label]}/{n}.jpg" for n, label in enumerate(labels)]
        write_examples(folder / EXAMPLES, names, values, labels, images, epochs)
        (folder / "summary.json").write_text(json.dumps({"classes": CLASSES, "epochs": epochs, "train_images": 900}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    known = {
        "state": state,
        "updated": NOW,
        "version": "0.1.0",
        "starts": [{"time": NOW - 900, "epoch": 0, "step": 0, "world_size": 2}],
        "epoch": min(epochs + (state != "done"), 4),
        "epochs": 4,
        "step": 10 * epochs + 3 * (state != "done"),
        "hosts": {"node1": 1, "node2": 1},
        "header": {"recipe": "recipes/finetune.toml -> runs/first", "network": "resnet50, weights imagenet"},
        "classes": CLASSES,
        "synthetic": False,
        "images": {"train": 900, "valid": 180, "test": 180},
        "split": "94:5:1 by prepare, at random by seed 0 (digest abc)",
        "ranks": [{"rank": 0, "host": "node1", "step_seconds": 0.2}, {"rank": 1, "host": "node2", "step_seconds": 0.3}],
    }
    (folder / "status.json").write_text(json.dumps(known | (status or {})))
    return folder


def epoch_events(epoch: int) -> list[dict[str, Any]]:
    """The third skipped a step, and had a straggler."""
    third = epoch == 3
    stragglers = [{"rank": 1, "host": "node2", "slower": 0.5}] if third else []
    both = {"epoch": epoch, "step": 10 * epoch}
    rates = {"learning_rate": 0.01, "images_per_second": 200.0, "seconds": 90.0}
    train = {"loss": 1 / epoch, "accuracy": 0.5, **rates, "skipped_steps": int(third), "stragglers": stragglers}
    valid = {"loss": 1.1 / epoch, "accuracy": 0.5 + 0.1 * epoch, "confusion": confusion(), "seconds": 2.0}
    return [{"event": "train", **both, **train}, {"event": "valid", **both, **valid}]
