"""The class of each image in files and folders: log-probabilities as HDF5, classes as CSV.

python -m hvd_eurosat.predict --checkpoint runs/finetune/checkpoints/best.json --input patches --out predictions
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from hvd_eurosat import cluster
from hvd_eurosat.cluster import World
from hvd_eurosat.config import Data, Settings, UserPath, read
from hvd_eurosat.data.folder import file_batches, find_images
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.display import Display
from hvd_eurosat.training.files import make_folder
from hvd_eurosat.training.inference import log_probabilities, write_predictions
from hvd_eurosat.training.precision import Precision


class PredictSettings(Settings):
    """The class of each image in files and folders; images of another size than the network's are resized."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    input: tuple[UserPath, ...]
    """images, and folders of images, searched with their subfolders"""
    out: UserPath
    """folder for output_1.h5 (log-probabilities) and predictions.csv (file, class, probability)"""


def load(argv: Sequence[str]) -> PredictSettings:
    """The settings that a command line asks for."""
    return read(PredictSettings, spread(argv), "predict")


def spread(argv: Sequence[str]) -> list[str]:
    """`--input a b` as a list in JSON, which takes any file name as it is."""
    words = list(argv)
    if "--input" in words:
        first = words.index("--input") + 1
        end = next((n for n in range(first, len(words)) if words[n].startswith("--")), len(words))
        words[first:end] = [json.dumps(words[first:end])] if end > first else []
    return words


def main(world: World, settings: PredictSettings) -> None:
    """Spread the images over the ranks in batches; rank 0 writes them in the order of their names."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    files = world.together(lambda: find_images(settings.input))
    world.agree("input", {"files": list(files)})
    world.on_main(lambda: make_folder(settings.out, "--out"))
    began = time.perf_counter()
    data, paths = Data(**saved.config["data"]), list(files.values())
    batches = file_batches(paths, data, saved.config["valid"]["batch_size"], world.device, world.rank, world.size)
    model = saved.build_model(world.device)
    values = log_probabilities(world, model, batches, data, Precision(saved.precision))
    if world.is_main:
        rate = len(files) / (time.perf_counter() - began)
        write_predictions(settings.out, list(files), paths, values, saved.classes)
        Display(speaks=True).say(f"{len(files):,} predictions in {settings.out}, {rate:,.0f} images/s")


if __name__ == "__main__":
    cluster.run(load, main)
