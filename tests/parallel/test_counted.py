"""What must be the same on any number of ranks: validation, evaluation, predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.conftest import Launch, checkpoint_file, run, small, summary, under

RANKS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def small_run(launch: Launch, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose checkpoint is a third of the size of one that trained all weights."""
    run_dir = tmp_path_factory.mktemp("small")
    job = launch("python", 1, "train", *small(data, run_dir, train__epochs=1))
    assert job.returncode == 0, job.stderr
    return run_dir


@pytest.fixture(scope="module")
def folder(warm: str, data: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What counted.py left there, of the best checkpoint of the run."""
    out = tmp_path_factory.mktemp("counted")
    best = checkpoint_file(small_run, "best.json")
    for ranks in RANKS:
        words = ["-m", "tests.parallel.counted", str(out), str(best), str(data)]
        job = run(under("mpirun", ranks, warm, *words))
        assert job.returncode == 0, job.stderr
    return out


def found(folder: Path, what: str) -> Iterator[Any]:
    """Of each number of ranks."""
    for ranks in RANKS:
        yield json.loads((folder / f"{ranks}.json").read_text())[what]


def test_sharded_validation_counts_the_same(folder: Path) -> None:
    both_ways = [one for each in found(folder, "validations") for one in each]
    assert len(both_ways) == 8
    losses, correct = zip(*both_ways, strict=True)
    assert losses == pytest.approx([losses[0]] * 8, rel=1e-6)
    assert set(correct) == {correct[0]}


def test_evaluate_counts_the_same_on_any_number_of_ranks(folder: Path, small_run: Path) -> None:
    first, *others = found(folder, "evaluations")
    assert first.keys() == {"train", "valid", "test"}
    assert all(other == first for other in others)
    facts = summary(small_run)
    assert (
        first["test"] == f"test accuracy: {100 * facts['test_accuracy']:.2f}% ({round(20 * facts['test_accuracy'])}/20)"
    )


def test_predictions_are_the_same_on_any_number_of_ranks(folder: Path, data: Path) -> None:
    first, *others = ((folder / str(ranks) / "predictions.csv").read_text() for ranks in RANKS)
    assert all(other == first for other in others)
    assert len({(folder / str(ranks) / "output_1.h5").read_bytes() for ranks in RANKS}) == 1
    table = list(csv.DictReader(first.splitlines()))
    assert [row["file"] for row in table] == sorted(str(path) for path in (data / "test").rglob("*.jpg"))
    assert all(0.1 <= float(row["probability"]) <= 1 for row in table)
