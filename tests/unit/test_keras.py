"""Keras: our exports in real Keras 3, Keras' own files here, and files that are not what they claim to be."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.images import decode, to_array
from hvd_eurosat.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from hvd_eurosat.data.sample import generate
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build
from hvd_eurosat.weights import hdf5
from hvd_eurosat.weights.exporters import keras_weights
from hvd_eurosat.weights.keras_graph import HEAD, module_name, resnet50, weight_layers
from hvd_eurosat.weights.keras_json import Architecture, parse_layers, read_layers, write_layers
from hvd_eurosat.weights.loading import load_weights, read_weights
from hvd_eurosat.weights.settle import settle
from tests.unit.conftest import EUROSAT, blank, needs_eurosat, saved_checkpoint

os.environ["KERAS_BACKEND"] = "torch"

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
Change = Callable[..., Any]


def lively(model: nn.Module, seed: int = 0) -> None:
    """Statistics and weights of BatchNorm as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)

    def near(tensor: Tensor, centre: float) -> None:
        tensor.data.copy_(centre + 0.2 * (torch.rand(tensor.shape, generator=generator) - 0.5))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            near(module.running_mean, 0)
            near(module.running_var, 1)
            if module.affine:
                near(module.weight, 0.5)
                near(module.bias, 0)


