"""Copies on the CPU of what changes while training goes on.

From a GPU they come in large pieces, into pinned memory, and nobody waits for them but who reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.cluster.world import split_by_bytes
from hvd_eurosat.errors import RunError
from hvd_eurosat.training.checkpoint import Checkpoint

PIECE = 64 << 20  # bytes, which a GPU has to have free


class NotFiniteError(RunError):
    """The run cannot go on from its weights."""

    def __init__(self) -> None:
        super().__init__("the weights are not finite any more: try a lower optim.lr")


@dataclasses.dataclass(frozen=True)
class Arrival:
    """Of copies that are on their way. numbers: float64 [2], 1 if the weights are finite, and a checkpoint's share."""

    numbers: Tensor
    event: torch.cuda.Event


def copied(value: Any) -> Any:
    """Nested dictionaries and lists with copies of their tensors, which are dense; from a GPU they are yet to come."""
    found: list[Tensor] = []
    _each(value, found.append)
    far = [tensor for tensor in found if _is_far(tensor)]
    copies = {}
    kinds = {tensor.dtype for tensor in far}
    for some in (part for kind in kinds for part in split_by_bytes([t for t in far if t.dtype == kind], PIECE)):
        flat = torch.cat([tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in some])
        for tensor, piece in zip(some, send(flat).split([tensor.numel() for tensor in some]), strict=True):
            copies[id(tensor)] = piece.as_strided(tensor.shape, tensor.stride())
    return _each(value, lambda one: copies[id(one)] if id(one) in copies else one.detach().to("cpu", copy=True))


def send(tensor: Tensor) -> Tensor:
    """A GPU's tensor in pinned memory, once its stream has come so far."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def whole(saved: Checkpoint) -> Checkpoint:
    """A snapshot once all of it is there, each tensor with memory of its own. Raises NotFiniteError."""
    if saved.arrival is None:
        return saved
    saved.arrival.event.synchronize()
    finite, share = saved.arrival.numbers.tolist()
    if not finite:
        raise NotFiniteError
    return Checkpoint(**{**_each(vars(saved), _apart), "share": share, "arrival": None})


def highest(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The absolute values of their largest numbers, by a few kernels; not finite where any of a tensor's is not."""
    numbers = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    return list(torch._foreach_norm(numbers, torch.inf)) if numbers else []


def arrival(values: list[Tensor], share: Tensor) -> Arrival | None:
    """That of all that was copied before; None where it is there. Raises NotFiniteError where a value is not."""
    finite = torch.stack(values).isfinite().all()
    if _is_far(finite):
        numbers, event = send(torch.stack([finite.double(), share])), torch.cuda.Event()
        event.record()
        return Arrival(numbers, event)
    if not finite:
        raise NotFiniteError
    return None


def _is_far(tensor: Tensor) -> bool:
    return not tensor.is_cpu


def _apart(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _each(value: Any, work: Callable[[Tensor], Any]) -> Any:
    """Nested dictionaries and lists, with what `work` makes of their tensors."""
    if isinstance(value, Tensor):
        return work(value)
    if isinstance(value, dict):
        return {key: _each(item, work) for key, item in value.items()}
    return [_each(item, work) for item in value] if isinstance(value, list) else value
