"""run.metrics_file: a run's status as a Prometheus textfile, which node_exporter's textfile collector reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATES = ("running", "stopped", "done", "failed")
# The name after hvd_eurosat_ and what it means; the unit is in both. docs/watching.md lists them.
GAUGES = {
    "updated": ("updated_timestamp_seconds", "When this was written, in seconds since 1970"),
    "epoch": ("epoch", "Epoch in progress, from 1"),
    "epochs": ("epochs", "Epochs of the run"),
    "step": ("step", "Optimiser steps made in all"),
    "samples": ("epoch_images", "Images that all ranks have trained on in this epoch"),
    "loss": ("loss", "Training loss in this epoch so far, of rank 0's images; of all when it is complete"),
    "accuracy": ("accuracy_ratio", "Training accuracy in this epoch so far, 0 to 1, of the same images"),
    "learning_rate": ("learning_rate", "Learning rate of the last step"),
    "images_per_second": ("images_per_second", "Training images per second, of all ranks"),
    "seconds_left": ("left_seconds", "Seconds until the last epoch ends, estimated"),
    "valid_accuracy": ("valid_accuracy_ratio", "Accuracy of the last validation, 0 to 1"),
    "best_valid_accuracy": ("best_valid_accuracy_ratio", "Best accuracy of a validation so far, 0 to 1"),
    "test_accuracy": ("test_accuracy_ratio", "Accuracy on the test images, 0 to 1; at the end"),
    "skipped_steps": ("skipped_steps", "Steps skipped because loss or gradients were not finite"),
}


def write_textfile(path: Path, run: str, status: Mapping[str, Any]) -> None:
    """Replace the file whole. run: the label that tells runs apart. Raises OSError."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()

    def put(name: str, meaning: str, value: float, **labels: str) -> None:
        gauges[name] = gauges.get(name) or Gauge(f"hvd_eurosat_{name}", meaning, ["run", *labels], registry=registry)
        gauges[name].labels(run, *labels.values()).set(value)

    gauges: dict[str, Gauge] = {}
    for state in STATES:
        put("state", "1 for the state that the run is in, 0 for the others", status["state"] == state, state=state)
    for key, (name, meaning) in GAUGES.items():
        if status.get(key) is not None:
            put(name, meaning, status[key])
    if checkpoint := status.get("checkpoint"):
        put("checkpoint_timestamp_seconds", "When the newest checkpoint was written", checkpoint["time"])
        put("checkpoint_step", "Optimiser steps of the newest checkpoint", checkpoint["step"])
    for one in status.get("ranks", []):
        meaning = "Seconds that the rank worked on a step, in the last whole epoch; waiting for others does not count"
        put("rank_step_seconds", meaning, one["step_seconds"], rank=str(one["rank"]), host=one["host"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)