def images(count: int) -> Tensor:
    """float32 [count, 3, 64, 64] of the synthetic sample, normalised."""
    return normalised([content for _, content in generate(per_class=-(-count // 10), seed=3)][:count])


def eurosat(count: int) -> Tensor:
    """The same of the real data set, from all its classes."""
    with zipfile.ZipFile(EUROSAT) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return normalised([archive.read(name) for name in names[:: len(names) // count][:count]])


def normalised(files: list[bytes]) -> Tensor:
    pixels = np.stack([to_array(decode(content), 64) for content in files])
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), Data())


@pytest.fixture(scope="module", params=["v1", "v1.5"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LandCoverResNet]:
    """layers.json and model.h5 of each variant, and the network."""
    folder = tmp_path_factory.mktemp("exported")
    model = build("resnet50", 10, "bn+head", seed=1, details=Details(request.param, epsilon=2e-5)).eval()
    lively(model)
    model_settings = Model(variant=request.param, bn_epsilon=2e-5)
    saved_checkpoint(folder / "source.pt", model, list("abcdefghij"), model_settings)
    section = Model(weights=str(folder / "source.pt"), variant=request.param, bn_epsilon=2e-5)
    lines = export(ExportSettings(format="keras", out=folder, model=section))
    names = ("model.h5", "layers.json", "model_card.md", "stac_item.json")
    taken = f"model.weights {folder / 'source.pt'}: 319 tensors"
    assert lines == [taken, *(f"wrote {folder / name}" for name in names)]
    return folder, model


@pytest.fixture(scope="module")
def in_keras(exported: tuple[Path, LandCoverResNet]) -> Any:
    """The export in real Keras 3."""
    import keras

    folder, _ = exported
    network = keras.models.model_from_json((folder / "layers.json").read_text())
    network.load_weights(folder / "model.h5")
    return network


def in_torch(model: nn.Module, batch: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model.eval()(batch))


@pytest.mark.parametrize(
    ("source", "count"), [(images, 16), pytest.param(eurosat, 256, marks=[needs_eurosat, pytest.mark.long])]
)
def test_keras_computes_the_same(
    exported: tuple[Path, LandCoverResNet], in_keras: Any, source: Callable[[int], Tensor], count: int
) -> None:
    batch = source(count)
    theirs = in_keras.predict(batch.permute(0, 2, 3, 1).numpy(), batch_size=64, verbose=0)
    ours = np.concatenate([in_torch(exported[1], piece) for piece in batch.split(64)])
    assert np.abs(theirs - ours).max() < 1e-4


def test_keras_counts_the_same(exported: tuple[Path, LandCoverResNet], in_keras: Any) -> None:
    sizes = {
        kind: sum(int(np.prod(w.shape)) for w in getattr(in_keras, kind)) for kind in ("weights", "trainable_weights")
    }
    assert sizes == {"weights": 23_528_512 + 53_120, "trainable_weights": 73_600}
    variant = exported[1].details.variant
    assert len(in_keras.layers) == {"v1": 177, "v1.5": 180}[variant]
    assert [layer.name for layer in in_keras.layers] == [layer.name for layer in resnet50(Details(variant), 10)]


one_variant = pytest.mark.parametrize("exported", ["v1.5"], indirect=True)


@one_variant
def test_keras_normalises_pixels_itself(exported: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    """--with-normalisation: the same weights, and a layer before them. A training would normalise twice."""
    import keras

    folder, model = exported
    scaling = (IMAGENET_MEAN, IMAGENET_STD)
    content = json.dumps(write_layers(model.details, 10, 64, (), scaling))
    network = keras.models.model_from_json(content)
    network.load_weights(folder / "model.h5")
    pixels = np.stack([to_array(decode(content), 64) for _, content in generate(per_class=1, seed=3)])
    ours = in_torch(model, normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), Data()))
    assert np.abs(network.predict(pixels, verbose=0) - ours).max() < 1e-4
    (tmp_path / "layers.json").write_text(content)
    with pytest.raises(UserError, match="it normalises images itself, as training does before it: export it without"):
        read_layers(tmp_path / "layers.json")


@one_variant
def test_keras_trains_a_step(in_keras: Any) -> None:
    import keras

    network = keras.models.clone_model(in_keras)
    network.set_weights(in_keras.get_weights())
    frozen, head = network.get_layer("conv1_conv"), network.get_layer("dense")
    before = [frozen.get_weights()[0].copy(), head.get_weights()[0].copy()]
    network.compile(optimizer="sgd", loss=lambda labels, logs: -keras.ops.take_along_axis(logs, labels, axis=1))
    network.train_on_batch(images(10).permute(0, 2, 3, 1).numpy(), np.arange(10).reshape(10, 1))
    assert np.array_equal(before[0], frozen.get_weights()[0])
    assert not np.array_equal(before[1], head.get_weights()[0])


def test_our_export_comes_back(exported: tuple[Path, LandCoverResNet]) -> None:
    folder, model = exported
    settled = settle(Model(weights=str(folder / "model.h5"), layers=folder / "layers.json"), 10, 64)
    assert (settled.variant, settled.bn_epsilon, settled.bn_momentum) == (model.details.variant, 2e-5, 0.1)
    assert settled.trainable == "bn+head"
    again = blank(Details.of(settled), settled.trainable)
    load_weights(again, settled)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert settle(Model(weights=str(folder / "model.h5")), 10, 64).variant == model.details.variant
    other = {"v1": "v1.5", "v1.5": "v1"}[model.details.variant]
    with pytest.raises(UserError, match=rf"is of a ResNet-50 {model.details.variant}, and model.variant is {other}"):
        settle(Model(weights=str(folder / "model.h5"), variant=other), 10, 64)


@pytest.mark.parametrize("exported", ["v1"], indirect=True)
def test_layers_and_weights_are_of_one_network(exported: tuple[Path, LandCoverResNet], tmp_path: Path) -> None:
    """Keras writes neither variant nor epsilon beside weights: they are those of layers.json, not v1.5 as of itself."""
    folder, model = exported
    silent = Path(shutil.copy(folder / "model.h5", tmp_path))
    with h5py.File(silent, "r+") as archive:
        del archive.attrs["variant"], archive.attrs["bn_epsilon"]
    settled = settle(Model(weights=str(silent), layers=folder / "layers.json"), 10, 64)
    again = blank(Details.of(settled), settled.trainable)
    load_weights(again, settled)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@dataclass(frozen=True)
class Application:
    """A network of keras.applications, its files by layout, and what its last pooling makes of images(4)."""

    network: Any
    files: dict[str, Path]
    features: NDArray[np.float32]


@pytest.fixture(scope="module")
def applications(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Application]:
    """keras.applications.ResNet50, lively, with its top and without, as include_top=False has it."""
    import keras

    whole = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3))
    rng = np.random.default_rng(4)
    for layer in whole.layers:
        values = layer.get_weights()
        if layer.name.endswith("_bn"):
            centres = (0.5, 0, 0, 1)
            layer.set_weights([c + rng.uniform(-0.1, 0.1, v.shape) for c, v in zip(centres, values, strict=True)])
        elif layer.name.endswith("_conv"):
            layer.set_weights([values[0], rng.uniform(-0.1, 0.1, values[1].shape)])
    pooled = keras.Model(whole.inputs, whole.get_layer("avg_pool").output)
    features = pooled.predict(images(4).permute(0, 2, 3, 1).numpy(), verbose=0)
    assert features.std() > 0.01
    body = keras.Model(whole.inputs, whole.get_layer("conv5_block3_out").output, name="resnet50")
    made = {}
    for name, network in (("top", whole), ("features", body)):
        folder = tmp_path_factory.mktemp(name)
        files = {"whole": folder / "whole.h5"}
        network.save(files["whole"])
        made[name] = Application(network, files, features)
    files = made["top"].files
    files |= {"keras 3": files["whole"].with_name("a.weights.h5"), "older": files["whole"].with_name("older.h5")}
    whole.save_weights(files["keras 3"])
    save_as_keras_2(whole, files["older"])
    return made


def save_as_keras_2(network: Any, path: Path) -> None:
    """A weights file as Keras 2 wrote it, by h5py alone."""
    with h5py.File(path, "w") as archive:
        archive.attrs["layer_names"] = [layer.name.encode() for layer in network.layers]
        archive.attrs["backend"], archive.attrs["keras_version"] = b"tensorflow", b"2.9.0"
        for layer in network.layers:
            group = archive.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, value in zip(names, layer.get_weights(), strict=True):
                group[name] = value


@pytest.mark.parametrize("layout", ["keras 3", "older"])
def test_a_variant_that_no_file_states_is_asked_for(applications: dict[str, Application], layout: str) -> None:
    with pytest.raises(UserError, match=r"does not say where its network strides: give --model\.variant v1 "):
        settle(Model(weights=str(applications["top"].files[layout])), 10, 64)


@pytest.fixture(scope="module")
def body(applications: dict[str, Application]) -> LandCoverResNet:
    """Keras' without its top, here."""
    return loaded(applications["features"].files["whole"])


def loaded(path: Path, variant: str = "auto") -> LandCoverResNet:
    """With a head of its own."""
    settled = settle(Model(weights=str(path), variant=variant), 10, 64)
    assert settled.variant == "v1"
    head = torch.ones(10, 2048)
    ours = blank(Details.of(settled))
    ours.fc.weight.data.copy_(head)
    load_weights(ours, settled)
    assert torch.equal(ours.fc.weight, head)
    return ours


@pytest.mark.parametrize("kind", ["keras 3", "whole", "older", "without top"])
def test_keras_own_resnet50_computes_the_same_here(
    applications: dict[str, Application], kind: str, request: pytest.FixtureRequest
) -> None:
    application = applications["features" if kind == "without top" else "top"]
    if kind == "without top":
        ours = request.getfixturevalue("body")
    else:
        ours = loaded(application.files[kind], variant="auto" if kind == "whole" else "v1")
    with torch.no_grad():
        mine = ours.eval().features(images(4)).numpy()
    assert np.abs(application.features - mine).max() < 1e-4


@pytest.mark.parametrize("layout", ["keras 3", "whole"])
def test_a_resnet50_in_another_model_is_found(
    applications: dict[str, Application], body: LandCoverResNet, tmp_path: Path, layout: str
) -> None:
    """As people put it between augmentation and a head of their own."""
    import keras

    network = applications["features"].network
    outer = [keras.layers.RandomFlip(), network, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)]
    whole = keras.Sequential([keras.Input((64, 64, 3)), *outer, keras.layers.Dense(3, name="last")])
    path = tmp_path / "w.h5" if layout == "whole" else tmp_path / "w.weights.h5"
    (whole.save if layout == "whole" else whole.save_weights)(path)
    settled = settle(Model(weights=str(path), variant="auto" if layout == "whole" else "v1"), 10, 64)
    assert settled.variant == "v1"
    taken = load_weights(inner := blank(Details.of(settled)), settled)
    assert taken.line == f"265 tensors; it has no head; left out: {outer[-1].name}, last"
    state = inner.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.state_dict().items() if name != "fc.weight")


def test_layers_of_keras_3_are_read_too() -> None:
    """Keras 3's own spelling, and that of the peer's Keras 2.9."""
    import keras

    backbone = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=(64, 64, 3))
    backbone.trainable = False
    outputs = keras.layers.Dense(7, activation="log_softmax", use_bias=False, name="head")(backbone.output)
    found = parse_layers(json.loads(keras.Model(backbone.inputs, outputs).to_json()))
    assert found == Architecture(Details("v1", 1.001e-5, 0.01), "head", 7, 64)


