"""LARS and LAMB: optimisers whose step in each weight tensor is in proportion to its norm.

On a GPU they take a few kernels for all tensors together, and all that they count lies there. On a CPU they take one
tensor after the other, which stays in its cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BITS = {4: torch.int32, 8: torch.int64}  # by bytes


class Together(torch.optim.Optimizer):
    """Calls _update for all parameters that have a gradient; `kept` names what it keeps of each, of the same shape.

    scales: whether they have more than one dimension.
    """

    kept: tuple[str, ...]

    def _prepare(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].update({name: torch.zeros_like(weight) for name in self.kept})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = closure() if closure else None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for scales in (True, False):
                together = [weight for weight in weights if (weight.ndim > 1) == scales]
                for some in [[w] for w in together] if all(map(one_by_one, together)) else [together]:
                    self._update(some, [weight.grad for weight in some], group, scales)
        return loss

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], scales: bool) -> None:
        raise NotImplementedError


class Lars(Together):
    """SGD with momentum (You et al. 2017). One-dimensional parameters (BatchNorm's) take plain steps, as is usual."""

    def __init__(self, params: Any, lr: float, momentum: float, nesterov: bool, trust: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "trust": trust, "weight_decay": 0.0}
        super().__init__(params, defaults)
        self.kept = ("velocity",) if momentum else ()
        self._prepare()

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], scales: bool) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        steps = list(torch._foreach_add(gradients, weights, alpha=decay))
        if scales:
            norms = _norms(weights)
            _scale(steps, group["trust"] * norms, _norms(gradients) + decay * norms)
        torch._foreach_mul_(steps, group["lr"])
        if momentum:
            velocities = [self.state[weight]["velocity"] for weight in weights]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, steps)
            steps = list(torch._foreach_add(steps, velocities, alpha=momentum)) if group["nesterov"] else velocities
        torch._foreach_sub_(weights, steps)


class Lamb(Together):
    """Adam (You et al. 2020). One-dimensional parameters take Adam's steps, as is usual."""

    kept = ("mean", "square")

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._prepare()
        for weight in self.state:
            if not one_by_one(weight):
                self._count(weight)

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], scales: bool) -> None:
        means, squares = ([self.state[weight][name] for weight in weights] for name in self.kept)
        rate1, rate2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - rate1)
        torch._foreach_mul_(squares, rate2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - rate2)
        first, second = self._corrections(weights, rate1, rate2)
        steps, roots = list(torch._foreach_div(means, first)), torch._foreach_div(squares, second)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(steps, roots)
        torch._foreach_add_(steps, weights, alpha=group["weight_decay"])
        if scales:
            _scale(steps, _norms(weights), _norms(steps))
        if isinstance(group["lr"], Tensor):
            torch._foreach_mul_(steps, group["lr"])
            torch._foreach_sub_(weights, steps)
        else:
            torch._foreach_sub_(weights, steps, alpha=group["lr"])

    def _corrections(self, weights: list[Tensor], *rates: float) -> list[Any]:
        """1 - rate^steps for each rate: of the steps that the weights have made, this one included."""
        if one_by_one(weights[0]):
            (state,) = (self.state[weight] for weight in weights)
            state["steps"] = int(state.get("steps", 0)) + 1
            return [1 - rate ** state["steps"] for rate in rates]
        counts = [self._count(weight) for weight in weights]
        torch._foreach_add_(counts, 1)
        return [(1 - rate ** counts[0].double()).to(weights[0].dtype) for rate in rates]

    def _count(self, weight: Tensor) -> Tensor:
        """Of steps, on the device: in the weight's own type, which is what a checkpoint's comes back in."""
        count = self.state[weight].get("steps", 0)
        if not isinstance(count, Tensor):
            count = self.state[weight]["steps"] = torch.full((), count, dtype=weight.dtype, device=weight.device)
        return count


def one_by_one(weight: Tensor) -> bool:
    """Whether weights like this one are updated one after the other."""
    return weight.is_cpu


def _norms(tensors: list[Tensor]) -> Tensor:
    """float32 [number of tensors]."""
    return torch.stack(torch._foreach_norm(tensors))


def _scale(steps: list[Tensor], norms: Tensor, lengths: Tensor) -> None:
    """Each step times its norm over its length; a step is left alone where either is nothing. Both [steps]."""
    ratios = torch.where((norms > 0) & (lengths > 0), norms / lengths, 1.0)
    torch._foreach_mul_(steps, list(ratios))


@contextlib.contextmanager
def unless(skip: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """After the block the tensors, of one type, are as they were before it if `skip`, bool [] on their device.

    Whatever it has made of them: they are chosen as integers, for nan times 0 is nan. The host does not wait.
    """
    kind = BITS[tensors[0].itemsize]
    bits = [tensor.detach().view(kind) for tensor in tensors]
    before = torch._foreach_mul(bits, skip.to(kind))
    yield
    torch._foreach_mul_(bits, (~skip).to(kind))
    torch._foreach_add_(bits, before)
