"""What the head sees of the training images: when it is kept, and whose it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from hvd_eurosat.config.schema import Data, Train
from hvd_eurosat.data.augment import VIEWS, augment
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import features
from hvd_eurosat.training.features import RANDOM, Features
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from tests.reference import cases, product
from tests.unit.test_keys import BASE, configuration, here

IMAGES, VALID = 5, 2


def opened(trainable: str = "head", precision: str = "fp32", **keys: Any) -> Features:
    """Of a run that has not begun; keys: section__key=value."""
    flat = {"model.trainable": trainable, "train.epochs": VIEWS + 1, "data.augment": True}
    flat |= {key.replace("__", "."): value for key, value in keys.items()}
    config = configuration(BASE | flat)
    tree: Any = None
    model = build("resnet18", 2, trainable, seed=0)
    return Features(here(), config, TrainingState(here(), config, tree, model, Precision(precision)), IMAGES, VALID)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, None),
        ({"trainable": "fc"}, None),
        ({"trainable": "bn+head"}, ""),
        ({"trainable": "layer4.1.bn2,fc"}, ""),
        ({"train__epochs": VIEWS}, ""),
        ({"train__epochs": 1, "data__augment": False}, ""),
        ({"train__epochs": 2, "data__augment": False}, None),
        ({"data__max_shift": 1}, "data.max_shift"),
        ({"data__random_erase": 0.5, "train__mixup": 0.2}, "data.random_erase, train.mixup"),
        ({"train__cutmix": 1.0, "train__compile": True}, "train.cutmix, train.compile"),
        ({"data__image_size": 48, "train__start_size": 32}, "train.start_size"),
        ({"data__image_size": 48, "train__start_size": 48}, None),
    ],
)
def test_when_features_are_kept(keys: dict[str, Any], why: str | None) -> None:
    assert opened(**keys).obstacle == why


def test_nothing_before_the_head_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of 12 images in threes, and of 7 to validate in fives."""
    calls: Counter[bool] = Counter()
    compute = product.Double.features

    def spy(self: product.Double, images: torch.Tensor) -> torch.Tensor:
        calls[self.training] += 1
        return compute(self, images)

    monkeypatch.setattr(product.Double, "features", spy)
    keys = {"model.trainable": "head", "train.epochs": 3, "train.batch_size": 3, "valid.batch_size": 5}
    config = configuration(BASE | keys)
    product.run(config, cases.splits(12, 32), cases.CLASSES, cases.weights(True), None, 1, None, {})
    assert calls == {True: 4, False: 2}


def test_no_more_memory_is_taken_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """For training and validation together."""
    size, beside = VIEWS * (IMAGES + 1) * 512 * 4, VALID * 512 * 4
    monkeypatch.setattr(features, "available_memory", lambda: 2 * (size + beside))
    assert opened().valid == {}
    monkeypatch.setattr(features, "available_memory", lambda: 2 * (size + beside) - 1)
    assert opened().valid is None
    monkeypatch.setattr(features, "available_memory", lambda: 2 * size)
    assert opened().nbytes == size
    assert opened().keeps
    monkeypatch.setattr(features, "available_memory", lambda: 2 * size - 1)
    assert opened().obstacle == "0.0 GB a rank are more than 50% of the free memory"
    assert opened(precision="bf16").keeps
    monkeypatch.setattr(features, "available_memory", lambda: 0)
    assert opened().valid is None


@pytest.mark.parametrize("name", [None, *sorted(RANDOM)])
def test_images_come_round_but_with_what_is_random(name: str | None) -> None:
    """In eight epochs, and not before."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=random, dtype=torch.uint8)
    keys: dict[str, Any] = {name: 1 if name == "max_shift" else 0.5} if name else {}
    shown = [augment(images, torch.arange(8), 3, epoch, Data(**keys)) for epoch in range(2 * VIEWS)]
    again = [torch.equal(shown[epoch], shown[epoch + VIEWS]) for epoch in range(VIEWS)]
    assert again == [name is None] * VIEWS
    if name is None:
        assert all(not torch.equal(shown[0], other) for other in shown[1:VIEWS])


def test_all_that_training_draws_is_known() -> None:
    """A new key of data or train is to be decided on."""
    still = {
        "root",
        "cache_dir",
        "image_size",
        "input_size",
        "center_crop",
        "resize",
        "bands",
        "mean",
        "std",
        "augment",
    }
    assert set(Data.model_fields) == still | set(RANDOM)
    decided = {"mixup", "cutmix", "compile", "start_size", "epochs", "precision"}
    same = {"batch_size", "ema", "label_smoothing", "class_weights", "device", "deterministic", "graphs", "seed"}
    assert set(Train.model_fields) == decided | same


def test_an_epoch_that_began_in_its_middle_is_not_known() -> None:
    kept, epoch = opened(train__epochs=3 * VIEWS), torch.tensor(VIEWS + 2)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(torch.tensor([4, 1]), images, torch.zeros(2), torch.tensor([1.0, 0.0]), 1)
    seen = torch.rand(2, 512)
    for samples, known in ((3, False), (0, True)):
        kept.begin(2, samples)
        kept.keep(seen, batch, torch.tensor(2))
        kept.end(2)
        assert kept.knows(VIEWS + 2) == known
    assert torch.equal(kept.of(batch, epoch), torch.stack([seen[0], torch.zeros(512)]))  # padding is put aside
    kept.begin(2 * VIEWS + 1, 0)
    kept.end(2 * VIEWS + 1)
    assert not kept.knows(1)  # no epoch is left that wants it
