"""Reads Keras' HDF5 files in a process of its own: python -m hvd_eurosat.weights.hdf5 FILE

Damaged bytes can send the HDF5 library round in circles or crash it; here that costs a process with limits, not the
ranks. Standard output is the weights as safetensors, each named layer/weight, with `facts` as metadata; standard error
and status 2 say why there are none. Layouts: one group per layer, its weights named by the attribute weight_names
(Keras 1 and 2, and all that any version saves as a whole model); or Keras 3's .weights.h5, where
layers/<class>_<n>/vars holds them by number. No link is followed out of the file, and nothing in it is executed.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

SECONDS, BYTES = 20, 8 << 30  # of processor time and memory that the process may take
MAX_WEIGHTS = 1 << 30  # bytes of the weights together; a ResNet-50's are 94 MB
MAX_NAMES = 1000
NORM = ("gamma", "beta", "moving_mean", "moving_variance")
FACTS = ("variant", "bn_epsilon", "bands", "model_config")
Datasets = dict[str, h5py.Dataset]
Weight = tuple[str, str, h5py.Dataset]  # its layer, its name there


def main() -> None:
    """The process."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        weights, facts = read(sys.argv[1])
    except ValueError as error:
        sys.exit(_refusal(error))
    except OSError as error:
        sys.exit(_refusal(error.strerror or "not a whole HDF5 file"))
    except Exception as error:  # the library lets through whatever damaged bytes lead it to
        sys.exit(_refusal(f"damaged, or not Keras' weights ({type(error).__name__})"))
    sys.stdout.buffer.write(safetensors.numpy.save(weights, facts))


def _refusal(reason: object) -> int:
    sys.stderr.write(" ".join(str(reason).split()))
    return 2


def read(path: str) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """The weights, float32, by layer/weight (conv1_conv/kernel), and the file's facts. Raises ValueError and others."""
    with open(path, "rb") as file, h5py.File(file, "r") as archive:
        facts = {key: str(archive.attrs[key]) for key in FACTS if key in archive.attrs}
        found = _find(archive)
        size = sum(int(np.prod(dataset.shape, dtype=object)) * 4 for dataset in found.values())
        if size > MAX_WEIGHTS:
            raise ValueError(f"its weights would be {size:,} bytes")
        return {name: np.asarray(dataset[()], dtype=np.float32) for name, dataset in found.items()}, facts


def _find(archive: h5py.File) -> Datasets:
    root = _child(archive, "model_weights") if "model_weights" in archive else archive
    if "layer_names" in root.attrs:
        layers = [found for name in _texts(root.attrs["layer_names"]) for found in _named(name, _child(root, name))]
    elif "layers" in root:
        layers = list(_numbered(root))
    else:
        raise ValueError("neither the attribute layer_names nor a group layers: not Keras' weights")
    found: Datasets = {}
    for layer, key, dataset in layers:
        if f"{layer}/{key}" in found:
            raise ValueError(f"two layers are called {layer[:60]}")
        found[f"{layer}/{key}"] = dataset
    return found


def _named(layer: str, group: h5py.Group) -> Iterator[Weight]:
    """Those that the attribute weight_names lists, conv1_conv/kernel:0 as kernel of the layer.

    Where they are those of several layers, the group is a model in the model, and each is of the layer before it.
    """
    names = _texts(group.attrs.get("weight_names", ()))
    owners = {name: ([layer, *name.split("/")])[-2] for name in names}
    for name, owner in owners.items():
        key = name.split("/")[-1].split(":")[0]
        yield owner if len(set(owners.values())) > 1 else layer, key, _dataset(group, name)


def _numbered(group: h5py.Group) -> Iterator[Weight]:
    """Those of the layers in a group of Keras 3's, and of the layers of these, where they are models."""
    for child in _children(_child(group, "layers")):
        if "layers" in child:
            yield from _numbered(child)
        elif "vars" in child and len(_child(child, "vars")):
            layer, datasets = _variables(_child(child, "vars"))
            yield from ((layer, key, dataset) for key, dataset in datasets.items())


def _variables(values: h5py.Group) -> tuple[str, Datasets]:
    """0, 1, ... of a group vars, in the order of creation, and the layer's name, which is an attribute."""
    if "name" not in values.attrs:
        raise ValueError("it does not name its layers (an early Keras 3): save the whole model, model.save(FILE.h5)")
    name = str(values.attrs["name"])
    keys: tuple[str, ...] = ("kernel", "bias")
    if name.endswith("_bn"):
        keys = NORM[2:] if len(values) == 2 else NORM
    if len(values) > len(keys):  # no layer of ours, and who reads them will say so
        keys = tuple(map(str, range(len(values))))
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
        raise ValueError(f"{name[:60]!r} is no group")
    return found


def _dataset(group: h5py.Group, path: str) -> h5py.Dataset:
    *folders, name = path.split("/")
    for folder in folders:
        group = _child(group, folder)
    found = _member(group, name)
    if not isinstance(found, h5py.Dataset) or found.dtype.kind != "f" or found.shape is None:
        raise ValueError(f"{path[:60]!r} is no array of numbers")
    if found.is_virtual or found.external:
        raise ValueError(f"{path[:60]!r} lies in another file")
    if found.chunks and any(chunk > side for chunk, side in zip(found.chunks, found.shape, strict=True)):
        raise ValueError(f"{path[:60]!r} is stored in pieces larger than itself")
    return found


def _member(group: h5py.Group, name: str) -> Any:
    link = group.get(name, getlink=True) if name in group else None
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name[:60]!r} is {'missing' if link is None else 'a link'}")
    return group[name]


if __name__ == "__main__":
    main()
