"""The network in other tools' formats. It takes normalised images; `facts` say how, and what the classes are."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.convolution import Convolution
from hvd_eurosat.model.resnet import LandCoverResNet, is_trainable
from hvd_eurosat.weights.keras_graph import module_name, weight_layers
from hvd_eurosat.weights.keras_json import write_layers
from hvd_eurosat.weights.keras_weights import write_weights

Facts = Mapping[str, Any]


def keras_layers(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """layers.json: the functional model for keras.models.model_from_json, `trainable` as here."""
    trains = {
        name
        for name in weight_layers()
        if is_trainable(module_name(name), model.get_submodule(module_name(name)), model.trainable)
    }
    content = write_layers(model.details, model.fc.out_features, facts["image_size"], trains)
    file.write((json.dumps(content, indent=1) + "\n").encode())


def keras_weights(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """model.h5: the weights for load_weights, facts as attributes."""
    write_weights(file, model.state_dict(), facts)


def safetensors_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """torchvision's keys; facts as metadata, which holds text: JSON where they are none."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    file.write(safetensors.torch.save(state, {key: _text(value) for key, value in facts.items()}))


def torch_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """A state dict with torchvision's keys. What torch calls its metadata says the variant and epsilon too."""
    state = model.state_dict()
    state["fc.weight"] = state["fc.weight"].contiguous()
    state._metadata[""] |= {  # type: ignore[attr-defined]
        key: facts[key] for key in ("variant", "bn_epsilon")
    }
    torch.save(state, file)


def onnx_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """images [batch, 3, size, size] to log_probabilities [batch, classes]; facts as metadata.

    Raises UserError where the packages for it are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch needs it)
    except ImportError:
        raise UserError(
            f"--format onnx needs more packages: {sys.executable} -m pip install 'hvd-eurosat[onnx]'"
        ) from None
    plain = copy.deepcopy(model).eval()
    for module in list(plain.modules()):  # the tricks of Convolution are for torch
        if type(module) is Convolution:
            setattr(module, "__class__", nn.Conv2d)  # noqa: B010
    size = facts["image_size"]
    program = torch.onnx.export(
        plain,
        (torch.zeros(2, 3, size, size),),
        input_names=["images"],
        output_names=["log_probabilities"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program  # it is None only where a file's name was given
    content = program.model_proto
    onnx.helper.set_model_props(content, {key: _text(value) for key, value in facts.items()})
    onnx.checker.check_model(content)
    file.write(content.SerializeToString())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
