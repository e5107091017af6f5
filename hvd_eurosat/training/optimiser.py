"""The optimiser."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

import torch
from torch import nn

from hvd_eurosat.config.schema import Optim
from hvd_eurosat.model.resnet import depth
from hvd_eurosat.training.adaptive import Adagrad, RMSprop
from hvd_eurosat.training.large_batch import Lamb, Lars

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])

FENCED = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")


def build_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Of the trainable parameters only; weight decay spares BatchNorm and its like (one-dimensional parameters)."""
    groups = _groups(model, optim)
    parameters = [p for group in groups for p in group["params"]]
    betas, nesterov = (optim.beta1, optim.beta2), optim.nesterov and optim.momentum > 0
    if optim.name == "sgd":
        sgd = uncompiled(torch.optim.SGD)(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, fused=True)
        for parameter in parameters if optim.momentum else []:  # torch leaves it as it finds it in a skipped first step
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if optim.name == "lars":
        return uncompiled(Lars)(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, trust=optim.trust)
    if optim.name == "lamb":
        return uncompiled(Lamb)(groups, lr=optim.lr, betas=betas, eps=optim.eps)
    if optim.name == "adagrad":
        return uncompiled(Adagrad)(groups, lr=optim.lr, eps=optim.eps)
    if optim.name == "rmsprop":
        return uncompiled(RMSprop)(groups, lr=optim.lr, momentum=optim.momentum, eps=optim.eps)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return uncompiled(kind)(groups, lr=optim.lr, betas=betas, eps=optim.eps, amsgrad=optim.amsgrad, fused=True)


def _groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """By their `depth`, as far as that matters, the head first, and by whether they decay."""
    by_depth = optim.layer_decay < 1 or optim.unfreeze_epochs > 0
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depth(name) if by_depth else 0, parameter.ndim <= 1), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if spared else optim.weight_decay, "depth": deep}
        for (deep, spared), parameters in sorted(groups.items())
    ]


def uncompiled(kind: Kind) -> Kind:
    """The class of optimisers without the fences by which torch keeps their methods out of compiled code.

    A fence imports torch's compiler, which takes every rank two seconds. The network alone is compiled here.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in FENCED}
    return cast(Kind, type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"])}))
