"""torch's optimisers, and LARS and LAMB from their papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvd_eurosat.config.schema import Optim


def optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Weight decay is for all but BatchNorm and the head's biases."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    norms |= {id(p) for name, p in model.named_parameters() if name == "fc.bias"}
    groups = [
        {"params": [p], "weight_decay": 0.0 if id(p) in norms else optim.weight_decay, "norm": id(p) in norms}
        for p in model.parameters()
        if p.requires_grad
    ]
    heavy = {"momentum": optim.momentum, "nesterov": bool(optim.nesterov and optim.momentum)}
    means = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, heavy),
        "adam": (torch.optim.Adam, {**means, "amsgrad": optim.amsgrad}),
        "adamw": (torch.optim.AdamW, {**means, "amsgrad": optim.amsgrad}),
        "adagrad": (torch.optim.Adagrad, {"eps": optim.eps}),
        "rmsprop": (torch.optim.RMSprop, {"eps": optim.eps, "momentum": optim.momentum}),
        "lars": (Lars, {**heavy, "trust": optim.trust}),
        "lamb": (Lamb, means),
    }
    kind, options = kinds[optim.name]
    made: torch.optim.Optimizer = kind(groups, lr=optim.lr, **options)
    return made


class Lars(torch.optim.Optimizer):
    """You et al. 2017, algorithm 1: v = m v + lr * local * (g + decay * w)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            (weight,) = group["params"]
            gradient, decay, momentum = weight.grad, group["weight_decay"], group["momentum"]
            local = 1.0
            if not group["norm"] and weight.norm() > 0 and gradient.norm() + decay * weight.norm() > 0:
                local = group["trust"] * weight.norm() / (gradient.norm() + decay * weight.norm())
            change = group["lr"] * local * (gradient + decay * weight)
            velocity = momentum * self.state[weight].get("velocity", 0) + change
            self.state[weight]["velocity"] = velocity
            weight -= change + momentum * velocity if group["nesterov"] else velocity


class Lamb(torch.optim.Optimizer):
    """You et al. 2020, algorithm 2."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            (weight,) = group["params"]
            (beta1, beta2), state = group["betas"], self.state[weight]
            count = state["count"] = state.get("count", 0) + 1
            mean = state["mean"] = beta1 * state.get("mean", 0) + (1 - beta1) * weight.grad
            square = state["square"] = beta2 * state.get("square", 0) + (1 - beta2) * weight.grad**2
            change = mean / (1 - beta1**count) / ((square / (1 - beta2**count)) ** 0.5 + group["eps"])
            change = change + group["weight_decay"] * weight
            ratio = 1.0
            if not group["norm"] and weight.norm() > 0 and change.norm() > 0:
                ratio = weight.norm() / change.norm()
            weight -= group["lr"] * ratio * change
