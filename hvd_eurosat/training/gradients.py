"""The sum of the gradients over the ranks, which runs while backward still does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvd_eurosat.cluster.world import World, split_by_bytes

BUCKET_BYTES = 16 * 2**20


class GradientBuckets:
    """Sums gradients over the ranks in flat buckets of fixed content and order, while backward still runs.

    Each bucket is one buffer, allocated once, whose slices are the parameters' `.grad`; its allreduce starts when
    the last gradient of it is there. Buckets are filled from the last parameter to the first, the order in which
    backward makes them (compiled, it hands over all of them at its end). `at_once`: a graph makes all gradients, and
    all buckets leave after it. Fixed buckets make the sums repeatable, unlike Horovod's own fusion. The last bucket
    ends with a few numbers more: what the ranks tell each other in every step, `notes`, costs no collective of its own.
    Buckets, notes included, travel as `dtype`.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[torch.nn.Parameter],
        notes: int,
        dtype: torch.dtype = torch.float32,
        at_once: bool = False,
    ) -> None:
        self._world = world
        self._exchanges = world.size > 1
        self._dtype, self._compresses = dtype, dtype != torch.float32
        self._at_once = at_once
        self._missing: list[int] = []
        self.groups = split_by_bytes(list(reversed(parameters)), BUCKET_BYTES)
        self._handles: dict[int, tuple[int, Tensor]] = {}
        rooms = [sum(p.numel() for p in group) for group in self.groups]
        rooms[-1] += notes
        self.buffers = [torch.zeros(room, device=world.device) for room in rooms]
        self.notes = self.buffers[-1][-notes:]
        self._slices: dict[torch.nn.Parameter, Tensor] = {}
        for number, group in enumerate(self.groups):
            self._hold(number, group)

    def _hold(self, number: int, parameters: list[torch.nn.Parameter]) -> None:
        offset = 0
        for parameter in parameters:
            piece = self.buffers[number][offset : offset + parameter.numel()]
            parameter.grad = piece.as_strided(parameter.shape, parameter.stride())
            self._slices[parameter] = parameter.grad
            offset += parameter.numel()
            if not self._at_once:
                parameter.register_post_accumulate_grad_hook(lambda _: self._arrived(number))

    def backward(self, loss: Tensor) -> None:
        """The gradients of `loss`, float [], into the buckets, which `zero` has prepared."""
        if self._at_once:  # a few kernels in all, where adding up takes one for each parameter
            torch._foreach_copy_(list(self._slices.values()), torch.autograd.grad(loss, list(self._slices)))
        else:
            loss.backward()

    def _arrived(self, number: int) -> None:
        self._missing[number] -= 1
        if self._missing[number] == 0 and self._exchanges:
            self._send(number)

    def _send(self, number: int) -> None:
        sent = self.buffers[number]
        if self._compresses:  # as large as a rank's own mean, or 16 bits would lose it
            sent = (sent * self._world.size).to(self._dtype)
        self._handles[number] = self._world.start_sum(sent, f"gradients.{number}"), sent

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Steps within it exchange nothing, then or later: after them the ranks' weights differ."""
        exchanges, self._exchanges = self._exchanges, False
        try:
            yield
        finally:
            self._exchanges = exchanges

    def zero(self) -> None:
        """Start a step: all gradients and notes to zero, in place, where gradients are added up."""
        if self._at_once:
            return
        for buffer in self.buffers:
            buffer.zero_()
        self._missing = [len(group) for group in self.groups]

    def wait(self) -> None:
        """Until the sums over all ranks are in the parameters' gradients and in the notes."""
        if self._at_once and self._exchanges:
            for number in range(len(self.buffers)):
                self._send(number)
        for number, (handle, sent) in self._handles.items():
            self._world.finish_sum(handle)
            if self._compresses:
                self.buffers[number].copy_(sent).div_(self._world.size)
        self._handles.clear()
