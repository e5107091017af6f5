"""Weights from elsewhere: torchvision's ImageNet weights, state dicts, safetensors, Keras' HDF5, our checkpoints."""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.weights.first_layer import NAME, bands_of, channels_of, fit_bands, stated_bands
from hvd_eurosat.weights.stored import named, read_content
from hvd_eurosat.weights.weight_file import Weights

KERAS_SUFFIXES = (".h5", ".hdf5")
TORCH_EPSILON = 1e-5  # of torchvision, and of any state dict that states none
KERAS_EPSILON = 1.001e-5  # of keras.applications, which writes no epsilon beside its weights
DOWNLOAD_SECONDS = 20.0  # without an answer; a compute node's network may drop every packet


def load_weights(model: LandCoverResNet, settings: Model) -> str:
    """Put the weights of model.weights (imagenet, none, or a file) into the model, so that its features are the same.

    A head of another width or with a bias is left out; returns why, and for which bands there are no kernels, "" where
    nothing lacks. Raises UserError where the file is missing, unreadable or of another network.
    """
    source, arch = settings.weights, settings.arch
    if source == "none":
        return ""
    path = Path(source).expanduser()
    weights = Weights(_imagenet(arch)) if source == "imagenet" else read_weights(path)
    assumed = TORCH_EPSILON
    if path.suffix in KERAS_SUFFIXES:  # to which a layers.json belongs
        assumed = model.details.epsilon if settings.layers else KERAS_EPSILON
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.state.items()}
    own, strange = model.state_dict(), ""
    if channels_of(state):
        state[NAME], strange = fit_bands(state[NAME], bands_of(weights, model.bands, source), model, source)
    lacking = _unlike(state.get("fc.weight"), state.pop("fc.bias", torch.zeros(1)), model.fc.weight)
    if lacking:
        state.pop("fc.weight", None)
    if "bn1.weight" not in state and "bn1.bias" not in state:  # of a network whose BatchNorm has none
        state |= _plain_norms(own)
    for name in state.keys() & own.keys():
        if name.endswith("running_var"):
            state[name] = state[name] + ((weights.epsilon or assumed) - model.details.epsilon)
    optional = {"fc.weight"} | {name for name in own if name.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in own.keys() - state.keys() - optional]
    problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    problems += [f"{name} is not finite" for name, tensor in state.items() if not tensor.isfinite().all()]
    if problems:
        raise UserError(f"model.weights {source}: not weights of {arch}: {min(problems)} ({len(problems)} differences)")
    model.load_state_dict(state, strict=False)
    return "; ".join(filter(None, (strange, lacking)))


def digest_of(weights: str) -> str | None:
    """The sha256 of the file that model.weights names; None of imagenet, none, and what cannot be read."""
    if weights in ("imagenet", "none"):
        return None
    try:
        return hashlib.sha256(named(Path(weights).expanduser()).read_bytes()).hexdigest()
    except (OSError, UserError):
        return None


def _unlike(head: Tensor | None, bias: Tensor, own: Tensor) -> str:
    """Why a file's head [units, features] is not taken for our own; "" where it is."""
    if head is None:
        return "it has no head"
    if head.shape != own.shape:
        return f"its head of {len(head)} units is left out, for there are {len(own)} classes"
    return "its head is left out, for it has biases" if bias.any() else ""


def _plain_norms(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of 1 and biases of 0 for all of the network's BatchNorm layers."""
    norms = [name.removesuffix(".running_var") for name in own if name.endswith(".running_var")]
    ones = {f"{norm}.weight": torch.ones_like(own[f"{norm}.running_var"]) for norm in norms}
    zeros = {f"{norm}.bias": torch.zeros_like(own[f"{norm}.running_var"]) for norm in norms}
    return {name: tensor for name, tensor in (ones | zeros).items() if name in own}


def read_weights(path: Path) -> Weights:
    """What a file of weights holds, by its suffix; nothing in the file is executed. Raises UserError."""
    if path.suffix in KERAS_SUFFIXES:
        from hvd_eurosat.weights import keras_weights  # and h5py with it

        return keras_weights.read_weights(path)
    if path.suffix == ".json" or (path.suffix == ".pt" and path.with_suffix(".json").exists()):
        content = read_content(path)
        bands = {"bands": (content.get("inputs") or {}).get("bands")}
        return _stated(content["model"], content["config"]["model"] | bands)
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except OSError as error:
        raise UserError(f"model.weights {path}: {error.strerror or error}") from None
    except Exception as error:  # the readers let through whatever damaged bytes lead them to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.weights {path}: not a file of weights: {reason}") from None


def _safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        return _stated(state, file.metadata() or {})


def _torch(path: Path) -> Weights:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # torch's words advise to execute what is in the file
        raise ValueError("it is damaged, or holds more than tensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a state dict")
    return _stated(state, getattr(state, "_metadata", {}).get("", {}))


def _stated(state: dict[str, Tensor], facts: Mapping[str, Any]) -> Weights:
    """With the variant, epsilon and bands that our checkpoints and exports state and others do not."""
    variant, epsilon = facts.get("variant"), facts.get("bn_epsilon")
    bands = stated_bands(facts.get("bands"))
    variant, epsilon = None if variant is None else str(variant), None if epsilon is None else float(epsilon)
    return Weights(state, variant, epsilon, bands=bands)


def _imagenet(arch: str) -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights, ResNet50_Weights

    weights = {"resnet50": ResNet50_Weights.IMAGENET1K_V2, "resnet18": ResNet18_Weights.IMAGENET1K_V1}[arch]
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # of the network, the file system, or a damaged file
        raise UserError(
            f"cannot fetch the ImageNet weights ({str(error).splitlines()[0]}): put {weights.url} at {place}, "
            f"or give --model.weights FILE (or none)"
        ) from None
    finally:
        socket.setdefaulttimeout(None)
