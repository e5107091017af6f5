"""What a step asks of a GPU, what the GPU can do, and what a profile says of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hvd_eurosat.config.schema import Config
from hvd_eurosat.model.resnet import Details, LandCoverResNet

SIDE, COPIED = 8192, 2**30  # of the product, and bytes of the copy, by which a GPU's rates are measured
REPEATS = 5
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Work:
    """Of one step: operations on numbers, and bytes that its operations would read and write if no cache kept any."""

    flops: float
    bytes: float


class Traffic(TorchDispatchMode):
    """Counts the bytes of what operations take and give; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor))
        return found


def work(config: Config, trainable: str, classes: int, size: int) -> Work:
    """Forward and backward of so many images in bf16, kernel by kernel, by tensors that hold nothing."""
    with torch.device("meta"):
        model = LandCoverResNet(config.model.arch, classes, trainable, Details.of(config.model)).to(torch.bfloat16)
        side = config.data.input_side
        images = torch.zeros(size, len(model.bands), side, side, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as products, Traffic() as traffic:
            model(images.to(memory_format=torch.channels_last)).sum().backward()
    return Work(products.get_total_flops(), traffic.bytes)


def peaks(device: torch.device) -> dict[str, float]:
    """Of a GPU, measured: operations a second in a large bf16 product, bytes a second in a large copy."""
    matrix = torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device=device)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * SIDE**3 / _seconds(lambda: matrix @ matrix, device),
        "bytes": 2 * COPIED / _seconds(lambda: target.copy_(source), device),
    }


def _seconds(task: Callable[[], object], device: torch.device) -> float:
    """The least of some."""
    found = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        task()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)


@dataclass(frozen=True)
class Event:
    """Of a profile: a call of the host, or what the device did; begin and end in microseconds."""

    name: str
    on_device: bool
    begin: float
    end: float


def profiled(task: Callable[[], object]) -> list[Event]:
    """What host and GPU do in a task, once it is done."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        task()
        torch.cuda.synchronize()
    return list(_events(found.events() or ()))


def _events(found: Iterable[Any]) -> Iterator[Event]:
    for event in found:
        if not getattr(event, "is_user_annotation", False):
            on_device, span = "CUDA" in str(event.device_type), event.time_range
            yield Event(event.name, on_device, span.start, span.end)


def launches(events: Iterable[Event]) -> int:
    """How often the host started something on the device."""
    return sum(not event.on_device and event.name.startswith(LAUNCHES) for event in events)


def busy(events: Iterable[Event]) -> float | None:
    """The share of the time, from the first thing that the device did to the end of the last, in which it did any.

    None where the profile does not show the device, which some sites forbid.
    """
    spans = sorted((event.begin, event.end) for event in events if event.on_device)
    if not spans:
        return None
    total, until = 0.0, spans[0][0]
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / (until - spans[0][0])
