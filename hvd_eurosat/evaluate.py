"""How good a checkpoint is on a split, as a table per class and an accuracy with its counts.

python -m hvd_eurosat.evaluate --checkpoint runs/finetune/checkpoints/best.json --data.root data --split test
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hvd_eurosat import cluster
from hvd_eurosat.cluster import World
from hvd_eurosat.config import Place, Settings, UserPath, read
from hvd_eurosat.data.batches import open_images, ordered_batches
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.display import Display
from hvd_eurosat.training.metrics import evaluate
from hvd_eurosat.training.precision import Precision


class EvaluateSettings(Settings):
    """How good a checkpoint is on a split; batches and precision are those of the run that saved it."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    split: Literal["train", "valid", "test"] = "test"
    """which images"""
    data: Place = Place()


def load(argv: Sequence[str]) -> EvaluateSettings:
    """The settings that a command line asks for."""
    return read(EvaluateSettings, argv, "evaluate")


def main(world: World, settings: EvaluateSettings) -> None:
    """Spread the split over the ranks in whole batches: the counts are the same on any number of ranks."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    tree = world.together(lambda: open_tree(settings.data.root))
    world.agree("data", {"classes": tree.classes, "content": tree.digest})
    if list(tree.classes) != saved.classes:
        raise cluster.SharedError(
            f"checkpoint {settings.checkpoint} knows the classes {', '.join(saved.classes)}; "
            f"{settings.data.root} has {', '.join(tree.classes)}"
        )
    image_size, batch_size = saved.config["data"]["image_size"], saved.config["valid"]["batch_size"]
    images = open_images(world, tree, [settings.split], image_size, settings.data.cache_dir)[settings.split]
    model = saved.build_model(world.device)
    mine = ordered_batches(images, batch_size, world.rank, world.size)
    evaluation = evaluate(model, mine, Precision(saved.precision), world)
    Display(world.is_main).result(settings.split, evaluation, tree.classes)


if __name__ == "__main__":
    cluster.run(load, main)
