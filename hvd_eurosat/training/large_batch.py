"""LARS and LAMB: optimisers whose step in each weight tensor is in proportion to its norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Proportional(torch.optim.Optimizer):
    """Calls _update for every parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, self.state[parameter])
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


class Lars(_Proportional):
    """SGD with momentum (You et al. 2017). One-dimensional parameters (BatchNorm's) take plain steps, as is usual."""

    def __init__(self, params: Any, lr: float, momentum: float, nesterov: bool, trust: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "trust": trust, "weight_decay": 0.0}
        super().__init__(params, defaults)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        step = gradient.add(weight, alpha=decay)
        if weight.ndim > 1:
            norm, length = weight.norm(), gradient.norm() + decay * weight.norm()
            step *= torch.where((norm > 0) & (length > 0), group["trust"] * norm / length, 1.0)
        step *= group["lr"]
        if group["momentum"]:
            velocity = state.setdefault("velocity", torch.zeros_like(weight))
            velocity.mul_(group["momentum"]).add_(step)
            step = step.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity
        weight.sub_(step)


class Lamb(_Proportional):
    """Adam (You et al. 2020). One-dimensional parameters take Adam's steps, as is usual."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        mean, square = (state.setdefault(name, torch.zeros_like(weight)) for name in ("mean", "square"))
        state["steps"] = state.get("steps", 0) + 1
        rate1, rate2 = group["betas"]
        mean.lerp_(gradient, 1 - rate1)
        square.mul_(rate2).addcmul_(gradient, gradient, value=1 - rate2)
        step = mean / (1 - rate1 ** state["steps"])
        step /= (square / (1 - rate2 ** state["steps"])).sqrt_().add_(group["eps"])
        step.add_(weight, alpha=group["weight_decay"])
        if weight.ndim > 1:
            norm, length = weight.norm(), step.norm()
            step *= torch.where((norm > 0) & (length > 0), norm / length, 1.0)
        weight.sub_(step, alpha=group["lr"])
