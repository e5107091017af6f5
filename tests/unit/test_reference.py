"""The package trains as the reference does: the same losses, rates, weights and statistics.

Drawn are the keys of optim, train, data and valid that change results (precision and compile, which change the
arithmetic, apart), 1 to 3 ranks, a stop after some step and a resume on as many ranks or others, and losses that are
not finite. Ranks are threads that meet at a barrier in place of Horovod, which tests/parallel have for real. All is
computed in float64 on a ResNet-18 of two stages: weights may differ by a millionth of what they have moved.

python -m tests.reference --examples 500 --seed 1 draws more.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from hvd_eurosat.config.schema import Config, Data, Model, Optim, Run, Train
from tests.reference.cases import Case, cases, check
from tests.reference.trainer import Trainer


def drawn(count: int) -> settings:
    """As many cases, the same every time."""
    plain = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return settings(plain, max_examples=count, phases=(Phase.generate,))


@drawn(8)
@given(cases())
def test_the_package_trains_as_the_reference_does(case: Case) -> None:
    check(case)


@pytest.mark.long
@drawn(20)
@given(cases())
def test_and_in_more_cases(case: Case) -> None:
    check(case)


def usual() -> Case:
    """Momentum on two ranks, stopped within the second epoch and resumed."""
    config = Config(
        data=Data(image_size=32),
        model=Model(arch="resnet18", weights="none"),
        optim=Optim(name="sgd", lr=0.02, weight_decay=1e-3),
        train=Train(epochs=2, batch_size=4, precision="fp32"),
        run=Run(verify_interval=0),
    )
    return Case(config, images=13, sizes=(2, 2), stop=3, faults=())


def test_a_head_with_biases() -> None:
    case = usual()
    model = case.config.model.model_copy(update={"head_bias": True})
    check(dataclasses.replace(case, config=case.config.model_copy(update={"model": model})))


@pytest.mark.parametrize(("augment", "epochs", "stop"), [(False, 4, 5), (True, 10, None), (True, 11, 2)])
def test_epochs_of_the_head_alone(augment: bool, epochs: int, stop: int | None) -> None:
    """What the head sees is kept, also of ranks that were stopped within an epoch; the reference computes it anew."""
    case, keys = usual(), {"trainable": "head"}
    config = case.config.model_copy(
        update={
            "data": Data(image_size=32, augment=augment),
            "model": case.config.model.model_copy(update=keys),
            "train": case.config.train.model_copy(update={"epochs": epochs}),
        }
    )
    check(dataclasses.replace(case, config=config, stop=stop, faults=((1, 0),)))


@pytest.mark.parametrize("images", [13, 270])
def test_an_average_has_statistics_of_its_own(images: int) -> None:
    """From one batch of all images, or from two that leave some out; of full size, whatever that of training."""
    case = usual()
    train = case.config.train.model_copy(update={"ema": 0.9, "start_size": 16})
    config = case.config.model_copy(update={"train": train})
    check(dataclasses.replace(case, config=config, images=images))


def test_a_small_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference, as it happens: one rank's gradients count a ten-thousandth more."""
    check(usual())
    add_up = Trainer._sum
    monkeypatch.setattr(Trainer, "_sum", lambda self, every: add_up(self, [*every[:-1], every[-1] * 1.0001]))
    with pytest.raises(AssertionError):
        check(usual())


def test_a_pixel_on_the_edge_of_two_levels_is_no_fault() -> None:
    """One of image 7 is rounded to the next level, and lies two off once it has more contrast."""
    data = Data(image_size=33, augment=False, random_zoom=0.4, random_contrast=0.4)
    check(dataclasses.replace(usual(), config=usual().config.model_copy(update={"data": data})))


def test_three_steps_in_a_row_that_are_not_finite_end_both() -> None:
    check(dataclasses.replace(usual(), faults=((1, 0), (2, 1), (3, 0)), stop=None))
    check(dataclasses.replace(usual(), faults=((0, 1), (1, 0), (3, 0)), stop=2))
    assert torch.get_default_dtype() == torch.float32