@pytest.fixture
def layers() -> Object:
    """A layers.json of v1.5, as rmldnn's Keras 2 wrote it."""
    trains = {name for name in weight_layers() if name.endswith("_bn") or name == HEAD}
    content = json.loads(json.dumps(write_layers(Details(), 10, 64, trains)))
    for layer in content["config"]["layers"]:
        if "axis" in layer["config"]:
            layer["config"]["axis"] = [3]
        if layer["name"] == HEAD:
            layer["config"]["activation"] = "log_softmax_v2"
    return content


def edit(content: Object, layer: str, **config: object) -> Object:
    """The same with other settings of one layer."""
    found = next(item for item in content["config"]["layers"] if item["name"] == layer)
    found["config"] |= config
    return content


def test_flags_and_details_of_a_layers_json(layers: Object) -> None:
    assert parse_layers(layers) == Architecture(Details(), "bn+head", 10, 64)
    function = {"module": "builtins", "class_name": "function", "config": "log_softmax_v2"}
    assert parse_layers(edit(layers, HEAD, activation=function)) == Architecture(Details(), "bn+head", 10, 64)
    assert parse_layers(edit(layers, "conv5_block3_3_bn", trainable=False)).trainable.startswith("bn1,layer1.0")
    for layer in layers["config"]["layers"]:
        if layer["class_name"] == "BatchNormalization":
            layer["config"] |= {"center": False, "scale": False, "epsilon": 1.001e-5, "momentum": 0.99}
    assert parse_layers(layers).details == Details("v1.5", 1.001e-5, 0.01, affine=False)


