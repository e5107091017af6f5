"""The modified ResNet-50 as Keras sees it: its layers, their names, settings and connections.

Names and order are those of keras.applications.ResNet50. Keras strides in the first 1x1 convolution of a stage (v1,
He et al. 2015), torchvision in the 3x3 (v1.5), whose padding takes a ZeroPadding2D: for even sizes, Keras' "same" would
pad a strided convolution at the bottom and right alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hvd_eurosat.model.resnet import Details

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # filters and blocks of conv2 to conv5
HEAD = "dense"
INPUT = "input_1"
WEIGHT_LAYER = re.compile(r"conv([2-5])_block([1-6])_([0-3])_(conv|bn)")


@dataclass(frozen=True)
class Layer:
    """kind: Keras' class. settings: those that make a difference to the function, lists as tuples."""

    name: str
    kind: str
    settings: dict[str, Any]
    inputs: tuple[str, ...]


def resnet50(details: Details, classes: int) -> list[Layer]:
    """The layers, each after its inputs: 177 of v1, 180 of v1.5, which has three paddings more."""
    layers = [Layer(INPUT, "InputLayer", {}, ())]

    def add(name: str, kind: str, *inputs: str, **settings: Any) -> str:
        layers.append(Layer(name, kind, settings, inputs or (layers[-1].name,)))
        return name

    def convolution(name: str, filters: int, side: int, stride: int, *inputs: str) -> str:
        if side > 1 and stride > 1:
            margin = (side // 2, side // 2)
            inputs = (add(name.replace("_conv", "_pad"), "ZeroPadding2D", *inputs, padding=(margin, margin)),)
        padding = "same" if side > 1 and stride == 1 else "valid"
        size, strides = (side, side), (stride, stride)
        return add(name, "Conv2D", *inputs, filters=filters, kernel_size=size, strides=strides, padding=padding)

    def norm(name: str, *inputs: str) -> str:
        settings = {"epsilon": details.epsilon, "center": details.affine, "scale": details.affine}
        return add(name, "BatchNormalization", *inputs, momentum=round(1 - details.momentum, 12), **settings)

    convolution("conv1_conv", 64, 7, 2)
    norm("conv1_bn")
    add("conv1_relu", "Activation", activation="relu")
    add("pool1_pad", "ZeroPadding2D", padding=((1, 1), (1, 1)))
    out = add("pool1_pool", "MaxPooling2D", pool_size=(3, 3), strides=(2, 2), padding="valid")
    for stage, (filters, blocks) in enumerate(STAGES, start=2):
        for block in range(1, blocks + 1):
            name, stride = f"conv{stage}_block{block}", 2 if block == 1 and stage > 2 else 1
            first, second = (stride, 1) if details.variant == "v1" else (1, stride)
            convolution(f"{name}_1_conv", filters, 1, first, out)
            norm(f"{name}_1_bn")
            add(f"{name}_1_relu", "Activation", activation="relu")
            convolution(f"{name}_2_conv", filters, 3, second)
            norm(f"{name}_2_bn")
            last = add(f"{name}_2_relu", "Activation", activation="relu")
            shortcut = [convolution(f"{name}_0_conv", 4 * filters, 1, stride, out)] if block == 1 else []
            last = convolution(f"{name}_3_conv", 4 * filters, 1, 1, last)
            out = norm(f"{name}_0_bn", *shortcut) if block == 1 else out
            last = norm(f"{name}_3_bn", last)
            add(f"{name}_add", "Add", out, last)
            out = add(f"{name}_out", "Activation", activation="relu")
    add("avg_pool", "GlobalAveragePooling2D", keepdims=False)
    add(HEAD, "Dense", units=classes, activation="log_softmax", use_bias=details.head_bias)
    return layers


def weight_layers() -> list[str]:
    """The names of the layers that have weights, in order; the head last."""
    return [layer.name for layer in resnet50(Details(), 1) if layer.kind in ("Conv2D", "BatchNormalization", "Dense")]


def module_name(name: str) -> str:
    """The module of torchvision's ResNet that is this layer of Keras', conv2_block1_0_bn: layer1.0.downsample.1."""
    if name == HEAD:
        return "fc"
    if name in ("conv1_conv", "conv1_bn"):
        return {"conv1_conv": "conv1", "conv1_bn": "bn1"}[name]
    found = WEIGHT_LAYER.fullmatch(name)
    if not found:
        raise KeyError(name)
    stage, block, number, kind = found.groups()
    place = f"layer{int(stage) - 1}.{int(block) - 1}"
    if number == "0":
        return f"{place}.downsample.{('conv', 'bn').index(kind)}"
    return f"{place}.{kind}{number}"
