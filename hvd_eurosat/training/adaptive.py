"""Adagrad and RMSprop: on CPUs the bits of torch's. On GPUs torch's ask the device how many steps were made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.training.large_batch import Together


class Adagrad(Together):
    """Duchi et al. 2011."""

    kept = ("sum",)

    def __init__(self, params: Any, lr: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0})
        self._prepare()

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], scales: bool) -> None:
        gradients = _decayed(weights, gradients, group["weight_decay"])
        sums = [self.state[weight]["sum"] for weight in weights]
        torch._foreach_addcmul_(sums, gradients, gradients)
        _divide(weights, gradients, _roots(sums, group["eps"]), group["lr"])


class RMSprop(Together):
    """Tieleman and Hinton 2012, with momentum."""

    def __init__(self, params: Any, lr: float, momentum: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "alpha": 0.99, "eps": eps, "weight_decay": 0.0})
        self.kept = ("square_avg", "momentum_buffer") if momentum else ("square_avg",)
        self._prepare()

    def _update(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], scales: bool) -> None:
        gradients = _decayed(weights, gradients, group["weight_decay"])
        squares = [self.state[weight]["square_avg"] for weight in weights]
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
        roots = _roots(squares, group["eps"])
        if not group["momentum"]:
            return _divide(weights, gradients, roots, group["lr"])
        steps = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(steps, group["momentum"])
        torch._foreach_addcdiv_(steps, gradients, roots)
        if isinstance(group["lr"], Tensor):
            return torch._foreach_sub_(weights, torch._foreach_mul(steps, group["lr"]))
        return torch._foreach_add_(weights, steps, alpha=-group["lr"])


def _decayed(weights: list[Tensor], gradients: list[Tensor], decay: float) -> list[Tensor]:
    return list(torch._foreach_add(gradients, weights, alpha=decay)) if decay else gradients


def _roots(squares: list[Tensor], eps: float) -> list[Tensor]:
    roots = list(torch._foreach_sqrt(squares))
    torch._foreach_add_(roots, eps)
    return roots


def _divide(weights: list[Tensor], gradients: list[Tensor], roots: list[Tensor], rate: float | Tensor) -> None:
    """weights - rate * gradients / roots, multiplied first, as torch does."""
    torch._foreach_addcdiv_(weights, torch._foreach_mul(gradients, -rate), roots)
