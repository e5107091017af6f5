"""The embedded sample: the same every time, well formed, and not solved by looking at colours."""

import io

import numpy as np
import pytest
from PIL import Image

from hvd_eurosat.data import sample

CLASSES = [
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
]


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8 [10, 60, 64, 64, 3]: by class and number."""
    decoded = [np.asarray(Image.open(io.BytesIO(data))) for _, data in sample.generate(per_class=60)]
    return np.stack(decoded).reshape(10, 60, 64, 64, 3)


def test_names_and_formats() -> None:
    items = list(sample.generate(per_class=2))
    assert [name for name, _ in items] == [f"{c}/{c}_{n}.jpg" for c in CLASSES for n in (1, 2)]
    for _, data in items:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_the_same_bytes_every_time() -> None:
    first = dict(sample.generate(per_class=3))
    assert first == dict(sample.generate(per_class=3))
    assert dict(sample.generate(per_class=2)).items() <= first.items()


def test_no_two_pictures_are_alike() -> None:
    data = [data for seed in (0, 1) for _, data in sample.generate(per_class=5, seed=seed)]
    assert len(set(data)) == len(data) == 100


def test_the_colours_are_those_of_eurosat(pictures: np.ndarray) -> None:
    """Mean and deviation of all pixels, near to EuroSAT's 87.8, 97.0, 104.0 and 51.7, 34.9, 29.5."""
    pixels = pictures.reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0), (87.8, 97.0, 104.0), atol=10)
    np.testing.assert_allclose(pixels.std(0), (51.7, 34.9, 29.5), atol=10)


def test_the_mean_colour_does_not_tell_the_classes(pictures: np.ndarray) -> None:
    """The best of three classifiers of the mean colour is right for at most 60 %, and for more than chance."""
    colours = pictures.mean((2, 3)) / 255
    train, test = colours[:, :40].reshape(-1, 3), colours[:, 40:].reshape(-1, 3)
    labels, truth = np.repeat(np.arange(10), 40), np.repeat(np.arange(10), 20)
    centres = colours[:, :40].mean(1)
    by_centre = np.square(test[:, None] - centres).sum(-1).argmin(1)
    near = np.square(test[:, None] - train).sum(-1).argsort(1)[:, :9]
    by_neighbours = np.array([np.bincount(votes, minlength=10).argmax() for votes in labels[near]])
    by_squares = _quadratic(test) @ np.linalg.lstsq(_quadratic(train), np.eye(10)[labels], rcond=None)[0]
    accuracies = [np.mean(guess == truth) for guess in (by_centre, by_neighbours, by_squares.argmax(1))]
    assert 0.2 < max(accuracies) < 0.6, accuracies


def _quadratic(x: np.ndarray) -> np.ndarray:
    products = [x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)]
    return np.stack([np.ones(len(x)), *x.T, *products], 1)
