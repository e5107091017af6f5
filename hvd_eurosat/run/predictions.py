"""The files that hold predictions: log-probabilities as HDF5, classes as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.training.inference import Values

HDF5, CSV = "output_1.h5", "predictions.csv"


def write_predictions(
    out: Path, names: Sequence[str], files: Sequence[Path], values: Values, classes: Sequence[str]
) -> None:
    """output_1.h5 and predictions.csv in the folder out, in the order given.

    The HDF5 file holds a dataset, float32 [classes], for each name, whose folders are its groups (as rmldnn's does);
    its attribute `classes` names what the numbers stand for.
    """
    import h5py

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
