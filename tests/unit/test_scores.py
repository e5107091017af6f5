"""What a figure is worth, against published examples; and the temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvd_eurosat.training.calibration import fit_temperature
from hvd_eurosat.training.inference import mean_of_views, tempered
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.scores import calibration_error, macro_f1, mcnemar, reliability, wilson


def test_wilson_interval() -> None:
    """Newcombe 1998, table I (method 3): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, count), interval in published.items():
        assert wilson(correct, count) == pytest.approx(interval, abs=5e-5)


def test_mcnemar() -> None:
    """Two-sided binomial tests; of 6 and 2 heads it is 2 * (1 + 8 + 28) / 256."""
    assert mcnemar(6, 2) == mcnemar(2, 6) == pytest.approx(0.2890625)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(1000, 800) == pytest.approx(2.6e-6, rel=0.05)


def test_macro_f1() -> None:
    """F1 of 2/3 and 4/5; a class that neither was there nor was said does not count."""
    assert macro_f1(torch.tensor([[1, 1, 0], [0, 2, 0], [0, 0, 0]])) == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_calibration_error() -> None:
    """The example of torchmetrics' MulticlassCalibrationError, which has 3 bins; in 15 by hand; padding is left out."""
    probabilities = torch.tensor([[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]])
    answers, labels, ones = probabilities.log(), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    assert calibration_error(reliability(answers, labels, ones, bins=3)) == pytest.approx(0.2)
    assert calibration_error(reliability(answers, labels, ones)) == pytest.approx((1.10 + 0.40 + 0.10) / 4)
    padded = reliability(answers, labels, torch.tensor([1.0, 1, 0, 0]))
    assert calibration_error(padded) == pytest.approx(0.55)


def overconfident(count: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities that are `factor` times as sure as the labels drawn from them."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 2, (count, 10)))
    labels = torch.distributions.Categorical(logits=logits).sample()
    return (logits * factor).log_softmax(1).float().numpy(), labels.numpy()


def test_the_temperature_undoes_overconfidence() -> None:
    torch.manual_seed(0)
    values, labels = overconfident(20_000, 2.5)
    temperature = fit_temperature(values, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    after, before = Evaluation.of(tempered(values, temperature), labels), Evaluation.of(values, labels)
    assert after.calibration_error < 0.01 < 0.1 < before.calibration_error
    assert after.loss < before.loss
    assert torch.equal(after.confusion, before.confusion)


def test_a_temperature_of_one_changes_no_bit() -> None:
    values, _ = overconfident(10, 1.0)
    assert np.array_equal(tempered(values, 1.0), values)


@pytest.mark.parametrize("right", [True, False])
def test_a_temperature_of_few_images_is_none_of_extremes(right: bool) -> None:
    """All right, or all wrong, where the likelihood alone would go on without end."""
    values = np.log(np.tile(np.array([[0.9, 0.1]], np.float32), (20, 1)))
    labels = np.full(20, 0 if right else 1)
    assert 0.2 < fit_temperature(values, labels) < 20


def test_views_are_averaged_as_probabilities() -> None:
    each = np.log(np.array([[[0.9, 0.1], [0.5, 0.5]]], np.float32))
    assert np.exp(mean_of_views(each)) == pytest.approx(np.array([[0.7, 0.3]]))
    assert np.array_equal(mean_of_views(each[:, :1]), each[:, 0])