def test_single_layers_can_be_frozen(layers: Object) -> None:
    for layer in layers["config"]["layers"]:
        layer["config"]["trainable"] = layer["name"] in ("dense", "conv5_block3_3_bn", "conv5_block3_3_conv")
    trainable = parse_layers(layers).trainable
    assert trainable == "layer4.2.conv3,layer4.2.bn3,fc"
    with torch.device("meta"):
        model = LandCoverResNet("resnet50", 10, trainable)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["layer4.2.conv3.weight", "layer4.2.bn3.weight", "layer4.2.bn3.bias", "fc.weight"]
    assert model.get_submodule("layer4.2.bn3").training
    assert not model.bn1.training


@pytest.mark.parametrize(
    ("name", "reason"), [("layer9", "resnet50 has no module layer9"), ("maxpool", "maxpool of resnet50")]
)
def test_a_module_that_cannot_learn_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"model\.trainable: {reason}"):
        settle(Model(trainable=f"{name},fc", weights="none"), 10, 64)


def another_head(content: Object) -> Object:
    head = copy.deepcopy(content["config"]["layers"][-1])
    head["name"] = head["config"]["name"] = "other"
    content["config"]["layers"].append(head)
    return content


def lambda_layer(content: Object) -> Object:
    content["config"]["layers"][3] |= {"class_name": "Lambda"}
    content["config"]["layers"][3]["config"]["function"] = ["4wEAAAAAAAAA", None, None]
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "not a functional Keras model"),
        (lambda c: {**c, "class_name": "Sequential"}, "not a functional Keras model"),
        (lambda c: {**c, "config": {"layers": "many"}}, "it has no list config.layers"),
        (lambda c: {**c, "config": {"layers": [1]}}, "layer 0 is not an object"),
        (another_head, "inputs and dense layers are ['dense', 'input_1', 'other'], expected one of each"),
        (
            lambda c: c["config"].update(output_layers=[["conv5_block3_out", 0, 0]]) or c,
            "its output is that of ['conv5_block3_out'], not of the head alone",
        ),
        (lambda c: c["config"].pop("output_layers") and c, "output_layers None are not understood"),
        (lambda_layer, "not a ResNet-50: conv1_bn is a 'Lambda', expected BatchNormalization"),
        (lambda c: edit(c, "conv3_block2_2_conv", filters=99), "conv3_block2_2_conv has filters 99, expected 128"),
        (
            lambda c: edit(c, "conv3_block1_2_conv", padding="same"),
            "conv3_block1_2_conv has padding 'same', expected 'valid'",
        ),
        (
            lambda c: edit(c, "conv5_block1_1_conv", strides=[2, 2]),
            "conv5_block1_1_conv has strides (2, 2), expected (1, 1)",
        ),
        (lambda c: edit(c, "dense", use_bias=1), "dense has use_bias 1, expected False"),
        (lambda c: edit(c, "dense", activation="softmax"), "dense has activation 'softmax', expected 'log_softmax'"),
        (lambda c: edit(c, "dense", units=-1), "the head has -1 units"),
        (lambda c: edit(c, "conv4_block6_2_bn", epsilon=1), "conv4_block6_2_bn has epsilon 1, expected 1e-05"),
        (lambda c: edit(c, "conv1_bn", epsilon="big"), "conv1_bn has epsilon 'big'"),
        (lambda c: edit(c, "input_1", batch_input_shape=[None, 64, 64, 65]), "input shape (None, 64, 64, 65)"),
        (lambda c: edit(c, "conv1_conv", name="conv1_conv_x"), "it has no layer conv1_conv"),
        (lambda c: edit(c, "input_1", batch_input_shape=[None, 64, 32, 3]), "input shape (None, 64, 32, 3), expected"),
        (lambda c: c["config"]["layers"].pop(50) and c, "not a ResNet-50: it has no layer conv3_block"),
        (lambda c: c["config"]["layers"].append(c["config"]["layers"][5]) or c, "two layers are called 'pool1_pad'"),
        (
            lambda c: c["config"]["layers"][7].update(inbound_nodes=[[["pool1_pad", 0, 0, {}]]]) or c,
            "follows ('pool1_pad',)",
        ),
        (lambda c: c["config"]["layers"][7].update(inbound_nodes={"a": 1}) or c, "inbound_nodes of"),
    ],
)
def test_a_layers_json_of_anything_else(tmp_path: Path, layers: Object, change: Change, message: str) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(change(layers)))
    with pytest.raises(UserError) as error:
        read_layers(path)
    assert f"model.layers {path}: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        (
            '{"class_name": "Functional", "config": {"layers": [' + "[" * 600 + "]" * 600 + "]}}",
            "layer 0 is not an object",
        ),
        ('{"class_name": ', "Expecting value"),
        ("\xff", "model.layers"),
        ("9" * 5000, "model.layers"),
    ],
)
def test_hostile_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_layers(tmp_path / "l.json")


