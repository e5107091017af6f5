"""Predictions: each image once, in one order, on any number of ranks."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.parallel.conftest import Launch, checkpoint_file


def test_predictions_are_the_same_on_any_number_of_ranks(
    launch: Launch, data: Path, trained: Path, tmp_path: Path
) -> None:
    best = checkpoint_file(trained, "best.json")
    tables = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        job = launch("mpirun", ranks, "predict", "--checkpoint", best, "--input", data / "test", "--out", out)
        assert job.returncode == 0, job.stderr
        tables.append(list(csv.DictReader((out / "predictions.csv").read_text().splitlines())))
    assert tables[0] == tables[1] == tables[2]
    assert len({(tmp_path / str(ranks) / "output_1.h5").read_bytes() for ranks in (1, 2, 3)}) == 1
    images = sorted(str(path) for path in (data / "test").rglob("*.jpg"))
    assert [row["file"] for row in tables[0]] == images
    assert all(0.1 <= float(row["probability"]) <= 1 for row in tables[0])


def test_no_images_and_bad_images(launch: Launch, trained: Path, tmp_path: Path) -> None:
    best = checkpoint_file(trained, "best.json")
    (tmp_path / "patches").mkdir()
    for content, message in ((None, "no images in "), (b"text", "not a readable JPEG, PNG or TIFF image")):
        if content:
            (tmp_path / "patches" / "a.jpg").write_bytes(content)
        arguments = ("--checkpoint", best, "--input", tmp_path / "patches", "--out", tmp_path / "out")
        job = launch("python", 1, "predict", *arguments)
        assert job.returncode == 2
        assert message in job.stderr
        assert not (tmp_path / "out" / "predictions.csv").exists()
