"""rmldnn's configuration in our terms, and what of it is refused, with what words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import schema, verbs
from hvd_eurosat.config.reading import load
from hvd_eurosat.data.folder import Seen, file_batches
from hvd_eurosat.data.inputs import PICTURES
from hvd_eurosat.data.packed import resolve_size
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.evaluate import check_expected
from hvd_eurosat.model.resnet import Details, build
from hvd_eurosat.train import train
from hvd_eurosat.training import checkpoint
from hvd_eurosat.weights.keras_graph import HEAD
from hvd_eurosat.weights.keras_json import write_layers
from tests.unit.conftest import Grow, saved_checkpoint

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
        ({"type": "Adagrad", "learning_rate": 1}, {"name": "adagrad", "lr": 1.0, "schedule": "constant", "eps": 1e-10}),
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
            {"schedule": "constant", "warmup_epochs": 5.0, "warmup_start": 0.2, "warmup_stairs": True},
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
        (("optimizer",), {"type": "Adagrad", "eps": 1e-8}, "neural_network.optimizer.eps has no meaning for adagrad"),
        (
            ("optimizer", "lr_scheduler"),
            {"type": "MultiStep", "gamma": 0.1, "milestones": []},
            "optim.schedule multistep wants optim.milestones",
        ),
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
    crops = {"center_crop": 0, "resize": 0}
    assert settings.expected == {"image_size": 64, **crops, "mean": (0, 0, 0), "std": (1, 1, 1), "layers": "./l.json"}
    with pytest.raises(UserError, match="an rmldnn configuration is for train and evaluate"):
        verbs.predict(arguments)
    with pytest.raises(UserError, match=r"checkpoints\.load is missing, and evaluation needs it"):
        verbs.evaluate(write(tmp_path, {**network, "checkpoints": {}}))


def test_without_resize_images_keep_their_size(
    alone: World, grow: Grow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is trained on, saved, and asked of what is evaluated; images that differ in it are refused."""
    for split in ("train", "valid", "test"):
        grow(f"data/{split}", {"Forest": 4, "River": 4}, size=(48, 48))
    network = changed("data", "transforms", to=[])
    network["data"] |= {"input_path": f"{tmp_path}/data/train", "test_input_path": f"{tmp_path}/data/valid"}
    network |= {"num_epochs": 1, "checkpoints": {}}
    del network["layers"], network["outfile"]
    flags = [*write(tmp_path, network), "--run.dir", str(tmp_path / "run"), "--model.arch", "resnet18"]
    flags += ["--train.batch_size", "8", "--valid.batch_size", "8", "--train.precision", "fp32"]
    assert train(alone, load(flags)) == 0
    assert "images of 48x48" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.json")
    assert saved.config["data"]["image_size"] == 48
    last = tmp_path / "data" / "train" / "River" / "River_4.jpg"
    last.write_bytes((grow("other", {"a": 1}) / "a" / "a_1.jpg").read_bytes())
    with pytest.raises(UserError, match=r"River_4\.jpg: 64x64 pixels; 48x48 is wanted"):
        train(alone, load([*flags, "--run.resume", "never"]))


@pytest.mark.parametrize(("size", "message"), [((48, 32), "squares are wanted"), ((16, 16), "have 16x16 pixels: give")])
def test_sizes_that_cannot_be_kept(grow: Grow, size: tuple[int, int], message: str) -> None:
    for split in ("train", "valid", "test"):
        root = grow(f"data/{split}", {"Forest": 1, "River": 1}, size=size).parent
    with pytest.raises(UserError, match=message):
        resolve_size(open_tree(root), schema.Data(image_size=0))


@pytest.mark.parametrize(
    ("transforms", "saved", "message"),
    [
        ([], {"image_size": 48}, None),
        ([{"resize": [64, 64]}], {"image_size": 64}, None),
        ([{"resize": [64, 64]}], {"image_size": 48}, "mean image_size 64; the checkpoint has 48"),
        ([{"resize": [64, 64]}], {"image_size": 64, "center_crop": 48}, "mean center_crop 0; the checkpoint has 48"),
        ([], {"image_size": 64, "resize": 72}, "mean resize 0; the checkpoint has 72"),
    ],
)
def test_evaluation_expects_the_images_of_the_checkpoint(
    tmp_path: Path, transforms: list[Object], saved: Object, message: str | None
) -> None:
    data = {"input_type": "images", "test_input_path": "test/", "transforms": transforms}
    settings = verbs.evaluate(write(tmp_path, {"checkpoints": {"load": "m.pt"}, "data": data}))
    prepared = schema.Data(mean=(0, 0, 0), std=(1, 1, 1), **saved)
    state = checkpoint.load(
        saved_checkpoint(tmp_path / "m.pt", build("resnet18", 2, "head", 0), ["a", "b"], schema.Model())
    )
    state.config["data"] = prepared.model_dump(mode="json")
    if not message:
        check_expected(settings, state)
        return
    with pytest.raises(UserError, match=message):
        check_expected(settings, state)


def test_evaluation_expects_the_input_of_its_layers(tmp_path: Path) -> None:
    layers = tmp_path / "layers.json"
    layers.write_text(json.dumps(write_layers(Details(), 2, 128, {HEAD})))
    settings = verbs.EvaluateSettings(checkpoint=tmp_path / "m.pt", expected={"layers": str(layers)})
    state = checkpoint.load(
        saved_checkpoint(tmp_path / "m.pt", build("resnet18", 2, "head", 0), ["a", "b"], schema.Model())
    )
    with pytest.raises(UserError, match="takes images of 128x128 pixels; the checkpoint has 64"):
        check_expected(settings, state)
    state.config["data"]["image_size"] = 128
    check_expected(settings, state)


def test_images_that_are_not_resized_are_refused_by_name(grow: Grow) -> None:
    files = sorted(grow("images", {"Forest": 2}, size=(48, 48)).rglob("*.jpg"))
    device, data = torch.device("cpu"), schema.Data()
    (batch,) = file_batches(files, data, PICTURES, 2, device, 0, 1, seen := Seen())
    assert batch.images.shape == (2, 3, 64, 64)
    assert not seen.bad
    assert list(file_batches(files, data, PICTURES, 2, device, 0, 1, seen, resizes=False)) == []
    assert seen.bad.keys() == {0, 1}
    assert seen.bad[0].startswith("48x48 pixels; 64x64 is wanted")


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
