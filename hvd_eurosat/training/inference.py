"""Log-probabilities of images, over all ranks, and the files that hold them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from hvd_eurosat.cluster import World
from hvd_eurosat.config import Data
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.training.precision import Precision

Values = NDArray[np.float32]
HDF5, CSV = "output_1.h5", "predictions.csv"


def log_probabilities(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision
) -> Values:
    """Of all samples that count, float32 [N, classes] on rank 0, [0, classes] on others. Collective.

    batches: this rank's share, every world.size-th one from its rank on. A UserError on one rank is raised on all.
    """
    mine = world.together(lambda: list(map(np.asarray, _infer(world, model, batches, data, precision))))
    every = world.gather(mine)
    count = sum(map(len, every)) if world.is_main else 0
    none = np.empty((0, model.fc.out_features), np.float32)
    return np.concatenate([none, *(every[n % world.size][n // world.size] for n in range(count))])


@torch.no_grad()
def _infer(
    world: World, model: LandCoverResNet, batches: Iterable[Batch], data: Data, precision: Precision
) -> list[torch.Tensor]:
    was_training = model.training
    model.eval()
    results = []
    for batch in batches:
        with precision.autocast(batch.images.device):
            results.append(model(normalise(batch.images, data))[: batch.total].cpu())
        world.tick()
    model.train(was_training)
    return results


def write_predictions(
    out: Path, names: Sequence[str], files: Sequence[Path], values: Values, classes: Sequence[str]
) -> None:
    """output_1.h5 and predictions.csv in the folder out, in the order given.

    The HDF5 file holds a dataset, float32 [classes], for each name, whose folders are its groups (as rmldnn's does);
    its attribute `classes` names what the numbers stand for.
    """
    with replacing(out / HDF5) as file, h5py.File(file, "w") as archive:
        archive.attrs["classes"] = list(classes)
        for name, row in zip(names, values, strict=True):
            archive[name] = row
    best = values.argmax(1)
    rows = [
        (path, classes[n], round(float(np.exp(row[n])), 6)) for path, n, row in zip(files, best, values, strict=True)
    ]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "class", "probability"), *rows])
    write_text(out / CSV, table.getvalue())
