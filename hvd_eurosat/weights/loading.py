"""Weights from elsewhere: torchvision's ImageNet weights, state dicts, safetensors, Keras' HDF5, our checkpoints."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.weights.first_layer import fit_first
from hvd_eurosat.weights.fitting import check_fit, plain_norms
from hvd_eurosat.weights.foreign import find_network
from hvd_eurosat.weights.known import DOWNLOAD_SECONDS, KNOWN, NAMES, cannot_fetch, fetched
from hvd_eurosat.weights.plain import read_plain
from hvd_eurosat.weights.stored import has_record, named, read_content, read_record
from hvd_eurosat.weights.weight_file import Weights

KERAS_SUFFIXES = (".h5", ".hdf5")
TORCH_EPSILON = 1e-5  # of torchvision, and of any state dict that states none
KERAS_EPSILON = 1.001e-5  # of keras.applications, which writes no epsilon beside its weights
OURS = {"rank_buffers", "digest", "config", "model"}  # keys of our checkpoints
SHOWN = 6  # of what is left out, by name


@dataclass(frozen=True)
class Taken:
    """What load_weights did. line: what was taken and left out, for people, "" of random weights.

    lacking: why the head is a new one, "" where it was taken.
    """

    line: str = ""
    lacking: str = ""


def load_weights(model: LandCoverResNet, settings: Model) -> Taken:
    """Put the weights of model.weights (a name, none, or a file) into the model, so that its features are the same.

    A head of another width, or with a bias that the model has not, is left out. Raises UserError where the file is
    missing, unreadable or of another network, RunError for a failed download.
    """
    source, arch = settings.weights, settings.arch
    if source == "none":
        return Taken()
    weights = _read(source, arch)
    own = model.state_dict()
    state = dict(weights.state)
    strange = fit_first(state, weights, model, source)
    lacking = _settle_head(state, own)
    if "bn1.running_var" in state and not {"bn1.weight", "bn1.bias"} & state.keys():  # its BatchNorm has none
        state |= plain_norms(own)
    optional = {"fc.weight", "fc.bias"} | {name for name in own if name.endswith("num_batches_tracked")}
    check_fit(source, arch, state, own, optional)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] = state[name] + ((weights.epsilon or _assumed_epsilon(model, settings)) - model.details.epsilon)
    model.load_state_dict(state, strict=False)
    return Taken(_line(weights, len(state), strange, lacking), lacking)


def _read(source: str, arch: str) -> Weights:
    if source == "imagenet":
        return Weights(_imagenet(arch))
    if source in KNOWN:
        return replace(read_weights(fetched(source, arch)), bands=KNOWN[source].bands)
    return read_weights(Path(source).expanduser())


def _assumed_epsilon(model: LandCoverResNet, settings: Model) -> float:
    """Of BatchNorm, where the file states none."""
    if Path(settings.weights).suffix not in KERAS_SUFFIXES:
        return TORCH_EPSILON
    return model.details.epsilon if settings.layers else KERAS_EPSILON  # to which a layers.json belongs


def _settle_head(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Take out of the state what of its head the model cannot take; why its head is not taken, "" where it is."""
    weight, bias = state.get("fc.weight"), state.get("fc.bias")
    lacking = ""
    if weight is None:
        lacking = "it has no head"
    elif weight.shape != own["fc.weight"].shape:
        lacking = f"its head of {len(weight)} units is left out, for there are {len(own['fc.weight'])} classes"
    elif bias is not None and bias.any() and "fc.bias" not in own:
        lacking = "its head is left out, for it has biases (model.head_bias true keeps them)"
    if lacking:
        state.pop("fc.weight", None)
    if lacking or "fc.bias" not in own:
        state.pop("fc.bias", None)
    elif bias is None:
        state["fc.bias"] = torch.zeros_like(own["fc.bias"])
    return lacking


def _line(weights: Weights, count: int, *notes: str) -> str:
    """`318 tensors under module. of state_dict; it has no head; left out: optimizer, epoch`."""
    names = list(weights.left_out)
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    found = f" {weights.found}" if weights.found else ""
    left = [f"left out: {', '.join([*names[:SHOWN], *more])}"] if names else []
    return "; ".join([f"{count} tensors{found}", *filter(None, notes), *left])


def digest_of(weights: str) -> str | None:
    """The sha256 of the file that model.weights names; None of imagenet, none ..., and of what cannot be read."""
    if weights in NAMES:
        return None
    try:
        return hashlib.sha256(named(Path(weights).expanduser()).read_bytes()).hexdigest()
    except (OSError, UserError):
        return None


def read_weights(path: Path) -> Weights:
    """What a file of weights holds, by its suffix; nothing in the file is executed. Raises UserError."""
    if path.suffix in KERAS_SUFFIXES:
        from hvd_eurosat.weights import keras_weights  # and h5py with it

        return keras_weights.read_weights(path)
    try:
        if path.suffix == ".json" or (path.suffix == ".pt" and has_record(path)):
            content = read_content(path)
            bands = {"bands": (content.get("inputs") or {}).get("bands")}
            return find_network(content["model"], content["config"]["model"] | bands)
        return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"model.weights {path}: {error.strerror or error}") from None
    except Exception as error:  # the readers let through whatever damaged bytes lead them to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.weights {path}: not a file of weights: {reason}") from None


def _safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        return find_network(state, file.metadata() or {})


def _torch(path: Path) -> Weights:
    content = read_plain(path)
    if isinstance(content, dict) and content.keys() >= OURS:  # a checkpoint of ours whose .json is not whole
        read_record(path)
    return find_network(content)


def _imagenet(arch: str) -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights, ResNet50_Weights

    weights = {"resnet50": ResNet50_Weights.IMAGENET1K_V2, "resnet18": ResNet18_Weights.IMAGENET1K_V1}[arch]
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # of the network, the file system, or a damaged file
        raise RunError(cannot_fetch("the ImageNet weights", weights.url, place, error)) from None
    finally:
        socket.setdefaulttimeout(None)
