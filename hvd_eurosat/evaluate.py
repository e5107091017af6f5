"""Tell how good a checkpoint is on a split: a table by class, and the accuracy with its counts.

python -m hvd_eurosat.evaluate --checkpoint runs/finetune/checkpoints/best.json --data.root data --split test
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.evaluate)  # before the imports below, which take seconds

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import EvaluateSettings
from hvd_eurosat.data.batches import Batch, open_images, ordered_batches
from hvd_eurosat.data.folder import file_batches, find_images, folder_labels
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.predictions import write_predictions
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.files import make_folder
from hvd_eurosat.training.inference import log_probabilities
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.precision import precision_of
from hvd_eurosat.weights.keras_json import read_layers


@dataclass(frozen=True)
class Work:
    """What is to be evaluated. names: as in output_1.h5; labels: int64 [N], if known; batches: this rank's share."""

    names: list[str]
    files: list[Path]
    labels: NDArray[np.int64] | None
    batches: Iterable[Batch]


def main(world: World, settings: EvaluateSettings) -> None:
    """Spread the images over the ranks in whole batches: the counts are the same on any number of ranks."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    world.on_main(lambda: check_expected(settings, saved))
    work = from_folder(world, settings, saved) if settings.input else from_split(world, settings, saved)
    if settings.out:
        world.on_main(lambda: make_folder(Path(settings.out or ""), "--out"))
    model, precision = saved.build_model(world.device), precision_of(settings.precision, saved.precision)
    values = log_probabilities(world, model, work.batches, saved.data, precision)
    if not world.is_main:
        return
    display = Display(speaks=True)
    display.say(f"{len(work.names):,} images, {precision.name}")
    if settings.out:
        write_predictions(settings.out, work.names, work.files, values, saved.classes)
        display.say(f"{len(work.names):,} predictions in {settings.out}")
    if work.labels is not None:
        split = settings.input.name if settings.input else settings.split
        display.result(split, Evaluation.of(values, work.labels), saved.classes)


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
    tree = world.together(lambda: open_tree(settings.data.root))
    if list(tree.classes) != saved.classes:
        raise SharedError(
            f"checkpoint {settings.checkpoint} knows the classes {', '.join(saved.classes)}; "
            f"{settings.data.root} has {', '.join(tree.classes)}"
        )
    split = settings.split
    images = open_images(world, tree, [split], saved.data, settings.data)[split]
    batches = ordered_batches(images, batch_size(settings, saved), world.rank, world.size)
    files = tree.files(split)
    names = [name.removeprefix(f"{split}/") for name in files]
    return Work(names, [tree.root / name for name in files], tree.labels(split), batches)


def from_folder(world: World, settings: EvaluateSettings, saved: Checkpoint) -> Work:
    """The images of settings.input. Collective."""
    folder = Path(settings.input or "")
    files = world.together(lambda: find_images([folder]))
    world.agree("input", {"files": list(files)})
    names, paths = list(files), list(files.values())
    labels = world.together(lambda: folder_labels(names, saved.classes, str(folder)))
    if labels is None and not settings.out:
        raise SharedError(f"{folder} has no class folders, so there is no accuracy: give --out for predictions")
    size, resizes = batch_size(settings, saved), settings.expected.get("image_size") != 0
    batches = file_batches(paths, saved.data, size, world.device, world.rank, world.size, resizes)
    return Work(names, paths, labels, batches)


def batch_size(settings: EvaluateSettings, saved: Checkpoint) -> int:
    """Images per step."""
    return settings.batch_size or int(saved.config["valid"]["batch_size"])


if __name__ == "__main__":
    job.run(verbs.evaluate, main)
