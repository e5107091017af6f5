"""Learning rates and sizes of images as a person would draw them, and what a resumed run says of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Data, Optim, Train
from hvd_eurosat.train import train
from hvd_eurosat.training.schedule import image_size, jump, learning_rate
from tests.unit.conftest import Grow

EPOCHS = 10


def optim(schedule: str, **keys: Any) -> Optim:
    return Optim(lr=1.0, schedule=schedule, gamma=0.5, step_size=2, milestones=(4, 8), **keys)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),  # after 0, 1, 2, 3, 4, 6 and 10 epochs
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1]),
        ("exponential", 0, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64, 1 / 1024]),
        ("step", 0, [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 32]),
        ("multistep", 0, [1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 4]),
        ("cosine", 0, [1, 0.97553, 0.90451, 0.79389, 0.65451, 0.34549, 0]),
        ("one_cycle", 0, [0.04, 0.28, 0.76, 1, 0.95048, 0.61126, 0]),
        ("constant", 2, [0.2, 0.6, 1, 1, 1, 1, 1]),
        ("exponential", 2, [0.2, 0.6, 1, 1 / 2, 1 / 4, 1 / 16, 1 / 256]),
        ("step", 2, [0.2, 0.6, 1, 1, 1 / 2, 1 / 4, 1 / 16]),
        ("multistep", 2, [0.2, 0.6, 1, 1, 1 / 2, 1 / 2, 1 / 4]),
        ("cosine", 2, [0.2, 0.6, 1, 0.96194, 0.85355, 0.5, 0]),
        ("one_cycle", 2, [0.2, 0.6, 1, 0.96194, 0.85355, 0.5, 0]),
    ],
)
def test_every_schedule_with_and_without_a_warm_up(schedule: str, warmup: int, rates: list[float]) -> None:
    chosen = optim(schedule, warmup_epochs=warmup, warmup_start=0.2)
    found = [learning_rate(chosen, EPOCHS, 64, progress) for progress in (0, 1, 2, 3, 4, 6, 10)]
    assert found == pytest.approx(rates, abs=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "step", "multistep", "cosine", "one_cycle"])
@pytest.mark.parametrize("warmup", [0.5, 2, 3.5])
def test_a_warm_up_ends_at_the_peak_and_the_schedule_begins_there(schedule: str, warmup: float) -> None:
    chosen = optim(schedule, warmup_epochs=warmup)
    around = [learning_rate(chosen, EPOCHS, 64, progress) for progress in (warmup - 1e-9, warmup)]
    assert around == pytest.approx([1, 1])
    rest = [learning_rate(chosen, EPOCHS, 64, warmup + n / 100) for n in range(100 * (EPOCHS - math.ceil(warmup)))]
    assert all(after <= before for before, after in itertools.pairwise(rest))


@pytest.mark.parametrize("schedule", ["exponential", "step"])
def test_whole_epochs_count_from_the_first_that_begins_after_the_warm_up(schedule: str) -> None:
    chosen = optim(schedule, warmup_epochs=2.5).model_copy(update={"step_size": 1})
    assert [learning_rate(chosen, EPOCHS, 64, progress) for progress in (2.5, 3, 3.99, 4, 5)] == [1, 1, 1, 0.5, 0.25]


def test_stairs_are_rmldnns_warm_up() -> None:
    chosen = optim("constant", warmup_epochs=5, warmup_start=0.2, warmup_stairs=True)
    rates = [learning_rate(chosen, EPOCHS, 64, progress) for progress in (0, 0.99, 1, 1.5, 2, 3, 4.99, 5)]
    assert rates == pytest.approx([0.2, 0.2, 0.36, 0.36, 0.52, 0.68, 0.84, 1])


def test_one_cycle_is_torchs() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    steps = 1000
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, cycle_momentum=False)
    for step in range(steps - 1):
        mine = learning_rate(Optim(lr=0.1, schedule="one_cycle"), 10, 64, 10 * step / (steps - 1))
        assert mine == pytest.approx(theirs.get_last_lr()[0], rel=5e-3, abs=1e-6)
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_learning_rate_scaling(scaling: str, factor: float) -> None:
    scaled = Optim(lr=0.1, schedule="constant", lr_scaling=scaling, reference_batch=64)
    assert learning_rate(scaled, 10, 256, 3) == pytest.approx(0.1 * factor)


@pytest.mark.parametrize(
    ("start", "full", "epochs", "sizes"),
    [
        (0, 64, 3, [64] * 3),
        (64, 64, 3, [64] * 3),
        (32, 64, 9, [32, 32, 32, 48, 48, 48, 64, 64, 64]),
        (32, 64, 7, [32, 32, 48, 48, 64, 64, 64]),
        (40, 64, 3, [40, 56, 64]),
        (32, 64, 2, [48, 64]),
        (32, 64, 1, [64]),
        (32, 224, 4, [176, 192, 208, 224]),
        (32, 224, 14, [*range(32, 225, 16), 224]),
    ],
)
def test_images_grow_to_full_size(start: int, full: int, epochs: int, sizes: list[int]) -> None:
    """Also in the epochs beyond the schedule's."""
    data, growing = Data(image_size=full), Train(start_size=start)
    found = [image_size(data, growing, epochs, epoch) for epoch in range(epochs + 5)]
    assert found == [*sizes, *[full] * 5]


