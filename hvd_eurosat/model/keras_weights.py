"""model.h5: the weights of a ResNet-50 in Keras' layouts.

Written, and read: one group per layer, its weights named by the attribute weight_names (Keras 1 and 2, and all that any
version saves as a whole model). Read too: Keras 3's .weights.h5, where layers/<class>_<n>/vars holds them by number.
Only names that are asked for are followed, and only to what lies in the file itself: no link leads out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.keras_graph import HEAD, module_name, resnet50, weight_layers
from hvd_eurosat.model.keras_json import parse_backbone
from hvd_eurosat.model.resnet import Details, LandCoverResNet
from hvd_eurosat.model.weight_file import Weights

Datasets = dict[str, dict[str, h5py.Dataset]]
Arrays = dict[str, NDArray[np.float32]]
KERAS_EPSILON = 1.001e-5  # of keras.applications, which writes no epsilon beside its weights
FEATURES = 2048
MAX_NAMES = 1000
OPTIONAL = {"bias", "gamma", "beta"}
NAMES = {
    "conv": ("kernel", "bias"),
    "bn": ("gamma", "beta", "moving_mean", "moving_variance"),
    HEAD: ("kernel", "bias"),
}
TORCH = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def write_weights(file: BinaryIO, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """A state dict (torchvision's keys) in Keras' layout; facts become attributes of the file, JSON where not text."""
    with h5py.File(file, "w") as archive:
        archive.attrs["layer_names"] = [layer.name.encode() for layer in resnet50(Details(str(facts["variant"])), 1)]
        archive.attrs["backend"] = "tensorflow"
        archive.attrs["keras_version"] = "2.15.0"
        for key, value in facts.items():
            archive.attrs[key] = value if isinstance(value, str) else json.dumps(value)
        weighted = weight_layers()
        for layer in archive.attrs["layer_names"]:
            name = layer.decode() if isinstance(layer, bytes) else str(layer)
            arrays = _to_keras(name, state) if name in weighted else {}
            group = archive.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in arrays]
            for key, array in arrays.items():
                group.create_dataset(f"{name}/{key}:0", data=array)


def _to_keras(name: str, state: Mapping[str, Tensor]) -> Arrays:
    module = module_name(name)
    if not name.endswith("_bn"):
        return {"kernel": _kernel(state[f"{module}.weight"])}
    keys = {key: f"{module}.{TORCH[key]}" for key in NAMES["bn"]}
    return {key: state[own].numpy(force=True) for key, own in keys.items() if own in state}


def _kernel(weight: Tensor) -> NDArray[np.float32]:
    """[out, in, H, W] as Keras' [H, W, in, out]; [out, in] as [in, out]."""
    order = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
    return np.ascontiguousarray(weight.numpy(force=True).transpose(order))


def read_weights(path: Path) -> Weights:
    """The weights in a Keras file, as torchvision's; convolutions' biases go into the means of BatchNorm.

    Raises UserError, which names the layer, where weights are missing, unknown or of another shape.
    """
    try:
        with path.open("rb") as file, h5py.File(file, "r") as archive:
            variant, epsilon = _facts(archive)
            return Weights(_to_torch(_read(_find(archive))), variant, epsilon)
    except ValueError as error:
        raise UserError(f"model.weights {path}: {error}") from None
    except OSError as error:
        reason = error.strerror or "not a whole HDF5 file"
        raise UserError(f"model.weights {path}: {reason}") from None
    except Exception as error:  # the library lets through whatever damaged bytes lead it to
        raise UserError(f"model.weights {path}: damaged, or not Keras' weights ({type(error).__name__})") from None


def _facts(archive: h5py.File) -> tuple[str | None, float]:
    """The variant and epsilon, from our own attributes or a whole model's configuration."""
    if "variant" in archive.attrs:
        variant, epsilon = str(archive.attrs["variant"]), float(archive.attrs["bn_epsilon"])
        if variant not in ("v1", "v1.5") or not 0 < epsilon < 1:
            raise ValueError(f"its variant is {variant[:20]!r} and its bn_epsilon {epsilon:g}")
        return variant, epsilon
    if "model_config" in archive.attrs:
        details = parse_backbone(json.loads(archive.attrs["model_config"]))
        return details.variant, details.epsilon
    return None, KERAS_EPSILON


def _find(archive: h5py.File) -> Datasets:
    """The weights of each layer that has any, by Keras' names, not yet read."""
    root = _child(archive, "model_weights") if "model_weights" in archive else archive
    if "layer_names" in root.attrs:
        names = _texts(root.attrs["layer_names"])
        found = {name: _named(_child(root, name)) for name in names}
    elif "layers" in root:
        found = dict(map(_numbered, _children(_child(root, "layers"))))
    else:
        raise ValueError("neither the attribute layer_names nor a group layers: not Keras' weights")
    return {name: datasets for name, datasets in found.items() if datasets}


def _named(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Those that the attribute weight_names lists, conv1_conv/kernel:0 as kernel."""
    names = _texts(group.attrs.get("weight_names", ()))
    return {name.split("/")[-1].split(":")[0]: _dataset(group, name) for name in names}


def _numbered(group: h5py.Group) -> tuple[str, dict[str, h5py.Dataset]]:
    """Keras 3's: a group vars with 0, 1, ... in the order of creation, and the layer's name as an attribute."""
    values = _child(group, "vars")
    name = str(values.attrs.get("name", "")) or str(group.name)
    kind = name.rsplit("_", 1)[-1]
    keys = NAMES.get(kind, NAMES[HEAD])
    if kind == "bn" and len(values) == 2:
        keys = keys[2:]
    if len(values) > len(keys):
        raise ValueError(f"layer {name[:40]} has {len(values)} weights")
    return name, {key: _dataset(values, str(number)) for number, key in enumerate(keys[: len(values)])}


def _texts(attribute: Any) -> list[str]:
    names = [value.decode() if isinstance(value, bytes) else str(value) for value in np.ravel(attribute)[:MAX_NAMES]]
    return [name for name in names if name]


def _children(group: h5py.Group) -> Iterator[h5py.Group]:
    if len(group) > MAX_NAMES:
        raise ValueError(f"{group.name} has {len(group):,} members")
    return (_child(group, name) for name in group)


def _child(group: h5py.Group, name: str) -> h5py.Group:
    found = _member(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{name[:60]} is no group")
    return found


def _dataset(group: h5py.Group, path: str) -> h5py.Dataset:
    *folders, name = path.split("/")
    for folder in folders:
        group = _child(group, folder)
    found = _member(group, name)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind != "f":
        raise ValueError(f"{path[:60]} is no array of numbers")
    if found.is_virtual or found.external:
        raise ValueError(f"{path[:60]} lies in another file")
    if found.chunks and any(chunk > side for chunk, side in zip(found.chunks, found.shape, strict=True)):
        raise ValueError(f"{path[:60]} is stored in pieces larger than itself")
    return found


def _member(group: h5py.Group, name: str) -> Any:
    link = group.get(name, getlink=True) if name in group else None
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name[:60]} is missing" if link is None else f"{name[:60]} is a link")
    return group[name]


def _read(found: Datasets) -> dict[str, Arrays]:
    """The arrays of each layer, read after names and shapes turned out to be right; a head may be missing."""
    expected = _shapes()
    heads = [name for name, datasets in found.items() if name not in expected and _is_head(datasets)]
    if len(heads) == 1:
        found[HEAD] = found.pop(heads[0])
        expected[HEAD] = {key: dataset.shape for key, dataset in found[HEAD].items()}
    for name in [*found, *expected]:
        if name not in expected:
            raise ValueError(f"not weights of resnet50: layer {name[:60]!r} is unknown")
        if name not in found:
            raise ValueError(f"not weights of resnet50: layer {name} is missing")
        _check(name, found[name], expected[name])
    return {name: {key: _array(values) for key, values in layer.items()} for name, layer in found.items()}


def _check(name: str, found: dict[str, h5py.Dataset], expected: dict[str, tuple[int, ...]]) -> None:
    for key in [*found, *(key for key in expected if key not in OPTIONAL)]:
        if key not in expected:
            raise ValueError(f"not weights of resnet50: {name} has an unknown {key[:60]!r}")
        if key not in found:
            raise ValueError(f"not weights of resnet50: {name} has no {key}")
        if found[key].shape != expected[key]:
            shapes = f"{list(found[key].shape or ())}, expected {list(expected[key])}"
            raise ValueError(f"not weights of resnet50: {key} of {name} is {shapes}")


def _is_head(datasets: dict[str, h5py.Dataset]) -> bool:
    kernel = datasets.get("kernel")
    return kernel is not None and len(kernel.shape or ()) == 2 and kernel.shape[0] == FEATURES


def _shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every weight of the backbone, in Keras' order of dimensions."""
    with torch.device("meta"):
        state = LandCoverResNet("resnet50", 1, "all", Details()).state_dict()
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in weight_layers():
        shape = tuple(state[f"{module_name(name)}.weight"].shape)
        if name.endswith("_bn"):
            shapes[name] = dict.fromkeys(NAMES["bn"], shape)
        elif name != HEAD:
            shapes[name] = {"kernel": (*shape[2:], shape[1], shape[0]), "bias": shape[:1]}
    return shapes


def _array(dataset: h5py.Dataset) -> NDArray[np.float32]:
    return np.asarray(dataset[()], dtype=np.float32)


def _to_torch(layers: dict[str, Arrays]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, arrays in layers.items():
        module = module_name(name)
        if name.endswith("_bn"):
            state |= {f"{module}.{TORCH[key]}": torch.from_numpy(array) for key, array in arrays.items()}
            continue
        kernel = arrays["kernel"]
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        state[f"{module}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(order)))
        if name == HEAD and "bias" in arrays:
            state["fc.bias"] = torch.from_numpy(arrays["bias"])
    for name, arrays in layers.items():
        if name != HEAD and "bias" in arrays:
            state[f"{module_name(name.replace('_conv', '_bn'))}.running_mean"] -= torch.from_numpy(arrays["bias"])
    return state
