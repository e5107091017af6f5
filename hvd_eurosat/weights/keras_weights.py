"""model.h5: the weights of a ResNet-50 in Keras' layouts (see hdf5, which reads them)."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from hvd_eurosat.weights.fitting import nearest
from hvd_eurosat.weights.keras_graph import HEAD, module_name, resnet50, weight_layers
from hvd_eurosat.weights.keras_json import parse_backbone
from hvd_eurosat.weights.weight_file import Weights

Layer = dict[str, Tensor]
FEATURES = 2048
BODY = re.compile(r"conv\d|post_|stem|stage|block")  # which the name of no head begins with
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
        arrays = {"kernel": _kernel(state[f"{module}.weight"])}
        bias = state.get(f"{module}.bias")
        return arrays if bias is None else arrays | {"bias": bias.numpy(force=True)}
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
        left_out = _settle_head(layers)
        _check(layers, left_out)
        return Weights(_to_torch(layers), *_stated(facts), left_out=left_out, bands=stated_bands(facts.get("bands")))
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
    return layers, facts


def _settle_head(layers: dict[str, Layer]) -> tuple[str, ...]:
    """Give a head of one layer its name here; take any other out, and return the names of its layers."""
    others = [name for name in layers if name not in _shapes() and not BODY.match(name)]
    if len(others) == 1 and _is_head(layers[others[0]]):
        layers[HEAD] = layers.pop(others[0])
        return ()
    for name in others:
        del layers[name]
    return tuple(sorted(others))


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


def _check(layers: Mapping[str, Layer], left_out: Sequence[str]) -> None:
    """Raise ValueError unless names and shapes are the network's; the head may be missing.

    left_out: layers that may be why others are missing.
    """
    expected = _shapes()
    found = [text for name in layers if name != HEAD for text in _differences(name, layers[name], expected.get(name))]
    missing = [f"layer {name} is missing" for name in expected if name not in layers]
    unknown = [f"layer {name[:60]!r} is unknown" for name in left_out if name != HEAD] if missing else []
    if problems := [*found, *missing, *unknown]:
        raise ValueError(f"not weights of resnet50: {nearest(problems)}")


def _differences(name: str, layer: Layer, expected: Mapping[str, tuple[int, ...]] | None) -> Iterator[str]:
    if expected is None:
        yield f"layer {name[:60]!r} is unknown"
        return
    kernel = layer.get("kernel")
    if name == FIRST and kernel is not None and kernel.shape[3:] == expected["kernel"][3:]:  # any number of bands
        expected = {**expected, "kernel": (*FIRST_SIZE, kernel.shape[2], expected["kernel"][3])}
    yield from (f"{name} has an unknown {key[:60]!r}" for key in layer if key not in expected)
    yield from (f"{name} has no {key}" for key in expected if key not in layer and key not in OPTIONAL)
    for key in layer:
        if key in expected and tuple(layer[key].shape) != expected[key]:
            yield f"{key} of {name} is {list(layer[key].shape)}, expected {list(expected[key])}"


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
