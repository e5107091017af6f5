"""A stand-in for CUDA graphs on a CPU, by which the control flow of training/capture.py is tested without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvd_eurosat.data.batches import Images
from hvd_eurosat.training import capture

FORBIDDEN = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::pin_memory")
REFUSED = "CUDA error: operation not permitted when stream is capturing. CUDA kernel errors might be"
AT_WORK = threading.local()  # whether this thread captures


class Tape(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph: takes down each operation while it captures; a replay does the same ones again.

    On the same memory, with the same numbers, and without the captured function. As with a GPU nothing is done while
    it captures: what was changed is put back, and what was made is spoilt. And as there, a number that the host reads,
    or brings, ends the capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func._schema.name in FORBIDDEN:
            raise RuntimeError(REFUSED)
        given = {place(t): t for t in tensors((args, kwargs))}
        for where, tensor in given.items():
            if where not in self._made and where not in self._before:
                self._before[where] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        found = func(*args, **kwargs)
        made = [t for t in tensors(found) if place(t) not in given]
        self._made |= set(map(place, made))
        if made or func._schema.is_mutable:  # not a view
            self._steps.append((func, args, kwargs, tensors(found)))
        return found

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Take down what is done within."""
        AT_WORK.captures = True
        try:
            with self:
                yield
        finally:
            AT_WORK.captures = False
            for storage, content in self._before.values():
                storage.copy_(content)
        for *_, found in self._steps:
            for tensor in found:
                if place(tensor) in self._made and tensor.is_floating_point():
                    tensor.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it."""
        self.replays += 1
        for func, args, kwargs, found in self._steps:
            for old, new in zip(found, tensors(func(*args, **kwargs)), strict=True):
                if place(old) != place(new):
                    old.detach().copy_(new)


def tensors(value: Any) -> list[Tensor]:
    """In any nest of lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    """Of its storage in memory."""
    return tensor.untyped_storage().data_ptr()


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """From here on steps are captured on CPUs, by tapes, which come into the list. Images count as on the device."""
    tapes: list[Tape] = []

    def new_tape() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    def graph(tape: Tape, pool: object, stream: Stream, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        return tape.capture()

    stand_ins = {
        "CUDAGraph": new_tape,
        "graph": graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "set_stream": lambda _: None,
        "synchronize": lambda: None,
        "graph_pool_handle": lambda: None,
        "is_current_stream_capturing": lambda: getattr(AT_WORK, "captures", False),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(capture, "obstacle", lambda world, config: None)
    monkeypatch.setattr(Images, "on_device", True)
    return tapes
