"""rmldnn's configuration in our terms, and what of it is refused, with what words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hvd_eurosat.config import verbs
from hvd_eurosat.config.reading import load
from hvd_eurosat.errors import UserError

Object = dict[str, Any]

TUTORIAL: Object = {
    "num_epochs": 50,
    "outfile": "out_classifier.txt",
    "layers": "./layers.json",
    "checkpoints": {"load": "./model.h5", "save": "./model_checkpoints/", "interval": 5},
    "data": {
        "input_type": "images",
        "target_type": "labels",
        "input_path": "./data/train/",
        "test_input_path": "./data/valid/",
        "batch_size": 64,
        "test_batch_size": 128,
        "preload": True,
        "transforms": [{"resize": [64, 64]}],
    },
    "optimizer": {
        "type": "Adam",
        "learning_rate": 0.05,
        "lr_scheduler": {"type": "Exponential", "gamma": 0.95},
    },
    "loss": {"function": "NLL"},
}


def write(folder: Path, network: Object) -> list[str]:
    (folder / "config_train.json").write_text(json.dumps({"neural_network": network}))
    return ["--config", str(folder / "config_train.json")]


def changed(*path: str, to: object) -> Object:
    """The tutorial's configuration with another value at a path."""
    network = copy.deepcopy(TUTORIAL)
    node = network
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = to
    return network


