"""The running average of the weights, and BatchNorm's statistics with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hvd_eurosat.data.batches import Images
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.errors import Stopped
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.training.average import EVERY, Average
from hvd_eurosat.training.inference import never
from hvd_eurosat.training.state import TrainingState
from tests.unit.conftest import averaging


def test_the_average_is_corrected_for_its_start_and_left_by_skipped_steps() -> None:
    """With half of it kept at each update: 1, then (1 / 2 + 3) / (3 / 2)."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"w": weight}, decay=0.5 ** (1 / EVERY))
    well, skipped = torch.tensor(False), torch.tensor(True)
    average.update(well)
    assert average.weights["w"].item() == 1
    weight.data.fill_(3)
    average.update(well)
    found = average.weights["w"].item(), average.share.item()
    assert found == pytest.approx((7 / 3, 3 / 4))
    weight.data.fill_(99)
    average.update(skipped)
    assert (average.weights["w"].item(), average.share.item()) == found
    with average.shown():
        assert weight.item() == found[0]
    assert weight.item() == 99


def test_before_its_first_step_that_counts_the_average_is_the_weights_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"w": weight}, decay=0.9)
    weight.data.fill_(2)  # loaded since
    average.update(torch.tensor(True))
    assert (average.weights["w"].item(), average.share.item()) == (2, 0)


@pytest.fixture
def images() -> Images:
    """13, of 32x32 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    return Images(Packed(pixels, np.zeros(13, np.int64), ()), torch.device("cpu"))


def taken_in(folder: Path, trainable: str) -> TrainingState:
    """A state whose average has taken in a step."""
    state = averaging(folder, trainable)
    assert state.average is not None
    state.average.update(torch.tensor(False))
    return state


def test_statistics_are_estimated_for_validation_and_stay_with_the_average(tmp_path: Path, images: Images) -> None:
    """Training goes on with its own, and with as many batches counted."""
    state = taken_in(tmp_path, "bn+head")
    before = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    with state.validated(images, never):
        shown = state.statistics.flat.clone()
    with state.averaged():
        assert torch.equal(state.statistics.flat, shown)
    assert all(torch.equal(buffer, before[name]) for name, buffer in state.model.named_buffers())
    assert not torch.equal(state.statistics.flat, shown)


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_stop_leaves_the_average_as_it_was(tmp_path: Path, images: Images, in_validation: bool) -> None:
    """While the statistics are estimated, or in validation after that."""
    state = taken_in(tmp_path, "bn+head")
    with state.averaged():
        before = state.statistics.flat.clone()

    def validate() -> None:
        with state.validated(images, lambda: not in_validation):
            assert in_validation
            raise Stopped

    with pytest.raises(Stopped):
        validate()
    with state.averaged():
        assert torch.equal(state.statistics.flat, before)


def test_a_head_that_trains_alone_costs_no_look_at_images(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = taken_in(tmp_path, "head")
    monkeypatch.setattr(LandCoverResNet, "features", lambda *_: pytest.fail("the network was shown images"))
    with state.validated(images, never):
        pass


@pytest.mark.parametrize(("images_there", "batches"), [(13, 1), (127, 1), (270, 2), (2000, 10)])
def test_an_estimate_is_of_images_from_all_over_the_split(images_there: int, batches: int) -> None:
    pixels = np.zeros((images_there, 1, 1, 3), np.uint8)
    places = Images(Packed(pixels, np.zeros(images_there, np.int64), ()), torch.device("cpu")).spread(128, 10)
    size = min(images_there, 128)
    assert places.shape == (batches, size)
    assert len(places.unique()) == batches * size
    gaps = places.sort(1).values.diff(dim=1)
    assert (places.min(1).values < gaps.max()).all()
    assert (images_there - places.max(1).values <= gaps.max()).all()
