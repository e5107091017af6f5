"""The files that hold predictions: log-probabilities as HDF5, classes as CSV, and what was left out."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hvd_eurosat.cluster.world import World
from hvd_eurosat.data.folder import Images, Seen
from hvd_eurosat.data.images import list_flaws
from hvd_eurosat.errors import UserError
from hvd_eurosat.run.display import Display
from hvd_eurosat.training.files import make_folder, replacing, write_text
from hvd_eurosat.training.inference import Values

HDF5, CSV, SKIPPED = "output_1.h5", "predictions.csv", "skipped.csv"
INCOMPLETE = 3  # the exit status with --strict where files were left out
NONE: Mapping[int, str] = MappingProxyType({})


@contextmanager
def output_folder(world: World, out: Path | None, key: str) -> Iterator[None]:
    """Make the folder before the work; after an error it is gone again, if nothing was written. Collective."""
    made: list[Path] = []

    def make() -> None:
        if out:
            made.extend(folder for folder in (out, *out.parents) if not folder.exists())
            make_folder(out, key)

    world.together(lambda: make() if world.is_main else None)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_predictions(
    out: Path,
    names: Sequence[str],
    files: Sequence[Path],
    values: Values,
    classes: Sequence[str],
    top: int = 1,
    bad: Mapping[int, str] = NONE,
) -> None:
    """output_1.h5 and predictions.csv in the folder out, in the order given; skipped.csv of what is `bad`, by number.

    The HDF5 file holds a dataset, float32 [classes], for each name, whose folders are its groups (as rmldnn's does);
    its attribute `classes` names what the numbers stand for. The CSV has the same name first, then where the file is,
    and the `top` most likely classes with their probabilities. Where nothing is bad, an earlier skipped.csv is removed.
    """
    import h5py

    good = [number for number in range(len(names)) if number not in bad]
    with replacing(out / HDF5) as file, h5py.File(file, "w") as archive:
        archive.attrs["classes"] = list(classes)
        for number in good:
            archive[names[number]] = values[number]
    places = ["", *(f"_{n}" for n in range(2, top + 1))]
    heads = [f"{column}{place}" for place in places for column in ("class", "probability")]
    rows = []
    for number in good:
        row = values[number]
        pairs = [(classes[n], round(float(np.exp(row[n])), 6)) for n in np.argsort(-row, kind="stable")[:top]]
        rows.append((names[number], files[number], *itertools.chain(*pairs)))
    _write_table(out / CSV, [("name", "file", *heads), *rows])
    if bad:
        skipped = [(names[number], files[number], reason) for number, reason in bad.items()]
        _write_table(out / SKIPPED, [("name", "file", "reason"), *skipped])
    else:
        (out / SKIPPED).unlink(missing_ok=True)


def tell(display: Display, images: Images, seen: Seen, side: int) -> None:
    """What is not as its reader may think: what was left out, and scenes, which `side` pixels cannot show."""
    for note in images.notes:
        display.note(note)
    files = [str(path) for path in images.paths.values()]
    if seen.bad:
        flaws = {files[number]: reason for number, reason in seen.bad.items()}
        display.warn(list_flaws(f"{len(flaws):,} of {len(files):,} files cannot be used and are left out", flaws))
    if seen.scenes:
        first, (width, height) = next(iter(seen.scenes.items()))
        display.warn(
            f"{len(seen.scenes):,} of {len(files):,} images are far larger than what the network learnt from and "
            f"were squeezed to {side}x{side} pixels: {files[first]} has {width}x{height}; map is for whole scenes"
        )


def check_top(top: int, classes: Sequence[str]) -> None:
    """Raise UserError where there are not so many classes."""
    if top > len(classes):
        raise UserError(f"--top {top}: the checkpoint knows {len(classes)} classes")


def _write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(path, table.getvalue())
