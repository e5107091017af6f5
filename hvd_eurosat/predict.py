"""Predict the class of each image in files and folders: log-probabilities as HDF5, classes as CSV.

python -m hvd_eurosat.predict --checkpoint runs/finetune/checkpoints/best.json --input patches --out predictions
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.predict)  # before the imports below, which take seconds

import time

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.verbs import PredictSettings
from hvd_eurosat.data.folder import file_batches, find_images
from hvd_eurosat.run.display import Display
from hvd_eurosat.run.predictions import write_predictions
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.files import make_folder
from hvd_eurosat.training.inference import log_probabilities
from hvd_eurosat.training.precision import precision_of


def main(world: World, settings: PredictSettings) -> None:
    """Spread the images over the ranks in batches; rank 0 writes them in the order of their names."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    files = world.together(lambda: find_images(settings.input))
    world.agree("input", {"files": list(files)})
    world.on_main(lambda: make_folder(settings.out, "--out"))
    began = time.perf_counter()
    paths, precision = list(files.values()), precision_of(settings.precision, saved.precision)
    batches = file_batches(paths, saved.data, saved.config["valid"]["batch_size"], world.device, world.rank, world.size)
    model = saved.build_model(world.device)
    values = log_probabilities(world, model, batches, saved.data, precision)
    if world.is_main:
        rate = len(files) / (time.perf_counter() - began)
        write_predictions(settings.out, list(files), paths, values, saved.classes)
        Display(speaks=True).say(
            f"{len(files):,} predictions in {settings.out}, {precision.name}, {rate:,.0f} images/s"
        )


if __name__ == "__main__":
    job.run(verbs.predict, main)
