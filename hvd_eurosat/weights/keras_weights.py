"""model.h5: the weights of a ResNet-50 in Keras' layouts (see hdf5, which reads them)."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet
from hvd_eurosat.weights import hdf5
from hvd_eurosat.weights.first_layer import stated_bands
from hvd_eurosat.weights.keras_graph import HEAD, module_name, resnet50, weight_layers
from hvd_eurosat.weights.keras_json import parse_backbone
from hvd_eurosat.weights.weight_file import Weights

Layer = dict[str, Tensor]
FEATURES = 2048
FIRST, FIRST_SIZE = "conv1_conv", (7, 7)
OPTIONAL = {"bias", "gamma", "beta"}
TORCH = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def write_weights(file: BinaryIO, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """A state dict (torchvision's keys) in Keras' layout; facts become attributes of the file, JSON where not text."""
    names = [layer.name for layer in resnet50(Details(str(facts["variant"])), 1)]
    weighted = weight_layers()
    with h5py.File(file, "w") as archive:
        archive.attrs["layer_names"] = [name.encode() for name in names]
        archive.attrs["backend"] = "tensorflow"
        archive.attrs["keras_version"] = "2.15.0"
        for key, value in facts.items():
            archive.attrs[key] = value if isinstance(value, str) else json.dumps(value)
        for name in names:
            arrays = _to_keras(name, state) if name in weighted else {}
            group = archive.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in arrays]
            for key, array in arrays.items():
                group.create_dataset(f"{name}/{key}:0", data=array)


def _to_keras(name: str, state: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    module = module_name(name)
    if not name.endswith("_bn"):
        return {"kernel": _kernel(state[f"{module}.weight"])}
    keys = {key: f"{module}.{TORCH[key]}" for key in TORCH}
    return {key: state[own].numpy(force=True) for key, own in keys.items() if own in state}


def _kernel(weight: Tensor) -> NDArray[np.float32]:
    """[out, in, H, W] as Keras' [H, W, in, out]; [out, in] as [in, out]."""
    order = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
    return np.ascontiguousarray(weight.numpy(force=True).transpose(order))


def read_weights(path: Path) -> Weights:
    """The weights in a Keras file, as torchvision's; convolutions' biases go into the means of BatchNorm.

    Raises UserError, which names the layer, where weights are missing, unknown or of another shape.
    """
    reader = subprocess.run([sys.executable, "-m", hdf5.__name__, str(path)], capture_output=True, check=False)
    if reader.returncode:
        reason = reader.stderr.decode(errors="replace") if reader.returncode == 2 else "damaged, or not an HDF5 file"
        raise UserError(f"model.weights {path}: {reason}")
    try:
        layers, facts = _unpack(reader.stdout)
        _check(layers)
        return Weights(_to_torch(layers), *_stated(facts), bands=stated_bands(facts.get("bands")))
    except RecursionError:
        raise UserError(f"model.weights {path}: its model_config is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"model.weights {path}: {error}") from None


def _unpack(data: bytes) -> tuple[dict[str, Layer], dict[str, str]]:
    size = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    layers: dict[str, Layer] = {}
    for name, tensor in safetensors.torch.load(data).items():
        layer, key = name.rsplit("/", 1)
        layers.setdefault(layer, {})[key] = tensor
    heads = [name for name, layer in layers.items() if name not in _shapes() and _is_head(layer)]
    if len(heads) == 1:
        layers[HEAD] = layers.pop(heads[0])
    return layers, facts


def _stated(facts: Mapping[str, str]) -> tuple[str | None, float | None]:
    """The variant and epsilon, from our own attributes or a whole model's configuration, if there is either."""
    if "variant" in facts:
        variant, epsilon = facts["variant"], float(facts.get("bn_epsilon", "nan"))
        if variant not in ("v1", "v1.5") or not 0 < epsilon < 1:
            raise ValueError(f"its variant is {variant[:20]!r} and its bn_epsilon {epsilon:g}")
        return variant, epsilon
    if "model_config" in facts:
        details = parse_backbone(json.loads(facts["model_config"]))
        return details.variant, details.epsilon
    return None, None


def _check(layers: Mapping[str, Layer]) -> None:
    """Raise ValueError unless names and shapes are the network's; the head may be missing."""
    expected = _shapes()
    for name in [*layers, *expected]:
        if name not in layers:
            raise ValueError(f"not weights of resnet50: layer {name} is missing")
        if name != HEAD:
            _check_layer(name, layers[name], expected.get(name))


def _check_layer(name: str, layer: Layer, expected: Mapping[str, tuple[int, ...]] | None) -> None:
    if expected is None:
        raise ValueError(f"not weights of resnet50: layer {name[:60]!r} is unknown")
    for key in [*layer, *(key for key in expected if key not in OPTIONAL)]:
        if key not in expected:
            raise ValueError(f"not weights of resnet50: {name} has an unknown {key[:60]!r}")
        if key not in layer:
            raise ValueError(f"not weights of resnet50: {name} has no {key}")
        if name == FIRST and layer[key].shape[3:] == expected["kernel"][3:]:  # for any number of bands: first_layer.py
            expected = {**expected, "kernel": (*FIRST_SIZE, layer[key].shape[2], expected["kernel"][3])}
        if tuple(layer[key].shape) != expected[key]:
            shapes = f"{list(layer[key].shape)}, expected {list(expected[key])}"
            raise ValueError(f"not weights of resnet50: {key} of {name} is {shapes}")


def _is_head(layer: Layer) -> bool:
    return set(layer) <= {"kernel", "bias"} and "kernel" in layer and layer["kernel"].shape[:-1] == (FEATURES,)


@functools.cache
def _shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every weight of the backbone, in Keras' order of dimensions."""
    with torch.device("meta"):
        state = LandCoverResNet("resnet50", 1, "all", Details()).state_dict()
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in weight_layers()[:-1]:
        shape = tuple(state[f"{module_name(name)}.weight"].shape)
        bias = {"kernel": (*shape[2:], *shape[1::-1]), "bias": shape[:1]}
        shapes[name] = dict.fromkeys(TORCH, shape) if name.endswith("_bn") else bias
    return shapes


def _to_torch(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        module = module_name(name)
        if name.endswith("_bn"):
            state |= {f"{module}.{TORCH[key]}": tensor for key, tensor in layer.items()}
            continue
        kernel = layer["kernel"]
        state[f"{module}.weight"] = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        if name == HEAD and "bias" in layer:
            state["fc.bias"] = layer["bias"]
    for name, layer in layers.items():
        if name != HEAD and "bias" in layer:
            mean = f"{module_name(name.replace('_conv', '_bn'))}.running_mean"
            state[mean] = state[mean] - layer["bias"]
    return state
