"""The modified ResNet-50: torchvision's (v1.5), with a log-softmax head of one unit per class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hvd_eurosat.model.convolution import use_matrix_products

BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


class LandCoverResNet(ResNet):
    """ResNet (He et al. 2015) whose head is a dense layer without bias and a log-softmax.

    `trainable` is "all", "head" (the backbone stays in evaluation mode), or "bn+head": all BatchNorm layers and
    the head train and no convolution does (Frankle et al. 2021, "Training BatchNorm and only BatchNorm").
    Its state dict has torchvision's keys.
    """

    def __init__(self, arch: str, classes: int, trainable: str) -> None:
        block, layers = BLOCKS[arch]
        # Blocks that begin as the identity suit training from scratch (Goyal et al. 2017); weights override it.
        super().__init__(block, layers, num_classes=classes, zero_init_residual=trainable == "all")
        use_matrix_products(self)
        self.fc: nn.Linear = nn.Linear(512 * block.expansion, classes, bias=False)
        self.trainable = trainable
        batch_norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        if trainable != "all":
            self.requires_grad_(False)
            self.fc.requires_grad_(True)
        if trainable == "bn+head":
            for module in batch_norms:
                module.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> LandCoverResNet:
        """Training mode; with a frozen backbone, that one stays in evaluation mode."""
        super().train(mode and self.trainable != "head")
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, 3, S, S], normalised. Returns log-probabilities, float32 [B, classes]."""
        return torch.log_softmax(super().forward(images).float(), dim=1)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that train."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def batch_norm_buffers(model: nn.Module) -> list[Tensor]:
    """The running means and variances, each float32 [channels]."""
    return [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def build(arch: str, classes: int, trainable: str, seed: int) -> LandCoverResNet:
    """A network with random weights from `seed`, on the CPU, channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LandCoverResNet(arch, classes, trainable)
    model.to(memory_format=torch.channels_last)
    return model
