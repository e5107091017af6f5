"""The modified ResNet: ResNet-18 and -50 with a log-softmax head of one unit per class.

Layers, their names, and how random weights are drawn are torchvision's (ResNet v1.5), so that state dicts fit both
ways. The layers are written out here, for importing torchvision's would cost every rank two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hvd_eurosat.config.schema import Model
from hvd_eurosat.model.convolution import use_matrix_products
from hvd_eurosat.model.norm_relu import count, norm_relu


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """What both kinds of residual block share: a shortcut, with a convolution and a BatchNorm where shapes change."""

    expansion: int
    downsample: nn.Sequential | None

    def shortcut(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W], in the shape of the block's output."""
        if self.downsample is None:
            return x
        convolution, norm = self.downsample
        return norm_relu(cast(nn.BatchNorm2d, norm), convolution(x), relu=False)


class BasicBlock(Block):
    """Two 3x3 convolutions (He et al. 2015).

    The shortcut comes last: backward begins with it, in the order in which gradients fill their buckets.
    """

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _convolution(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]; returns [B, planes, H / stride, W / stride]."""
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), self.shortcut(x))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Of the residual branch."""
        return self.bn2


class Bottleneck(Block):
    """A 1x1, a 3x3 and a 1x1 convolution; the stride is in the 3x3 (v1.5). The shortcut comes last, too."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _convolution(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _convolution(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]; returns [B, 4 * planes, H / stride, W / stride]."""
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(self.bn3, self.conv3(out), self.shortcut(x))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """Of the residual branch."""
        return self.bn3


BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int], int]] = {  # kind, depths, channels of the stem
    "resnet18": (BasicBlock, [2, 2, 2, 2], 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 64),
}


@dataclass(frozen=True)
class Details:
    """In what ResNet-50s differ. variant: v1 strides in the first 1x1 convolution of a stage, v1.5 in its 3x3.

    epsilon and momentum (the share of the new batch) are BatchNorm's; without affine it has no weights and biases.
    head_bias: whether the head has biases.
    """

    variant: str = "v1.5"
    epsilon: float = 1e-5
    momentum: float = 0.1
    affine: bool = True
    head_bias: bool = False

    @staticmethod
    def of(model: Model) -> Details:
        """Those of a configuration; auto is v1.5."""
        variant = "v1" if model.variant == "v1" else "v1.5"
        return Details(variant, model.bn_epsilon, model.bn_momentum, model.bn_affine, model.head_bias)


DEFAULT = Details()
RGB = ("red", "green", "blue")


class LandCoverResNet(nn.Module):
    """ResNet (He et al. 2015) whose head is a dense layer, without bias unless details say so, and a log-softmax.

    `trainable` is "all", "head", "bn+head": all BatchNorm layers and the head train and no convolution does (Frankle et
    al. 2021, "Training BatchNorm and only BatchNorm"), "bn+head,conv1": and the first convolution, or names of modules
    between commas, which train with all that is in them. A BatchNorm layer that does not train stays in evaluation
    mode. `bands` are the names of its input's channels. Its state dict has torchvision's keys.
    """

    def __init__(
        self, arch: str, classes: int, trainable: str, details: Details = DEFAULT, bands: Sequence[str] = RGB
    ) -> None:
        super().__init__()
        block, depths, width = BLOCKS[arch]
        self.conv1 = _convolution(len(bands), width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        wider = block.expansion
        self.layer1 = _stage(block, width, width, depths[0], stride=1)
        self.layer2 = _stage(block, width * wider, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(block, 2 * width * wider, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(block, 4 * width * wider, 8 * width, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        nn.Linear(8 * width * wider, classes)  # torchvision draws a head first: a seed gives the same convolutions
        # Blocks that begin as the identity suit training from scratch (Goyal et al. 2017); weights override it.
        self._draw_weights(identity_blocks=trainable == "all")
        use_matrix_products(self)
        self.fc = nn.Linear(8 * width * wider, classes, bias=details.head_bias)
        self.trainable = trainable
        self.details = details
        self.bands = tuple(bands)
        self._frozen_norms: list[nn.BatchNorm2d] = []
        self._norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for name, module in self.named_modules():
            trains = is_trainable(name, module, trainable)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(trains)
            if isinstance(module, nn.BatchNorm2d):
                self._set_up(module, trains)
        if details.variant == "v1":
            self._stride_first()
        self.train()

    def _draw_weights(self, identity_blocks: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # there torch imports its compiler first
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules() if identity_blocks else ():
            if isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.last_norm.weight)

    def _set_up(self, norm: nn.BatchNorm2d, trains: bool) -> None:
        norm.eps, norm.momentum, norm.affine = self.details.epsilon, self.details.momentum, self.details.affine
        if not norm.affine:
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
        if not trains:
            self._frozen_norms.append(norm)

    def _stride_first(self) -> None:
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride

    def train(self, mode: bool = True) -> LandCoverResNet:
        """Training mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, bands, S, S], normalised. Returns log-probabilities, float32 [B, classes]."""
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """images: float [B, bands, S, S], normalised. Returns what the head sees, [B, fc.in_features]."""
        if not images.is_cpu and self.training:
            count(self._norms)
        x = self.maxpool(norm_relu(self.bn1, self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.avgpool(x).flatten(1))

    def classify(self, features: Tensor) -> Tensor:
        """features: as `features` gives them. Returns log-probabilities, float32 [B, classes]."""
        return torch.log_softmax(self.fc(features).float(), dim=1)


def _stage(block: type[BasicBlock | Bottleneck], inputs: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, planes, stride, downsample)
    return nn.Sequential(first, *(block(outputs, planes, 1, None) for _ in range(1, depth)))


def is_trainable(name: str, module: nn.Module, trainable: str) -> bool:
    """Whether the module of this name learns under model.trainable."""
    if trainable in ("bn+head", "bn+head,conv1"):
        return isinstance(module, nn.BatchNorm2d) or name in ("fc", *trainable.split(","))
    if trainable == "head":
        return name == "fc"
    return trainable == "all" or any(f"{name}.".startswith(f"{chosen}.") for chosen in trainable.split(","))


def depth(name: str) -> int:
    """How many stages a parameter of this name lies before the head: 0 for fc, 1 for layer4 ..., 5 for the stem."""
    stages = ("fc", "layer4", "layer3", "layer2", "layer1")
    stage = name.split(".")[0]
    return stages.index(stage) if stage in stages else len(stages)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that train."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def batch_norm_buffers(model: nn.Module) -> list[Tensor]:
    """The running means and variances, each float32 [channels]."""
    return [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def build(
    arch: str, classes: int, trainable: str, seed: int, details: Details = DEFAULT, bands: Sequence[str] = RGB
) -> LandCoverResNet:
    """A network with random weights from `seed`, on the CPU, channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LandCoverResNet(arch, classes, trainable, details, bands)
    model.to(memory_format=torch.channels_last)
    return model