@pytest.mark.parametrize("epochs", range(1, 40))
def test_the_last_epoch_is_at_full_size(epochs: int) -> None:
    sizes = [image_size(Data(image_size=224), Train(start_size=32), epochs, epoch) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 224


FIFTEEN = ["--optim.lr", "0.03", "--train.epochs", "15"]


@pytest.mark.parametrize(
    ("was", "now", "progress", "warning"),
    [
        (
            [],
            ["--train.epochs", "30"],
            15.0,
            "raising train.epochs from 15 to 30 takes the learning rate from 0 to 0.0244",
        ),
        (
            [],
            ["--train.epochs", "10"],
            5.5,
            "lowering train.epochs from 15 to 10 takes the learning rate from 0.0293 to 0.0215 at",
        ),
        (
            ["--train.start_size", "32"],
            ["--train.epochs", "30"],
            15.0,
            "to 0.0244 and the training images from 64 to 48 pixels at epoch 15; --optim.schedule_epochs 15 keeps the",
        ),
        (
            ["--optim.schedule", "cosine"],
            ["--train.epochs", "30"],
            15.0,
            "the learning rate from 0 to 0.015 at epoch 15;",
        ),
        (["--optim.schedule", "exponential"], ["--train.epochs", "30"], 15.0, None),
        (["--optim.schedule", "constant"], ["--train.epochs", "30"], 15.0, None),
        (["--train.start_size", "32"], ["--train.epochs", "30", "--optim.schedule_epochs", "15"], 15.0, None),
        (["--optim.schedule_epochs", "30"], ["--optim.schedule_epochs", "30", "--train.epochs", "30"], 15.0, None),
        ([], [], 7.0, None),
    ],
)
def test_what_other_epochs_change_at_once(was: list[str], now: list[str], progress: float, warning: str | None) -> None:
    saved = load([*FIFTEEN, *was]).model_dump(mode="json")
    found = jump(saved, load([*FIFTEEN, *was, *now]), 64, progress)
    assert found == warning or (warning and found and warning in found)
    assert not found or "\n" not in found


def test_a_resumed_run_says_so_before_it_trains(
    alone: World, grow: Grow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid", "test"):
        grow(f"data/{split}", {"Forest": 4, "River": 4})
    flags = ["--data.root", str(tmp_path / "data"), "--run.dir", str(tmp_path / "run"), "--model.arch", "resnet18"]
    flags += [
        "--model.weights",
        "none",
        "--train.batch_size",
        "8",
        "--valid.batch_size",
        "8",
        "--data.image_size",
        "32",
    ]
    flags += ["--train.precision", "fp32", "--optim.schedule", "cosine", "--optim.lr", "0.01"]
    warnings = []
    for epochs, keys in ((1, []), (2, []), (3, ["--optim.schedule_epochs", "2"])):
        assert train(alone, load([*flags, "--train.epochs", str(epochs), *keys])) == 0
        warnings += [line for line in capsys.readouterr().err.splitlines() if "train.epochs" in line]
    assert warnings == [
        "warning: raising train.epochs from 1 to 2 takes the learning rate from 0 to 0.005 at epoch 1; "
        "--optim.schedule_epochs 1 keeps the schedule as it was"
    ]
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["learning_rate"] for line in lines if line["event"] == "train"] == pytest.approx([0.01, 0.005, 0])