def test_a_configuration_against_its_layers(tmp_path: Path, layers: Object) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(layers))
    with pytest.raises(UserError, match=r"model\.variant is v1, but model\.layers .* says v1\.5"):
        settle(Model(layers=path, variant="v1", weights="none"), 10, 64)
    with pytest.raises(UserError, match=r"has a head of 10 units; the data has 4 classes"):
        settle(Model(layers=path, weights="none"), 4, 64)
    with pytest.raises(UserError, match=r"is a resnet50, and model\.arch is resnet18"):
        settle(Model(layers=path, weights="none", arch="resnet18"), 10, 64)
    with pytest.raises(UserError, match=r"takes images of 64x64 pixels; data\.input_size, or else image_size, is 128"):
        settle(Model(layers=path, weights="none"), 10, 128)
    path.write_text(json.dumps(edit(layers, "input_1", batch_input_shape=[None, None, None, 3])))
    assert read_layers(path).image_size is None
    assert settle(Model(layers=path, weights="none"), 10, 128).trainable == "bn+head"


PLACES = st.lists(st.integers(0, 200), min_size=1, max_size=4)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(place=PLACES, value=VALUES, data=st.data())
def test_mutated_layers(place: list[int], value: object, data: st.DataObject) -> None:
    """Any value anywhere in the JSON: it is refused in so many words, or it makes no difference."""
    content = json.loads(TEMPLATE)
    node, parents = content["config"]["layers"], []
    for step in place:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        parents.append((node, keys[step % len(keys)]))
        node = node[keys[step % len(keys)]]
        if not isinstance(node, list | dict):
            break
    parents[-1][0][parents[-1][1]] = value
    try:
        parse_layers(content)
    except ValueError as error:
        assert str(error)  # noqa: PT017 (most mutations raise, not all)


