"""Weights from elsewhere: torchvision's ImageNet weights, state dicts, safetensors, this project's checkpoints."""

from __future__ import annotations

import socket
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import LandCoverResNet
from hvd_eurosat.model.stored import read_content

DOWNLOAD_SECONDS = 20.0  # without an answer; a compute node's network may drop every packet
IMAGENET = {"resnet50": ResNet50_Weights.IMAGENET1K_V2, "resnet18": ResNet18_Weights.IMAGENET1K_V1}


def load_weights(model: LandCoverResNet, source: str, arch: str) -> None:
    """Put the weights of `source` (imagenet, none, or a file) into the model, all but a head of another width.

    Raises UserError where the file is missing, unreadable or of another network.
    """
    if source == "none":
        return
    state = _imagenet(arch) if source == "imagenet" else read_state(Path(source).expanduser())
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if "fc.weight" in state and state["fc.weight"].shape != model.fc.weight.shape:
        del state["fc.weight"]
    state.pop("fc.bias", None)
    own = model.state_dict()
    optional = {"fc.weight"} | {name for name in own if name.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in own.keys() - state.keys() - optional]
    problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        raise UserError(f"model.weights {source}: not weights of {arch}: {min(problems)} ({len(problems)} differences)")
    model.load_state_dict(state, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, torchvision's keys; nothing in the file is executed."""
    if path.suffix == ".json" or (path.suffix == ".pt" and path.with_suffix(".json").exists()):
        return dict(read_content(path)["model"])
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"model.weights {path}: {error.strerror or error}") from None
    except Exception as error:  # the readers let through whatever damaged bytes lead them to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.weights {path}: not a file of weights: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"model.weights {path}: not a state dict")
    return content


def _imagenet(arch: str) -> dict[str, Tensor]:
    weights = IMAGENET[arch]
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # of the network, the file system, or a damaged file
        raise UserError(
            f"the ImageNet weights cannot be had ({str(error).splitlines()[0]}): put {weights.url} at {place}, "
            f"or give --model.weights FILE (or none)"
        ) from None
    finally:
        socket.setdefaulttimeout(None)
