"""layers.json: a ResNet-50 as Keras writes it, version 2 (and rmldnn) or 3. It is compared, never executed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hvd_eurosat.config.jsonfile import read_json
from hvd_eurosat.data.bands import MOST
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details
from hvd_eurosat.weights.keras_graph import HEAD, INPUT, Layer, module_name, resnet50, weight_layers

Object = dict[str, Any]
Scaling = tuple[Sequence[float], Sequence[float]]
NORMALISATION = "normalisation"
COMMON: dict[str, Object] = {
    "Conv2D": {"dilation_rate": (1, 1), "groups": 1, "activation": "linear", "data_format": "channels_last"},
    "BatchNormalization": {"axis": 3},  # Keras 2 writes [3], but reads 3 too, and Keras 3 only that
    "ZeroPadding2D": {"data_format": "channels_last"},
    "MaxPooling2D": {"data_format": "channels_last"},
    "GlobalAveragePooling2D": {"data_format": "channels_last"},
}
OPTIONAL = {"groups": 1, "keepdims": False, "data_format": "channels_last"}  # keys that older Kerases do not write


@dataclass(frozen=True)
class Architecture:
    """What a layers.json says. trainable: as in model.trainable; classes: the units of its head.

    image_size: the side of its input in pixels, None where it takes any; bands: of its input.
    """

    details: Details
    trainable: str
    classes: int
    image_size: int | None
    bands: int = 3


def write_layers(
    details: Details,
    classes: int,
    image_size: int,
    trainable: Collection[str],
    scaling: Scaling | None = None,
    bands: int = 3,
    dtype: str = "uint8",
) -> Object:
    """The functional model for model_from_json. trainable: names of Keras' layers.

    scaling: mean and std of pixels, of uint8 of 0..1, for a model that takes them as they are, of `dtype`, and scales
    them itself.
    """
    layers: list[Object] = []
    first = NORMALISATION if scaling else INPUT
    for layer in resnet50(details, classes):
        config: Object = {"name": layer.name, "trainable": layer.name in trainable, "dtype": "float32"}
        if layer.kind == "InputLayer":
            shape = [None, image_size, image_size, bands]
            kind = dtype if scaling else "float32"
            config = {"name": layer.name, "batch_input_shape": shape, "dtype": kind, "sparse": False}
        elif layer.kind == "Conv2D":
            config["use_bias"] = False
        inputs = [first if name == INPUT else name for name in layer.inputs]
        config |= layer.settings | COMMON.get(layer.kind, {})
        layers.append(_written(layer.name, layer.kind, config, inputs))
        if layer.kind == "InputLayer" and scaling:
            layers.append(_rescaling(*scaling, 255 if dtype == "uint8" else 1))
    ends = {"input_layers": [[INPUT, 0, 0]], "output_layers": [[HEAD, 0, 0]]}
    config = {"name": "resnet50", "trainable": True, "layers": layers, **ends}
    # Keras 3 asks for the module, and 2.13 to 2.15 know it by the same name; others and rmldnn pass it over.
    whole = {"class_name": "Functional", "module": "keras.src.models", "config": config}
    return whole | {"keras_version": "2.15.0", "backend": "tensorflow"}


def _written(name: str, kind: str, config: Object, inputs: Sequence[str]) -> Object:
    inbound = [[[one, 0, 0, {}] for one in inputs]] if inputs else []
    return {"class_name": kind, "config": config, "name": name, "inbound_nodes": inbound}


def _rescaling(mean: Sequence[float], std: Sequence[float], most: int) -> Object:
    """Of pixels of 0..most, or of 1 as they are: x * scale + offset."""
    scale, offset = [1 / (most * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    config = {"name": NORMALISATION, "trainable": False, "dtype": "float32", "scale": scale, "offset": offset}
    return _written(NORMALISATION, "Rescaling", config, [INPUT])


def read_layers(path: Path) -> Architecture:
    """The architecture in a layers.json. Raises UserError, which names the layer, for any but a ResNet-50."""
    try:
        return parse_layers(read_json(path, "model.layers"))
    except RecursionError:
        raise UserError(f"model.layers {path}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"model.layers {path}: {error}") from None


def parse_layers(content: Any) -> Architecture:
    """The architecture in the JSON of a Keras model. Raises ValueError for any but our ResNet-50."""
    layers, outputs = _layers(content)
    if any(layer.kind == "Rescaling" for layer in layers.values()):
        raise ValueError("it normalises images itself, as training does before it: export it without")
    details = replace(_backbone(layers), head_bias=_find(layers, HEAD).settings.get("use_bias") is True)
    classes = _find(layers, HEAD).settings.get("units")
    if type(classes) is not int or not 0 < classes < 2**20:
        raise ValueError(f"the head has {_shown(classes)} units")
    expected = {layer.name: layer for layer in resnet50(details, classes)}
    for name in ("avg_pool", HEAD):
        _compare(layers, expected[name])
    for name in layers.keys() - expected.keys():
        raise ValueError(f"not a ResNet-50: {_shown(layers[name].kind)} layer {_shown(name)} is none of its layers")
    if outputs != [HEAD]:
        raise ValueError(f"its output is that of {_shown(outputs)}, not of the head alone")
    trains = {name for name, layer in layers.items() if layer.settings["trainable"]}
    size, bands = _image_size(layers[INPUT]), _input_shape(layers[INPUT])[3]
    return Architecture(details, _trainable(trains), classes, size, bands)


def parse_backbone(content: Any) -> Details:
    """The same for a ResNet-50 with any head or none, which may be a layer of another model."""
    return _backbone(_layers(_inner(content) or content)[0])


def _inner(content: Any) -> Any:
    """The model, among those that are layers of another, that begins as a ResNet-50; None where there is none."""
    config = content.get("config") if isinstance(content, dict) else None
    layers = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(layers, list):
        return None
    if any(_name(layer) == "conv1_conv" for layer in layers):
        return content
    return next((found for layer in layers if (found := _inner(layer))), None)


def _name(layer: Any) -> Any:
    config = layer.get("config") if isinstance(layer, dict) else None
    return config.get("name") if isinstance(config, dict) else None


def _backbone(layers: dict[str, Layer]) -> Details:
    details = _details(layers)
    for layer in resnet50(details, 1)[:-2]:
        _compare(layers, layer)
    return details


def _layers(content: Any) -> tuple[dict[str, Layer], list[str]]:
    """The layers by name, and the names of the outputs."""
    if not isinstance(content, dict) or content.get("class_name") not in ("Functional", "Model"):
        raise ValueError("not a functional Keras model (class_name Functional)")
    config = content.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("layers"), list):
        raise ValueError("it has no list config.layers")
    layers: dict[str, Layer] = {}
    for number, item in enumerate(config["layers"]):
        layer = _layer(item, f"layer {number}")
        if layer.name in layers:
            raise ValueError(f"two layers are called {_shown(layer.name)}")
        layers[layer.name] = layer
    kinds = {"InputLayer": INPUT, "Dense": HEAD}  # the layers that may have any name
    names = {layer.name: kinds[layer.kind] for layer in layers.values() if layer.kind in kinds}
    if len(set(names.values())) < len(names):
        raise ValueError(f"not a ResNet-50: inputs and dense layers are {_shown(sorted(names))}, expected one of each")
    outputs = [names.get(name, name) for name in _outputs(config.get("output_layers"))]
    return {names.get(name, name): _renamed(layer, names) for name, layer in layers.items()}, outputs


def _outputs(ends: Any) -> list[str]:
    """The names in [["a", 0, 0], ...] or, as Keras 3 writes a single one, in ["a", 0, 0]."""
    try:
        return [str(end[0]) for end in (ends if isinstance(ends[0], list) else [ends])]
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"output_layers {_shown(ends)} are not understood") from None


def _layer(item: Any, where: str) -> Layer:
    if not isinstance(item, dict) or not isinstance(item.get("config"), dict):
        raise ValueError(f"{where} is not an object with class_name and config")
    config, kind = item["config"], item.get("class_name")
    name = config.get("name", item.get("name"))
    if not isinstance(name, str) or not isinstance(kind, str):
        raise ValueError(f"{where} has no name and class_name")
    settings = {key: _plain(value) for key, value in config.items()}
    settings["trainable"] = config.get("trainable", True) is True
    return Layer(name, kind, settings, tuple(_inputs(item.get("inbound_nodes"), name)))


def _inputs(nodes: Any, name: str) -> list[str]:
    """The names in [[["a", 0, 0, {}], ...]] (Keras 2) or in [{"args": [a tensor or a list of them]}] (Keras 3)."""
    if nodes == []:
        return []
    try:
        (node,) = nodes
        if isinstance(node, list):
            found = [entry[0] for entry in node]
        else:
            (tensors,) = node["args"]
            tensors = tensors if isinstance(tensors, list) else [tensors]
            found = [tensor["config"]["keras_history"][0] for tensor in tensors]
    except (TypeError, ValueError, KeyError, IndexError):
        raise ValueError(f"inbound_nodes of {_shown(name)} are not understood") from None
    return found


def _renamed(layer: Layer, names: dict[str, str]) -> Layer:
    inputs = tuple(names.get(name, name) if isinstance(name, str) else repr(name) for name in layer.inputs)
    return replace(layer, name=names.get(layer.name, layer.name), inputs=inputs)


def _details(layers: dict[str, Layer]) -> Details:
    """What may differ, taken where it shows first; whether all the layers agree is compared afterwards."""
    norm, first = (_find(layers, name).settings for name in ("conv1_bn", "conv3_block1_1_conv"))
    epsilon, momentum = (_number(norm, key, "conv1_bn") for key in ("epsilon", "momentum"))
    if not 0 < epsilon < 1 or not 0 <= momentum < 1:
        raise ValueError(f"conv1_bn has epsilon {epsilon:g} and momentum {momentum:g}")
    variant = "v1" if first.get("strides") == (2, 2) else "v1.5"
    return Details(variant, epsilon, round(1 - momentum, 12), norm.get("scale") is True)


def _find(layers: dict[str, Layer], name: str) -> Layer:
    if name not in layers:
        raise ValueError(f"not a ResNet-50: it has no layer {name}")
    return layers[name]


def _number(settings: Object, key: str, name: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float):
        raise ValueError(f"{name} has {key} {_shown(value)}")
    return float(value)


def _compare(layers: dict[str, Layer], expected: Layer) -> None:
    layer = _find(layers, expected.name)
    if layer.kind != expected.kind:
        raise ValueError(f"not a ResNet-50: {layer.name} is a {_shown(layer.kind)}, expected {expected.kind}")
    if layer.kind == "InputLayer":
        _input_shape(layer)
    for key, value in {**COMMON.get(layer.kind, {}), **expected.settings}.items():
        found = layer.settings.get(key, OPTIONAL.get(key))
        if key == "activation" and found == "log_softmax_v2":  # TensorFlow's name for it
            found = "log_softmax"
        if key == "axis" and found in ((3,), -1, (-1,)):
            found = 3
        if found != value:
            raise ValueError(f"{layer.name} has {key} {_shown(found)}, expected {_shown(value)}")
    inputs = set(layer.inputs) if layer.kind == "Add" else layer.inputs
    if inputs != (set(expected.inputs) if layer.kind == "Add" else expected.inputs):
        raise ValueError(f"{layer.name} follows {_shown(layer.inputs)}, expected {_shown(expected.inputs)}")


def _input_shape(layer: Layer) -> tuple[Any, ...]:
    shape = layer.settings.get("batch_input_shape", layer.settings.get("batch_shape"))
    if isinstance(shape, tuple) and len(shape) == 4 and type(shape[3]) is int and 1 <= shape[3] <= MOST:
        return shape
    raise ValueError(f"input shape {_shown(shape)}, expected [null, size, size, bands]")


def _image_size(layer: Layer) -> int | None:
    """The side of the images that an InputLayer takes, None for any."""
    shape = _input_shape(layer)
    side = shape[1]
    if side == shape[2] and (side is None or (type(side) is int and side > 0)):
        return side
    raise ValueError(f"input shape {_shown(shape)}, expected [null, size, size, bands]")


def _trainable(names: set[str]) -> str:
    """model.trainable for the layers that train."""
    weights = weight_layers()
    trains = [name for name in weights if name in names]
    norms = [name for name in weights if name.endswith("_bn")]
    if not trains:
        raise ValueError("none of its layers is trainable")
    modes = {"all": weights, "bn+head": [*norms, HEAD], "head": [HEAD]}
    return next((mode for mode, layers in modes.items() if layers == trains), ",".join(map(module_name, trains)))


def _plain(value: Any) -> Any:
    """A setting that can be compared: lists as tuples, functions (of TensorFlow, since Keras 2.13) by name."""
    if isinstance(value, dict) and value.get("class_name") == "function":
        return value.get("config")
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