TEMPLATE = json.dumps(write_layers(Details(), 10, 64, set(weight_layers())))


@pytest.fixture(scope="module")
def h5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export without values, which HDF5 does not store: 0.3 MB."""
    path = tmp_path_factory.mktemp("h5") / "model.h5"
    with torch.device("meta"):
        state = LandCoverResNet("resnet50", 10, "all").state_dict()
    with h5py.File(path, "w") as archive:
        archive.attrs["variant"], archive.attrs["bn_epsilon"] = "v1.5", "1e-05"
        archive.attrs["layer_names"] = [name.encode() for name in weight_layers()]
        for name in weight_layers():
            group = archive.create_group(name)
            shape = state[f"{module_name(name)}.weight"].shape
            shapes = {"kernel": (*shape[2:], *shape[1::-1])}
            if name.endswith("_bn"):
                shapes = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), tuple(shape))
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in shapes]
            for key, shape in shapes.items():
                group.create_dataset(f"{name}/{key}:0", shape, np.float32)
    return path


def rename(archive: h5py.File) -> None:
    archive.move("conv1_bn", "mystery")
    archive.attrs["layer_names"] = ["mystery" if name == "conv1_bn" else name for name in weight_layers()]


def drop(archive: h5py.File) -> None:
    archive.attrs["layer_names"] = [name for name in weight_layers() if name != "conv1_bn"]


def reshape(archive: h5py.File) -> None:
    del archive["conv1_conv/conv1_conv/kernel:0"]
    archive["conv1_conv/conv1_conv/kernel:0"] = np.zeros((7, 7, 64, 3), np.float32)


def replace(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(archive: h5py.File) -> None:
        del archive[name]
        archive[name] = value

    return change


def huge(archive: h5py.File) -> None:
    del archive["conv1_bn/conv1_bn/gamma:0"]
    archive.create_dataset("conv1_bn/conv1_bn/gamma:0", (2**40,), np.float32, chunks=(2**20,))


KERNEL = "conv1_conv/conv1_conv/kernel:0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"layer conv1_bn is missing; layer 'mystery' is unknown \(2 differences\)"),
        (drop, "not weights of resnet50: layer conv1_bn is missing"),
        (reshape, r"kernel of conv1_conv is \[7, 7, 64, 3\], expected \[7, 7, 3, 64\]"),
        (lambda a: a.__delitem__(KERNEL), "'kernel:0' is missing"),
        (replace(KERNEL, h5py.ExternalLink("/etc/passwd", "/")), "'kernel:0' is a link"),
        (replace(KERNEL, h5py.SoftLink("/conv1_bn")), "'kernel:0' is a link"),
        (replace(KERNEL, "text"), "is no array of numbers"),
        (huge, "its weights would be 4,398,140,"),
        (lambda a: a.attrs.pop("layer_names"), "not Keras' weights"),
        (lambda a: a.attrs.modify("variant", "v9"), "its variant is 'v9'"),
    ],
)
def test_hdf5_files_with_something_wrong(tmp_path: Path, h5: Path, change: Change, message: str) -> None:
    path = Path(shutil.copy(h5, tmp_path / "w.h5"))
    with h5py.File(path, "r+") as archive:
        change(archive)
    with pytest.raises(UserError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"model.weights {path}: ")
    assert "\n" not in str(error.value)


def test_no_hdf5_at_all(tmp_path: Path, h5: Path) -> None:
    path = tmp_path / "w.h5"
    with pytest.raises(UserError, match="No such file or directory"):
        read_weights(path)
    for content in (b"", b"text", h5.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole HDF5 file"):
            read_weights(path)


def test_an_hdf5_library_gone_astray_ends_in_an_error(
    tmp_path: Path, h5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when damaged bytes send it round in circles: the limit of the reader's own process ends it."""
    script = tmp_path / "circles.py"
    script.write_text("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True:\n    pass\n")
    monkeypatch.setattr(hdf5, "__name__", "circles")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="damaged, or not an HDF5 file"):
        read_weights(h5)


