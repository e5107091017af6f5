"""The training step as CUDA graphs: what a GPU does in a step is recorded once, then repeated by one call.

Kernel by kernel a step of ResNet-50 is some 840 launches, which take the host 10 to 13 ms where the GPU needs 2 to 3.

A graph repeats the same kernels on the same memory, and Python does not run again. So a function that is captured
returns nothing, reads only tensors that stay where they are, and writes only to such. What the host decides is the
graph's key: each key has a graph of its own. What changes from step to step is an input, which is copied to where the
graph reads it. Weights that do not train must not be loaded anew between two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.cluster.explanations import say
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config

WARM_UP = 3  # steps before a capture, in which libraries set themselves up, cuDNN tries its algorithms, torch compiles
KEPT = 4  # graphs of a function: images grow from size to size, and none of these comes back


def obstacle(world: World, config: Config) -> str | None:
    """Why steps are not captured, "" where nobody would expect it; None if they are. The same on all ranks."""
    if world.device.type != "cuda":
        return ""
    if not config.train.graphs:
        return "train.graphs is false"
    if "capture_error_mode" not in inspect.signature(torch.cuda.graph).parameters:
        return f"torch {torch.__version__} is too old"
    return None


class Graphs:
    """The graphs of a rank: their stream, their memory, and whether capturing works."""

    def __init__(self, world: World) -> None:
        self._rank = f"rank {world.rank} of {world.size}"
        self._stream: Any = torch.cuda.Stream(world.device)
        self._pool = torch.cuda.graph_pool_handle()
        self.works = True

    def capture(self, work: Callable[[], None]) -> Any:
        """A CUDAGraph of what `work` does, which is not done yet; None where it cannot be had, which is said once."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Horovod's threads go on meanwhile, and may call what this one must not.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves it where a capture fails
            self.works = False
            reason = " ".join(str(error).split(". ")[0].split())
            say(f"warning: {self._rank} launches its steps kernel by kernel, which is slower: no CUDA graph: {reason}")
            return None
        return graph

    def aside(self, work: Callable[[], None]) -> None:
        """Do `work` on the stream of captures, between what this stream has to do before and after it."""
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            work()
        stream.wait_stream(self._stream)


class Captured:
    """A function (key, *inputs) that is captured once for each key, after WARM_UP calls that count like any other.

    inputs: tensors, or dataclasses that hold some, always of the same shapes. What else is in them must not matter.
    """

    def __init__(self, work: Callable[..., None], graphs: Graphs) -> None:
        self._work, self._graphs = work, graphs
        self._inputs: tuple[Any, ...] | None = None
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, *inputs: Any) -> None:
        if self._inputs is None:
            self._inputs = tuple(map(_placed, inputs))
        else:
            for place, value in zip(self._inputs, inputs, strict=True):
                _put(value, place)
        placed = self._inputs
        self._calls[key] += 1
        if key not in self._captured and self._calls[key] > WARM_UP and self._graphs.works:
            self._keep(key, self._graphs.capture(lambda: self._work(key, *placed)))
        if key in self._captured:
            self._captured[key].replay()
        else:
            self._graphs.aside(lambda: self._work(key, *placed))

    def _keep(self, key: Hashable, graph: Any) -> None:
        if graph is None:
            return
        if len(self._captured) == KEPT:
            torch.cuda.synchronize()  # it may still run
            oldest = next(iter(self._captured))
            del self._captured[oldest], self._calls[oldest]
        self._captured[key] = graph


def _placed(value: Any) -> Any:
    """A copy of all tensors in a tensor or a dataclass, to be written to later."""
    if isinstance(value, Tensor):
        return value.clone()
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: _placed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def _put(value: Any, place: Any) -> None:
    """The tensors of a value where `_placed` has put those of another."""
    if isinstance(value, Tensor):
        place.copy_(value, non_blocking=True)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _put(getattr(value, field.name), getattr(place, field.name))


@contextlib.contextmanager
def rates_from(rates: Tensor, optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the groups of an optimiser read their learning rates from float32 [groups] on the device.

    Outside they are plain numbers, as checkpoints and the display want them.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    kept = [dict(group) for group in optimiser.param_groups]
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
        if capturing and "capturable" in group:  # Adam asks for the word; all that it does here is captured anyway
            group["capturable"] = True
    try:
        yield
    finally:
        for group, before in zip(optimiser.param_groups, kept, strict=True):
            group.update(before)
