"""Tell how good a checkpoint is on a split: a table by class, and the accuracy with its counts.

python -m hvd_eurosat.evaluate --checkpoint runs/finetune/checkpoints/best.json --data.root data --split test
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.evaluate)  # before the imports below, which take seconds

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import EvaluateSettings
from hvd_eurosat.data.batches import Batch, open_images, ordered_batches
from hvd_eurosat.data.folder import Images, Seen, agree_on_bad, class_numbers, file_batches, find_labelled
from hvd_eurosat.data.listing import normal
from hvd_eurosat.data.tree import Tree, open_tree, split_of
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.predictions import INCOMPLETE, check_top, output_folder, tell, write_predictions
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.inference import Network, Values, infer, join, mean_of_views, tempered
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.precision import precision_of
from hvd_eurosat.training.scores import mcnemar
from hvd_eurosat.training.trained_on import count_known
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
        work, raw = ask(world, settings, saved)
        against = ask_other(world, settings, saved.classes) if settings.against else None
        if world.is_main:
            tell_results(settings, saved, work, raw, against)
    return INCOMPLETE if settings.strict and work.seen.bad else 0


def ask(world: World, settings: EvaluateSettings, saved: Checkpoint) -> tuple[Work, Values]:
    """The images, and the checkpoint's log-probabilities of them, without temperature, on rank 0. Collective."""
    work = from_folder(world, settings, saved) if settings.input else from_split(world, settings, saved)
    precision, views = precision_of(settings.precision, saved.precision), saved.views(settings.views)
    network = Network(saved.build_model(world.device), saved.data, precision, views)
    mine = infer(world, network, work.batches)
    seen = agree_on_bad(world, work.seen, list(work.images.paths.values()), settings.skip_bad)
    return replace(work, seen=seen), mean_of_views(join(world, network, mine))


def ask_other(world: World, settings: EvaluateSettings, classes: list[str]) -> Values:
    """The log-probabilities of --against. Collective."""
    other = settings.model_copy(update={"checkpoint": settings.against})
    saved = world.on_main(lambda: checkpoint.load(other.checkpoint))
    if saved.classes != classes:
        raise SharedError(f"--against {settings.against} knows other classes: {', '.join(saved.classes)}")
    return ask(world, other, saved)[1]


def tell_results(
    settings: EvaluateSettings, saved: Checkpoint, work: Work, raw: Values, against: Values | None
) -> None:
    """Write and print, on rank 0, what came out. raw, against: log-probabilities [N, C] without temperature."""
    names, files, bad = list(work.images.paths), list(work.images.paths.values()), work.seen.bad
    display, good = Display(speaks=True), np.setdiff1d(np.arange(len(names)), list(bad))
    temperature = 1.0 if settings.raw else saved.temperature(saved.views(settings.views))
    values = tempered(raw, temperature)
    tell(display, work.images, work.seen, saved.data.image_size)
    display.say(f"{len(good):,} images, {precision_of(settings.precision, saved.precision).name}")
    if settings.out:
        write_predictions(settings.out, names, files, values, saved.classes, settings.top, bad)
        display.say(f"{len(good):,} predictions in {settings.out}")
    if work.labels is None:
        return
    labels = work.labels[good]
    if against is not None:
        display.say(compare(values[good], against[good], labels, settings.against))
    if temperature != 1:
        without = Evaluation.of(raw[good], labels)
        display.say(
            f"temperature {temperature:.3f}, without which negative log-likelihood {without.loss:.4f}, "
            f"calibration error {100 * without.calibration_error:.2f}%"
        )
    split = settings.input.name if settings.input else settings.split
    display.result(split, Evaluation.of(values[good], labels), saved.classes)


def compare(values: Values, others: Values, labels: NDArray[np.int64], name: Path | None) -> str:
    """A line on whether two networks differ, from their log-probabilities [N, C] of the same images."""
    first, second = (one.argmax(1) == labels for one in (values, others))
    alone, other_alone = int((first & ~second).sum()), int((second & ~first).sum())
    return (
        f"against {name}, {100 * second.mean():.2f}% ({second.sum()}/{len(labels)}): {alone} images are right here "
        f"alone, {other_alone} there alone, McNemar's p = {mcnemar(alone, other_alone):.2g}"
    )


def check_expected(settings: EvaluateSettings, saved: Checkpoint) -> None:
    """Raise UserError where an rmldnn configuration asks for other images or another network than the checkpoint's."""
    data, model = Data(**saved.config["data"]), Model(**saved.config["model"])
    expected = dict(settings.expected)
    if layers := expected.pop("layers", None):
        architecture = read_layers(Path(layers))
        details, side = architecture.details, architecture.image_size
        if side not in (None, data.input_side):
            taken = f"neural_network.layers {layers} takes images of {side}x{side} pixels"
            raise UserError(f"{taken}; the checkpoint has {data.input_side}")
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
    tree = world.together(lambda: open_tree(settings.data.root).brought_to(saved.wants))
    if list(tree.classes) != list(map(normal, saved.classes)):
        raise SharedError(
            f"checkpoint {settings.checkpoint} knows the classes {', '.join(saved.classes)}; "
            f"{settings.data.root} has {', '.join(tree.classes)}"
        )
    split = settings.split
    if world.is_main:
        tell_of_split(settings, saved, tree)
    images = open_images(world, tree, [split], saved.data, settings.data)[split]
    size = saved.batch_size(settings.batch_size, world.device)
    batches = ordered_batches(images, size, world.rank, world.size)
    paths = {name.removeprefix(f"{split}/"): tree.path(name) for name in tree.files(split)}
    return Work(Images(paths, tree.notes), tree.labels(split), batches)


def tell_of_split(settings: EvaluateSettings, saved: Checkpoint, tree: Tree) -> None:
    """Say on rank 0 which split the images are of, and warn where the checkpoint was trained on some of them."""
    display, asked = Display(speaks=True), settings.split
    if settings.checkpoint != settings.against:  # of whose images it was said before
        display.say(f"{asked} images of {settings.data.root}, split {split_of(tree)}")
    known = count_known(tree, asked, saved, settings.checkpoint)
    if known is None:
        display.note(f"nobody can tell whether {settings.checkpoint} was trained on them: their digests are not known")
    elif known:
        of = f"{known:,} of these {len(tree.files(asked)):,} images"
        display.warn(f"{settings.checkpoint} was trained on {of}, so its accuracy on them says little of others")


def from_folder(world: World, settings: EvaluateSettings, saved: Checkpoint) -> Work:
    """The images of settings.input. Collective."""
    folder = Path(settings.input or "")
    images, labels = world.together(lambda: find_labelled(folder))
    names, paths = list(images.paths), list(images.paths.values())
    world.agree("input", {"files": names})
    if not labels and (settings.against or not settings.out):
        cure = "leave out --against" if settings.against else "give --out for predictions"
        raise SharedError(f"{folder} has no class folders, so there is no accuracy: {cure}")
    numbers = world.together(lambda: class_numbers(labels, names, saved.classes, str(folder)) if labels else None)
    size = saved.batch_size(settings.batch_size, world.device)
    resizes, seen = settings.expected.get("image_size") != 0, Seen.before(images)
    place = world.device, world.rank, world.size
    batches = file_batches(paths, saved.data, saved.wants, size, *place, seen, settings.skip_bad, resizes)
    return Work(images, numbers, batches, seen)


if __name__ == "__main__":
    job.run(verbs.evaluate, main)
