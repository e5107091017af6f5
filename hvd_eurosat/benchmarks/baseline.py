"""The baseline: what a user writes with Horovod's own PyTorch ImageNet example before him, at our size of image.

It follows examples/pytorch/pytorch_imagenet_resnet50.py of Horovod 0.28.1: ImageFolder, DataLoader (with four workers
beside a GPU, with none on CPUs), random resized crops and flips in PIL, float32 NCHW, SGD in a DistributedOptimizer
with its defaults, loss and accuracy averaged over the ranks after every batch, every rank its share of the validation.
Only the classes, the size of the images, the threads (those of the core share, not always four) and what is frozen are
ours. `--strong bf16` adds bf16 autocast and channels_last and nothing else, `--strong fp32` channels_last alone.

Being a user's script it knows nothing of this package, imports Horovod itself and has Horovod's defaults; it is run
in processes of its own. It writes, on each rank, the seconds of its steps to `--out`/<rank>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, models, transforms

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, WORKERS = 0.0125, 0.9, 5e-5, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Metric:
    """A mean over batches and ranks, which costs a collective at every batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sum, self.n = torch.tensor(0.0), 0

    def update(self, value: Tensor) -> None:
        """Collective."""
        self.sum += hvd.allreduce(value.detach().cpu(), name=self.name)
        self.n += 1

    @property
    def mean(self) -> float:
        """So far."""
        return float(self.sum) / self.n


class Baseline:
    """A model and its optimiser; called with a batch (float32 [B, 3, S, S], int64 [B]) it makes a step."""

    def __init__(self, options: argparse.Namespace, mode: str, classes: int, device: torch.device) -> None:
        self.device, self.bf16 = device, options.strong == "bf16"
        self.layout = torch.channels_last if options.strong else torch.contiguous_format
        self.model: nn.Module = getattr(models, options.arch)(num_classes=classes)
        self.model.to(device)
        if mode == "bn+head":
            for name, module in self.model.named_modules():
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad = name == "fc" or isinstance(module, nn.BatchNorm2d)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(trainable, LEARNING_RATE * hvd.size(), MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.optimiser = hvd.DistributedOptimizer(sgd, named_parameters=self.model.named_parameters())
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(self.optimiser, root_rank=0)
        if mode == "bn+head":  # Horovod takes contiguous tensors only: kernels that train stay as they are
            self.model.to(memory_format=self.layout)
        self.loss, self.accuracy = Metric(f"loss.{mode}"), Metric(f"accuracy.{mode}")

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.optimiser.zero_grad()
        self.forward(images, labels).backward()
        self.optimiser.step()
        _ = self.loss.mean, self.accuracy.mean  # shown in the example's progress bar

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss; it and the accuracy are averaged over the ranks. Collective."""
        images = images.to(self.device, memory_format=self.layout)
        labels = labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(images)
            loss = F.cross_entropy(output, labels)
        self.accuracy.update((output.argmax(1) == labels).float().mean())
        self.loss.update(loss)
        return loss

    @torch.no_grad()
    def validate(self, loader: DataLoader[Any]) -> float:
        """Seconds for this rank's share. Collective."""
        began = time.perf_counter()
        self.model.eval()
        for images, labels in loader:
            self.forward(images, labels)
        return time.perf_counter() - began


def load(
    options: argparse.Namespace, split: str, device: torch.device
) -> tuple[DataLoader[Any], DistributedSampler[Any]]:
    """This rank's share of a split's images."""
    crops: list[Any] = [transforms.RandomResizedCrop(options.image_size), transforms.RandomHorizontalFlip()]
    if split != "train":
        crops = [transforms.Resize(options.image_size * 8 // 7), transforms.CenterCrop(options.image_size)]
    steps = [*crops, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    folder = datasets.ImageFolder(str(options.data / split), transforms.Compose(steps))
    sampler: DistributedSampler[Any] = DistributedSampler(folder, hvd.size(), hvd.rank())
    on_gpu: dict[str, Any] = {"num_workers": WORKERS, "pin_memory": True, "multiprocessing_context": "forkserver"}
    beside = on_gpu if device.type == "cuda" else {}
    return DataLoader(folder, options.batch_size, sampler=sampler, **beside), sampler


def endless(loader: DataLoader[Any], sampler: DistributedSampler[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def measure(step: Baseline, batches: Iterator[tuple[Tensor, Tensor]], warm_up: int, steps: int) -> dict[str, Any]:
    """Steps after some that warm up: seconds of each in "data" and in "step", and its images on all ranks."""
    seconds: dict[str, Any] = {"data": [], "step": [], "images": []}
    for number in range(warm_up + steps):
        marks = [time.perf_counter()]
        images, labels = next(batches)
        marks.append(time.perf_counter())
        step(images, labels)  # the metrics wait for the device
        marks.append(time.perf_counter())
        if number >= warm_up:
            seconds["data"].append(marks[1] - marks[0])
            seconds["step"].append(marks[2] - marks[1])
            seconds["images"].append(len(labels) * hvd.size())
    return seconds


def main() -> None:
    """Measure both modes. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/ and valid/<class>/")
    parser.add_argument("--out", type=Path, required=True, help="folder for <rank>.json")
    parser.add_argument("--modes", nargs="+", default=["bn+head", "all"], help="what trains")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--strong", choices=("bf16", "fp32"), help="channels_last, and autocast to this format")
    options = parser.parse_args()
    hvd.init()
    torch.manual_seed(42)
    device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    loader, sampler = load(options, "train", device)
    valid, _ = load(options, "valid", device)
    classes = len(loader.dataset.classes)  # type: ignore[attr-defined]
    batches = endless(loader, sampler)
    found = {}
    for mode in options.modes:
        step = Baseline(options, mode, classes, device)
        found[mode] = measure(step, batches, options.warm_up, options.steps) | {"validation": step.validate(valid)}
    (options.out / f"{hvd.rank()}.json").write_text(json.dumps({"modes": found}))
    hvd.allreduce(torch.zeros(1), name="end")


if __name__ == "__main__":
    main()
