"""Everything that must count the same on any number of ranks, in one job on as many as it is started on.

python -m tests.parallel.counted FOLDER CHECKPOINT DATA: validation by rank 0 alone and by all ranks, the evaluation of
every split, predictions of the test images into FOLDER/<ranks>. Rank 0 writes what it found to FOLDER/<ranks>.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from hvd_eurosat import evaluate, predict
from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import open_images
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import metrics
from hvd_eurosat.training.precision import choose_precision
from hvd_eurosat.weights.loading import load_weights
from tests.parallel.conftest import small

VALIDATION_BATCH = 7  # of 20 images: on 4 ranks the last has none


def validations(world: World, config: Config) -> list[tuple[float, int]]:
    """Loss and number of correct images of both ways. Collective."""
    tree = open_tree(config.data.root)
    images = open_images(world, tree, ["valid"], config.data, config.data)["valid"]
    model = build(config.model.arch, len(tree.classes), config.model.trainable, seed=0)
    load_weights(model, config.model)
    precision = choose_precision(world, config.train.precision)
    found = []
    for sharded in (False, True):
        one = config.model_copy(update={"valid": config.valid.model_copy(update={"sharded": sharded})})
        result = metrics.evaluate(world, one, model, precision, images, lambda: False)
        found.append((result.loss, result.correct))
    return found


def evaluations(world: World, checkpoint: str, data: str) -> dict[str, str]:
    """What `evaluate` prints last of each split. Collective."""
    lines = {}
    for split in SPLITS:
        words = ["--checkpoint", checkpoint, "--data.root", data, "--split", split]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluate.main(world, verbs.evaluate(words))
        lines[split] = printed.getvalue().splitlines()[-1] if world.is_main else ""
    return lines


def main(world: World, config: Config) -> None:
    """All of it."""
    folder, checkpoint, data = sys.argv[1:]
    out = Path(folder, str(world.size))
    found: dict[str, Any] = {"validations": validations(world, config)}
    found["evaluations"] = evaluations(world, checkpoint, data)
    predict.main(world, verbs.predict(["--checkpoint", checkpoint, "--input", f"{data}/test", "--out", str(out)]))
    if world.is_main:
        Path(folder, f"{world.size}.json").write_text(json.dumps(found))


def configure(words: list[str]) -> Config:
    """The configuration of the validations."""
    folder, checkpoint, data = words
    keys = {"valid__batch_size": VALIDATION_BATCH, "model__trainable": "all", "model__weights": checkpoint}
    return load(small(Path(data), Path(folder), **keys))


if __name__ == "__main__":
    job.run(configure, main)