FUZZ = """
import os, random, sys
from hvd_eurosat.weights import hdf5

hdf5.SECONDS = 1
path, seeds, *files = sys.argv[1:]
files = [open(file, "rb").read() for file in files]
for seed in range(int(seeds)):
    rng = random.Random(seed)
    data = bytearray(rng.choice(files))
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.choice([1, 3, 10, 100]) if kind else 0):
        at = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(8192)
        if kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.choice([0, 1, 127, 128, 255])
        else:
            source, length = rng.randrange(len(data)), rng.randrange(64)
            data[at : at + length] = data[source : source + length]
    open(path, "wb").write(data)
    if not (child := os.fork()):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv[1:] = [path]
        status = 99
        try:
            hdf5.main()
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_hdf5_files(tmp_path: Path, count: int) -> None:
    """The reader's process ends well (0), with its clean error (2), or at its limits; never in a traceback."""
    for name, group in (("weights.h5", "/"), ("whole.h5", "/model_weights")):
        with h5py.File(tmp_path / name, "w") as archive:
            root = archive.require_group(group)
            root.attrs["layer_names"] = [b"conv1_conv", b"conv1_bn"]
            for layer, keys in (("conv1_conv", ["kernel", "bias"]), ("conv1_bn", hdf5.NORM)):
                child = root.create_group(layer)
                child.attrs["weight_names"] = [f"{layer}/{key}:0" for key in keys]
                for key in keys:
                    child[f"{layer}/{key}:0"] = np.ones(64, np.float32)
    with h5py.File(tmp_path / "keras3.h5", "w") as archive:
        group = archive.create_group("layers/conv2d/vars")
        group.attrs["name"], group["0"] = "conv1_conv", np.ones((7, 7, 3, 64), np.float32)
    files = [str(tmp_path / name) for name in ("weights.h5", "whole.h5", "keras3.h5")]
    arguments = [sys.executable, "-c", FUZZ, str(tmp_path / "mutated.h5"), str(count), *files]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=500, check=True)
    ends = [int(line) for line in done.stdout.split()]
    assert len(ends) == count
    assert ends.count(0) > 0.1 * count
    assert ends.count(2) > 0.3 * count
    assert all(end < 0 for end in ends if end not in (0, 2))
    assert sum(end < 0 for end in ends) < 0.03 * count


def test_weights_of_norms_without_scale(tmp_path: Path) -> None:
    """rmldnn's network.json has center and scale false."""
    details = Details(affine=False)
    model = build("resnet50", 10, "bn+head", seed=0, details=details)
    lively(model)
    with (tmp_path / "m.h5").open("w+b") as file:
        keras_weights(model, {"variant": "v1.5", "bn_epsilon": 1e-5}, file)
    again = blank(details, "bn+head")
    load_weights(again, Model(weights=str(tmp_path / "m.h5")))
    whole = blank(trainable="bn+head")
    load_weights(whole, Model(weights=str(tmp_path / "m.h5")))
    batch = images(4)
    expected = in_torch(model, batch)
    assert np.array_equal(in_torch(again, batch), expected)
    assert np.abs(in_torch(whole, batch) - expected).max() < 1e-5
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == 20_480