def test_the_tutorials_configuration(tmp_path: Path) -> None:
    config = load(write(tmp_path, TUTORIAL))
    assert (config.train.epochs, config.train.batch_size, config.valid.batch_size) == (50, 64, 128)
    optim = config.optim
    assert (optim.name, optim.lr, optim.schedule, optim.gamma) == ("adam", 0.05, "exponential", 0.95)
    assert (config.model.weights, config.model.layers) == ("./model.h5", Path("layers.json"))
    assert (config.data.root, config.data.image_size, config.data.augment) == (Path("data"), 64, False)
    assert (config.data.mean, config.data.std) == ((0, 0, 0), (1, 1, 1))
    assert (config.run.path, config.run.checkpoint_interval) == (Path("runs/config_train"), 5)
    assert (config.run.numbered_checkpoints, config.run.outfile) == (
        Path("model_checkpoints"),
        Path("out_classifier.txt"),
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load(["--config", str(tmp_path / "config.toml"), "--run.dir", str(config.run.path)]).flat() == config.flat()


def test_flags_win(tmp_path: Path) -> None:
    config = load([*write(tmp_path, TUTORIAL), "--train.epochs", "3", "--model.weights", "none"])
    assert (config.train.epochs, config.model.weights, config.optim.lr) == (3, "none", 0.05)


def test_transforms(tmp_path: Path) -> None:
    transforms = [
        {"center_crop": [48, 48]},
        {"random_horizontal_flip": 0.5},
        {"random_vertical_flip": 0.25},
        {"random_rotate": 20},
        {"jitter_crop": 0.1},
        {"random_zoom": 0.2},
        {"normalize": {"mean": [0.3, 0.4, 0.5], "std": 0.25}},
        {"resize": [64, 64]},
    ]
    data = load(write(tmp_path, changed("data", "transforms", to=transforms))).data
    assert (data.image_size, data.center_crop, data.resize) == (64, 48, 0)
    assert (data.random_horizontal_flip, data.random_vertical_flip, data.random_rotate) == (0.5, 0.25, 20)
    assert (data.jitter_crop, data.random_zoom, data.augment) == (0.1, 0.2, False)
    assert (data.mean, data.std) == ((0.3, 0.4, 0.5), (0.25, 0.25, 0.25))
    transforms = [{"resize": [72, 72]}, {"center_crop": [64, 64]}]
    data = load(write(tmp_path, changed("data", "transforms", to=transforms))).data
    assert (data.image_size, data.center_crop, data.resize) == (64, 64, 72)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "SGD", "momentum": 0.9}, {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": False}),
        ({"type": "LARS", "eta": 0.01}, {"name": "lars", "trust": 0.01, "momentum": 0.0}),
        (
            {"type": "AdamW", "beta1": 0.8, "eps": 1e-6, "amsgrad": True},
            {"beta1": 0.8, "amsgrad": True},
        ),
        ({"type": "RMSprop", "weight_decay": 0.1}, {"name": "rmsprop", "weight_decay": 0.1, "momentum": 0.0}),
        ({"type": "Adagrad", "learning_rate": 1}, {"name": "adagrad", "lr": 1.0, "schedule": "constant"}),
        ({"type": "LAMB", "beta2": 0.99}, {"name": "lamb", "beta2": 0.99}),
        (
            {"type": "SGD", "lr_scheduler": {"type": "Step", "gamma": 0.1, "step_size": 2}},
            {"schedule": "step", "gamma": 0.1, "step_size": 2},
        ),
        (
            {"type": "SGD", "lr_scheduler": {"type": "MultiStep", "gamma": 0.1, "milestones": [2, 5]}},
            {"schedule": "multistep", "milestones": [2, 5]},
        ),
        (
            {"type": "SGD", "lr_scheduler": {"type": "Warmup", "num_epochs": 5, "start_factor": 0.2}},
            {"schedule": "constant", "warmup_epochs": 5.0, "warmup_start": 0.2},
        ),
    ],
)
def test_optimisers(tmp_path: Path, optimizer: Object, expected: Object) -> None:
    optim = load(write(tmp_path, changed("optimizer", to=optimizer))).optim.model_dump(mode="json")
    assert {key: optim[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("debug",), True, "neural_network.debug has no meaning here"),
        (("data", "grayscale"), True, "neural_network.data.grayscale has no meaning here"),
        (("data", "input_type"), "numpy", "neural_network.data.input_type: Input should be 'images', got 'numpy'"),
        (("data", "input_path"), "./images/", "data.input_path images: a folder called train is wanted"),
        (
            ("data", "test_input_path"),
            "other/",
            "data.test_input_path other/: training here validates on",
        ),
        (("data", "batch_size"), "64", "neural_network.data.batch_size: Input should be a valid integer, got '64'"),
        (("data", "transforms"), [{"resize": [64, 32]}], "transforms.0.resize [64, 32]: a square is wanted"),
        (("data", "transforms"), [{"convert_color": "BGR2RGB"}], "transforms.0.convert_color has no meaning here"),
        (
            ("data", "transforms"),
            [{"random_rotate": 5, "resize": [9, 9]}],
            "transforms.0: one transform is wanted",
        ),
        (("data", "transforms"), [{"random_rotate": 5}] * 2, "transforms.1.random_rotate is there twice"),
        (("optimizer", "type"), "Hessian", "neural_network.optimizer.type: Input should be 'sgd', 'adam'"),
        (("optimizer", "momentum"), 0.9, "neural_network.optimizer.momentum has no meaning for adam"),
        (
            ("optimizer", "learning_rate"),
            float("nan"),
            "optimizer.learning_rate: Input should be greater",
        ),
        (("optimizer", "lr_scheduler", "verbose"), True, "optimizer.lr_scheduler.verbose has no meaning here"),
        (("optimizer", "lr_scheduler", "step_size"), 3, "lr_scheduler.step_size has no meaning for exponential"),
        (("optimizer", "lr_scheduler"), {"type": "Step", "gamma": 0.1}, "lr_scheduler.step_size is missing"),
        (("loss", "function"), "Dice", "neural_network.loss.function: Input should be 'nll', got 'dice'"),
        (("layers",), [{"class_name": "Conv2D"}], "neural_network.layers: Input should be a valid string"),
        (("checkpoints", "intervall"), 5, "neural_network.checkpoints.intervall has no meaning here"),
        (("num_epochs",), 0, "neural_network.num_epochs: Input should be greater than 0, got 0"),
    ],
)
def test_what_has_no_meaning_is_named(tmp_path: Path, path: tuple[str, ...], value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(write(tmp_path, changed(*path, to=value)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluation(tmp_path: Path) -> None:
    """The tutorial's config_test.json; other verbs take no such file."""
    data = {"input_type": "images", "test_input_path": "./data/test/", "test_output_path": "./predictions/"}
    network = {"layers": "./l.json", "checkpoints": {"load": "m/model_checkpoint_50.pt"}, "data": data}
    data["transforms"] = [{"resize": [64, 64]}]
    arguments = write(tmp_path, network)
    settings = verbs.evaluate(arguments)
    assert (settings.checkpoint, settings.input) == (Path("m/model_checkpoint_50.pt"), Path("data/test"))
    assert (settings.out, settings.batch_size) == (Path("predictions"), 64)
    assert settings.expected == {"image_size": 64, "mean": (0, 0, 0), "std": (1, 1, 1), "layers": "./l.json"}
    with pytest.raises(UserError, match="an rmldnn configuration is for train and evaluate"):
        verbs.predict(arguments)
    with pytest.raises(UserError, match=r"checkpoints\.load is missing, and evaluation needs it"):
        verbs.evaluate(write(tmp_path, {**network, "checkpoints": {}}))


def test_hostile_json(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text in (
        '{"neural_network": ' + "[" * 100_000,
        '{"neural_network": ' + "[" * 500 + "]" * 500 + "}",
        '{"neural',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="--config") as error:
            load(["--config", str(path)])
        assert "\n" not in str(error.value)
