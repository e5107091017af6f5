"""The network in other tools' formats. `facts` say how images become its input, and what the classes are.

It takes normalised images, or with the fact `normalises` pixels as they are.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.convolution import Convolution
from hvd_eurosat.model.resnet import LandCoverResNet, is_trainable
from hvd_eurosat.weights.keras_graph import module_name, weight_layers
from hvd_eurosat.weights.keras_json import write_layers
from hvd_eurosat.weights.keras_weights import write_weights

Facts = Mapping[str, Any]
TILES_OVERLAP = 50  # percent of a tile: the plug-in keeps the middle of each, so a class stands on its own surroundings


def keras_layers(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """layers.json: the functional model for keras.models.model_from_json, `trainable` as here.

    With `normalises` a Rescaling layer comes first, and makes of it a model for use, which is not read back here.
    """
    trains = {
        name
        for name in weight_layers()
        if is_trainable(module_name(name), model.get_submodule(module_name(name)), model.trainable)
    }
    scaling = (facts["mean"], facts["std"]) if facts["normalises"] else None
    size, bands = facts["input_size"], len(facts["bands"])
    content = write_layers(model.details, model.fc.out_features, size, trains, scaling, bands, facts["dtype"])
    file.write((json.dumps(content, indent=1) + "\n").encode())


def keras_weights(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """model.h5: the weights for load_weights, facts as attributes."""
    write_weights(file, model.state_dict(), facts)


def safetensors_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """torchvision's keys; facts as metadata, which holds text: JSON where they are none."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    file.write(safetensors.torch.save(state, {key: _text(value) for key, value in facts.items()}))


def torch_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """A state dict with torchvision's keys. What torch calls its metadata says the variant, epsilon and bands too."""
    state = model.state_dict()
    state["fc.weight"] = state["fc.weight"].contiguous()
    state._metadata[""] |= {  # type: ignore[attr-defined]
        key: facts[key] for key in ("variant", "bn_epsilon", "bands", "unit", "mean", "std")
    }
    torch.save(state, file)


def onnx_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """images [batch, bands, size, size] to log_probabilities [batch, classes]; facts as metadata.

    images: float32, normalised, or with `normalises` as in files. Raises UserError where the packages for it are not
    installed.
    """
    _write_onnx(_graph(model, facts), facts, "log_probabilities", _deepness(facts), file)


def deepness_file(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """For QGIS' plug-in Deepness, as a segmentation model: images [batch, 3, size, size] to probabilities

    [batch, classes, size, size], those of a tile on every pixel of it. The plug-in scales pixels to 0..1, and
    standardises them as the metadata say. Raises UserError as `onnx_file` does.
    """
    notes = _deepness(facts) | {"model_type": "Segmentor", "seg_thresh": 0.0, "seg_small_segment": 0}
    _write_onnx(_OnEveryPixel(_plain(model)), facts, "probabilities", notes, file)


def exported_program(model: LandCoverResNet, facts: Facts, file: BinaryIO) -> None:
    """For torch.export.load, without this package: images as of `onnx_file` to log-probabilities [batch, classes].

    Facts as JSON in its extra file facts.json.
    """
    program = torch.export.export(_graph(model, facts), (_sample(facts),), dynamic_shapes=_any_batch())
    content = io.BytesIO()  # torch closes what it writes to
    torch.export.save(program, content, extra_files={"facts.json": json.dumps(dict(facts))})
    file.write(content.getvalue())


class _Normalising(nn.Module):
    """The network for pixels as they are, uint8 or uint16 [B, bands, S, S]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], most: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", most * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", most * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network((images.float() - self.mean) / self.std))


class _OnEveryPixel(nn.Module):
    """The network's probabilities as a map of each image: [B, classes, S, S]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        probabilities = self.network(images).exp()[:, :, None, None]
        return cast(Tensor, probabilities.expand(-1, -1, *images.shape[2:]))


def _graph(model: LandCoverResNet, facts: Facts) -> nn.Module:
    plain = _plain(model)
    most = 255 if facts["dtype"] == "uint8" else 1
    return _Normalising(plain, facts["mean"], facts["std"], most).eval() if facts["normalises"] else plain


def _plain(model: LandCoverResNet) -> nn.Module:
    plain = copy.deepcopy(model).eval()
    for module in list(plain.modules()):  # the tricks of Convolution are for training
        if type(module) is Convolution:
            setattr(module, "__class__", nn.Conv2d)  # noqa: B010
    for parameter in plain.parameters():  # channels last, and the head's transpose, are as well
        parameter.data = parameter.data.contiguous()
    return plain


def _sample(facts: Facts) -> Tensor:
    size, dtype = facts["image_size"], getattr(torch, facts["dtype"]) if facts["normalises"] else torch.float32
    return torch.zeros(2, len(facts["bands"]), size, size, dtype=dtype)


def _any_batch() -> Any:
    return ({0: torch.export.Dim("batch")},)


def _deepness(facts: Facts) -> dict[str, Any]:
    """The metadata that Deepness reads. Its documentation names tiles_size, its code tile_size; centimetres a pixel."""
    notes: dict[str, Any] = {
        "class_names": dict(enumerate(facts.get("classes", ()))),
        "resolution": 100 * facts["resolution"],
        "tile_size": facts["image_size"],
        "tiles_size": facts["image_size"],
        "tiles_overlap": TILES_OVERLAP,
    }
    if not facts["normalises"]:
        notes |= {"standardization_mean": facts["mean"], "standardization_std": facts["std"]}
    return notes


def _write_onnx(graph: nn.Module, facts: Facts, output: str, notes: Facts, file: BinaryIO) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch needs it)
    except ImportError:
        more = f"{sys.executable} -m pip install onnx onnxscript"
        raise UserError(f"--format onnx and deepness need more packages: {more}") from None
    program = torch.onnx.export(
        graph.eval(),
        (_sample(facts),),
        input_names=["images"],
        output_names=[output],
        dynamic_shapes=_any_batch(),
        verbose=False,
    )
    assert program  # it is None only where a file's name was given
    content = program.model_proto
    written = {key: _text(value) for key, value in facts.items()} | {key: json.dumps(v) for key, v in notes.items()}
    onnx.helper.set_model_props(content, written)
    onnx.checker.check_model(content)
    file.write(content.SerializeToString())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
