"""Validation by rank 0 alone and by all ranks, of the network in model.weights, on as many ranks as it is started on.

Prints, on rank 0, the loss and the number of correct images of each.
"""

from __future__ import annotations

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import open_images
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training.metrics import evaluate
from hvd_eurosat.training.precision import choose_precision
from hvd_eurosat.weights.loading import load_weights


def main(world: World, config: Config) -> None:
    """Both ways."""
    tree = open_tree(config.data.root)
    images = open_images(world, tree, ["valid"], config.data, config.data)["valid"]
    model = build(config.model.arch, len(tree.classes), config.model.trainable, seed=0)
    load_weights(model, config.model)
    precision = choose_precision(world, config.train.precision)
    for sharded in (False, True):
        one = config.model_copy(update={"valid": config.valid.model_copy(update={"sharded": sharded})})
        found = evaluate(world, one, model, precision, images, lambda: False)
        if world.is_main:
            print(f"validation {found.loss!r} {found.correct}")


if __name__ == "__main__":
    job.run(load, main)
