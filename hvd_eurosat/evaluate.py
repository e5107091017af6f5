"""Tell how good a checkpoint is on a split: a table by class, and the accuracy with its counts.

python -m hvd_eurosat.evaluate --checkpoint runs/finetune/checkpoints/best.json --data.root data --split test
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.evaluate)  # before the imports below, which take seconds

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import EvaluateSettings
from hvd_eurosat.data.batches import Batch, open_images, ordered_batches
from hvd_eurosat.data.folder import Images, Seen, agree_on_bad, class_numbers, file_batches, find_labelled
from hvd_eurosat.data.layout import normal
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.predictions import INCOMPLETE, check_top, output_folder, tell, write_predictions
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.inference import infer, join
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.precision import precision_of
from hvd_eurosat.weights.keras_json import read_layers


@dataclass(frozen=True)
class Work:
    """What is to be evaluated, named as in output_1.h5. labels: int64 [N], if known; batches: this rank's share."""

    images: Images
    labels: NDArray[np.int64] | None
    batches: Iterable[Batch]
    seen: Seen = field(default_factory=Seen)


def main(world: World, settings: EvaluateSettings) -> int:
    """Spread the images over the ranks in whole batches: the counts are the same on any number of ranks."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    world.on_main(lambda: check_expected(settings, saved))
    world.on_main(lambda: check_top(settings.top, saved.classes))
    with output_folder(world, settings.out, "--out"):
        work = from_folder(world, settings, saved) if settings.input else from_split(world, settings, saved)
        names, files = list(work.images.paths), list(work.images.paths.values())
        model, precision = saved.build_model(world.device), precision_of(settings.precision, saved.precision)
        mine = infer(world, model, work.batches, saved.data, precision)
        seen = agree_on_bad(world, work.seen, files, settings.skip_bad)
        values = join(world, mine, model)
        if world.is_main:
            display, good = Display(speaks=True), np.setdiff1d(np.arange(len(names)), list(seen.bad))
            tell(display, work.images, seen, saved.data.image_size)
            display.say(f"{len(good):,} images, {precision.name}")
            if settings.out:
                write_predictions(settings.out, names, files, values, saved.classes, settings.top, seen.bad)
                display.say(f"{len(good):,} predictions in {settings.out}")
            if work.labels is not None:
                split = settings.input.name if settings.input else settings.split
                display.result(split, Evaluation.of(values[good], work.labels[good]), saved.classes)
    return INCOMPLETE if settings.strict and seen.bad else 0


def check_expected(settings: EvaluateSettings, saved: Checkpoint) -> None:
    """Raise UserError where an rmldnn configuration asks for other images or another network than the checkpoint's."""
    data, model = Data(**saved.config["data"]), Model(**saved.config["model"])
    expected = dict(settings.expected)
    if layers := expected.pop("layers", None):
        architecture = read_layers(Path(layers))
        details, side = architecture.details, architecture.image_size
        if side not in (None, data.image_size):
            taken = f"neural_network.layers {layers} takes images of {side}x{side} pixels"
            raise UserError(f"{taken}; the checkpoint has {data.image_size}")
        if details != Details.of(model):
            raise UserError(f"neural_network.layers {layers} is of {details}; the checkpoint has {Details.of(model)}")
    if expected.get("image_size") == 0:  # the images' own, which `from_folder` compares
        del expected["image_size"]
    for key, value in expected.items():
        known = getattr(data, key)
        if known != value:
            raise UserError(f"neural_network.data.transforms mean {key} {value}; the checkpoint has {known}")


def from_split(world: World, settings: EvaluateSettings, saved: Checkpoint) -> Work:
    """The images of data.root. Collective."""
    if settings.skip_bad:
        raise SharedError("--skip-bad goes with --input; of a split tree, prepare --skip-bad makes a good one")
    tree = world.together(lambda: open_tree(settings.data.root))
    world.agree("data", {"classes": tree.classes, "content": tree.digest})
    if list(tree.classes) != list(map(normal, saved.classes)):
        raise SharedError(
            f"checkpoint {settings.checkpoint} knows the classes {', '.join(saved.classes)}; "
            f"{settings.data.root} has {', '.join(tree.classes)}"
        )
    split = settings.split
    images = open_images(world, tree, [split], saved.data, settings.data)[split]
    batches = ordered_batches(images, batch_size(settings, saved), world.rank, world.size)
    paths = {name.removeprefix(f"{split}/"): tree.path(name) for name in tree.files(split)}
    return Work(Images(paths, tree.notes), tree.labels(split), batches)


def from_folder(world: World, settings: EvaluateSettings, saved: Checkpoint) -> Work:
    """The images of settings.input. Collective."""
    folder = Path(settings.input or "")
    images, labels = world.together(lambda: find_labelled(folder))
    names, paths = list(images.paths), list(images.paths.values())
    world.agree("input", {"files": names})
    if not labels and not settings.out:
        raise SharedError(f"{folder} has no class folders, so there is no accuracy: give --out for predictions")
    numbers = world.together(lambda: class_numbers(labels, names, saved.classes, str(folder)) if labels else None)
    size, resizes, seen = batch_size(settings, saved), settings.expected.get("image_size") != 0, Seen()
    place = world.device, world.rank, world.size
    batches = file_batches(paths, saved.data, size, *place, seen, settings.skip_bad, resizes)
    return Work(images, numbers, batches, seen)


def batch_size(settings: EvaluateSettings, saved: Checkpoint) -> int:
    """Images per step."""
    return settings.batch_size or int(saved.config["valid"]["batch_size"])


if __name__ == "__main__":
    job.run(verbs.evaluate, main)
