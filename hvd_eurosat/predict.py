"""The class of each image in files and folders, as a CSV file.

python -m hvd_eurosat.predict --checkpoint runs/finetune/checkpoints/best.json --input patches --out predictions
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hvd_eurosat import cluster
from hvd_eurosat.cluster import World
from hvd_eurosat.config import Settings, UserPath, read
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.images import BadImageError, decode, in_threads, to_array
from hvd_eurosat.errors import UserError
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.display import Display
from hvd_eurosat.training.files import write_text
from hvd_eurosat.training.precision import Precision

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
Prediction = tuple[str, str, float]


class PredictSettings(Settings):
    """The class of each image in files and folders; images of another size than the network's are resized."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    input: UserPath
    """an image, or a folder of images, searched with its subfolders"""
    out: UserPath
    """folder for predictions.csv: file, class, probability"""


def load(argv: Sequence[str]) -> PredictSettings:
    """The settings that a command line asks for."""
    return read(PredictSettings, argv, "predict")


def main(world: World, settings: PredictSettings) -> None:
    """Spread the images over the ranks in batches; rank 0 writes them in the order of their names."""
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    files = world.together(lambda: find_images(settings))
    world.agree("input", {"files": list(map(str, files))})
    world.on_main(lambda: make_folder(settings.out))
    batch_size = saved.config["valid"]["batch_size"]
    batches = [files[first : first + batch_size] for first in range(0, len(files), batch_size)]
    model = saved.build_model(world.device).eval()
    mine = world.together(lambda: [predict(world, saved, model, batch) for batch in batches[world.rank :: world.size]])
    every = world.gather(mine)
    if world.is_main:
        rows = [row for number in range(len(batches)) for row in every[number % world.size][number // world.size]]
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("file", "class", "probability"), *rows])
        write_text(settings.out / "predictions.csv", table.getvalue())
        Display(speaks=True).say(f"{len(rows):,} predictions in {settings.out / 'predictions.csv'}")


def find_images(settings: PredictSettings) -> list[Path]:
    """The images to predict, by name. Raises UserError if there are none."""
    found = [settings.input] if settings.input.is_file() else sorted(settings.input.rglob("*"))
    files = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"--input {settings.input}: no images there ({' '.join(sorted(SUFFIXES))})")
    return files


def make_folder(out: Path) -> None:
    """Before the work, so that a folder that cannot be made is known at once."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


@torch.no_grad()
def predict(world: World, saved: Checkpoint, model: torch.nn.Module, files: Sequence[Path]) -> list[Prediction]:
    """File, class and its probability of each image."""
    size = saved.config["data"]["image_size"]

    def pixels(path: Path) -> np.ndarray:
        try:
            return to_array(decode(path.read_bytes()), size)
        except (OSError, BadImageError) as error:
            raise UserError(f"{path}: {error}") from None

    images = torch.from_numpy(np.stack(list(in_threads(pixels, files, "decoding")))).to(world.device)
    with Precision(saved.precision).autocast(world.device):
        probabilities, classes = model(normalise(images.permute(0, 3, 1, 2))).exp().max(1)
    names = [saved.classes[index] for index in classes.tolist()]
    return [(str(path), name, round(p, 6)) for path, name, p in zip(files, names, probabilities.tolist(), strict=True)]


if __name__ == "__main__":
    cluster.run(load, main)
