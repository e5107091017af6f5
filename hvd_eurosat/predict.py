"""Predict the class of each image in files and folders: log-probabilities as HDF5, classes as CSV.

python -m hvd_eurosat.predict --checkpoint runs/finetune/checkpoints/best.json --input patches --out predictions
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.predict)  # before the imports below, which take seconds

import os
import sys
import time
from codecs import BOM_UTF8
from pathlib import Path

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.verbs import PredictSettings
from hvd_eurosat.data.folder import Seen, agree_on_bad, file_batches, find_images
from hvd_eurosat.errors import UserError
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.predictions import INCOMPLETE, check_top, output_folder, tell, write_predictions
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.inference import Network, infer, join, mean_of_views, tempered
from hvd_eurosat.training.precision import precision_of


def main(world: World, settings: PredictSettings) -> int:
    """Spread the images over the ranks in batches; rank 0 writes them in the order of their names."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    world.on_main(lambda: check_top(settings.top, saved.classes))
    listed = world.on_main(lambda: read_list(settings.list))
    images = world.together(lambda: find_images(settings.input, listed))
    names, paths, skip = list(images.paths), list(images.paths.values()), settings.skip_bad
    world.agree("input", {"files": names})
    with output_folder(world, settings.out, "--out"):
        began, seen = time.perf_counter(), Seen.before(images)
        precision, size = precision_of(settings.precision, saved.precision), saved.batch_size(0, world.device)
        batches = file_batches(paths, saved.data, saved.wants, size, world.device, world.rank, world.size, seen, skip)
        views = saved.views(settings.views)
        network = Network(saved.build_model(world.device), saved.data, precision, views)
        mine = infer(world, network, batches)
        seen = agree_on_bad(world, seen, paths, skip)
        values = mean_of_views(join(world, network, mine))
        if world.is_main:
            values = values if settings.raw else tempered(values, saved.temperature(views))
            rate = len(paths) / (time.perf_counter() - began)
            write_predictions(settings.out, names, paths, values, saved.classes, settings.top, seen.bad)
            display, count = Display(speaks=True), len(paths) - len(seen.bad)
            tell(display, images, seen, saved.data.image_size)
            display.say(f"{count:,} predictions in {settings.out}, {precision.name}, {rate:,.0f} images/s")
    return INCOMPLETE if settings.strict and seen.bad else 0


def read_list(source: Path | None) -> list[str]:
    """The lines of a file, or of standard input, that are not blank. Raises UserError."""
    if source is None:
        return []
    try:
        text = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
    except OSError as error:
        raise UserError(f"--list {source}: {error.strerror}") from None
    if b"\0" in text:
        raise UserError(f"--list {source} is no text in UTF-8 with a path on each line")
    lines = [line.removesuffix("\r") for line in os.fsdecode(text.removeprefix(BOM_UTF8)).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"--list {source}: it names no files")
    return lines


if __name__ == "__main__":
    job.run(verbs.predict, main)
