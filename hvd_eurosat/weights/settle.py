"""What a configuration leaves to files: which ResNet-50 it is and what of it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import RGB, LandCoverResNet
from hvd_eurosat.weights.first_layer import bands_of, lacking_bands
from hvd_eurosat.weights.keras_json import read_layers
from hvd_eurosat.weights.known import NAMES, bands_by_name, check_name
from hvd_eurosat.weights.loading import KERAS_SUFFIXES, read_weights
from hvd_eurosat.weights.weight_file import Weights

DEFAULTS = Model()


def settle(model: Model, classes: int, image_size: int, bands: Sequence[str] = RGB) -> Model:
    """The section with model.layers and `auto` turned into values. Raises UserError where it contradicts its files."""
    check_name(model.weights, model.arch)
    found = _from_layers(model.layers, classes, image_size, len(bands)) if model.layers else {}
    if found and model.arch != "resnet50":
        raise UserError(f"model.layers {model.layers} is a resnet50, and model.arch is {model.arch}")
    for key, value in found.items():
        if getattr(model, key) not in (value, getattr(DEFAULTS, key)):
            raise UserError(f"model.{key} is {getattr(model, key)}, but model.layers {model.layers} says {value}")
    settled = model.model_copy(update=found)
    stated = _stated(settled)
    trainable = _trainable(settled, stated, bands)
    settled = settled.model_copy(update={"variant": _variant(settled, stated), "trainable": trainable})
    if settled.arch != "resnet50" and settled.variant != "v1.5":
        raise UserError(f"model.variant {settled.variant} is for resnet50, and model.arch is {settled.arch}")
    _check_names(settled, classes)
    return settled


def _from_layers(path: Path, classes: int, image_size: int, bands: int) -> dict[str, Any]:
    architecture = read_layers(path)
    if architecture.classes != classes:
        raise UserError(
            f"model.layers {path} has a head of {architecture.classes} units; the data has {classes} classes: "
            f"python -m hvd_eurosat.export --format keras --classes {classes} writes one"
        )
    if architecture.bands != bands:
        raise UserError(f"model.layers {path} takes images of {architecture.bands} bands; the data has {bands}")
    if architecture.image_size not in (None, image_size):
        side = architecture.image_size
        taken = f"model.layers {path} takes images of {side}x{side} pixels"
        raise UserError(f"{taken}; data.input_size, or else image_size, is {image_size}: give {side}")
    details = architecture.details
    values = {"variant": details.variant, "bn_epsilon": details.epsilon, "bn_momentum": details.momentum}
    values |= {"bn_affine": details.affine, "head_bias": details.head_bias}
    return {**values, "trainable": architecture.trainable}


def _stated(model: Model) -> Weights | None:
    """What the file of weights says of itself; None where there is none."""
    if model.weights in NAMES:
        return None if model.weights == "none" else Weights({}, bands=bands_by_name(model.weights))
    path = Path(model.weights).expanduser()
    return read_weights(path) if path.exists() else None


def _trainable(model: Model, weights: Weights | None, bands: Sequence[str]) -> str:
    """With the first convolution, where the weights lack some of the bands and it would stay as it begins."""
    if weights is None or model.trainable != "bn+head":
        return model.trainable
    lacking = lacking_bands(bands_of(weights, bands, model.weights), bands)
    return "bn+head,conv1" if lacking else model.trainable


def _variant(model: Model, weights: Weights | None) -> str:
    """The variant, which must be the one that the file of weights states."""
    path = Path(model.weights).expanduser()
    stated = weights.variant if weights else None
    if model.variant == "auto" and not stated and path.suffix in KERAS_SUFFIXES and path.exists():
        raise UserError(
            f"model.weights {path} does not say where its network strides: give --model.variant v1 "
            f"(keras.applications.ResNet50) or v1.5, or --model.layers FILE"
        )
    variant = model.variant if model.variant != "auto" else stated or "v1.5"
    if stated and variant != stated:
        raise UserError(f"model.weights {path} is of a ResNet-50 {stated}, and model.variant is {variant}")
    return variant


def _check_names(model: Model, classes: int) -> None:
    if model.trainable in ("bn+head", "bn+head,conv1", "head", "all"):
        return
    with torch.device("meta"):
        known = dict(LandCoverResNet(model.arch, classes, "all").named_modules())
    for name in model.trainable.split(","):
        if name not in known:
            raise UserError(f"model.trainable: {model.arch} has no module {name}")
        if not list(known[name].parameters()):
            raise UserError(f"model.trainable: {name} of {model.arch} has no parameters")
