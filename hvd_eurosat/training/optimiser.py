"""The optimiser, and the learning rate as a function of the samples seen."""

from __future__ import annotations

import inspect
import math
from typing import TypeVar, cast

import torch
from torch import nn

from hvd_eurosat.config.schema import Optim
from hvd_eurosat.training.large_batch import Lamb, Lars

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
FENCED = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")


def build_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Of the trainable parameters only; weight decay spares BatchNorm and its like (one-dimensional parameters)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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
        return uncompiled(torch.optim.Adagrad)(groups, lr=optim.lr, eps=optim.eps)
    if optim.name == "rmsprop":
        return uncompiled(torch.optim.RMSprop)(groups, lr=optim.lr, momentum=optim.momentum, eps=optim.eps)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return uncompiled(kind)(groups, lr=optim.lr, betas=betas, eps=optim.eps, amsgrad=optim.amsgrad, fused=True)


def uncompiled(kind: Kind) -> Kind:
    """The class of optimisers without the fences by which torch keeps their methods out of compiled code.

    A fence imports torch's compiler, which takes every rank two seconds. The network alone is compiled here.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in FENCED}
    return cast(Kind, type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"])}))


def peak_rate(optim: Optim, global_batch: int) -> float:
    """optim.lr after optim.lr_scaling."""
    ratio = global_batch / optim.reference_batch
    return optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optim.lr_scaling]


def learning_rate(optim: Optim, epochs: int, global_batch: int, progress: float) -> float:
    """The rate at `progress`, in epochs: samples seen / samples in the training set.

    A pure function, so that nothing of the schedule needs saving. one_cycle: Smith & Topin 2018, with cosine
    annealing as in torch's OneCycleLR; lr_scaling: Goyal et al. 2017 (linear), Hoffer et al. 2017 (sqrt).
    """
    peak = peak_rate(optim, global_batch)
    if progress < optim.warmup_epochs:
        risen = min(1.0, max(progress, 0.01) / optim.warmup_epochs)
        return peak * (optim.warmup_start + (1 - optim.warmup_start) * risen)
    done = (progress - optim.warmup_epochs) / (epochs - optim.warmup_epochs)
    if optim.schedule == "exponential":
        return peak * optim.gamma ** math.floor(progress)
    if optim.schedule == "step":
        return peak * optim.gamma ** (math.floor(progress) // optim.step_size)
    if optim.schedule == "multistep":
        return peak * optim.gamma ** sum(progress >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        return peak * _cosine(done)
    if optim.schedule == "one_cycle" and done < ONE_CYCLE_RISE:
        return peak * (1 - (1 - ONE_CYCLE_START) * _cosine(done / ONE_CYCLE_RISE))
    if optim.schedule == "one_cycle":
        return peak * _cosine((done - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
    return peak


def _cosine(done: float) -> float:
    """From 1 down to 0 as `done` goes from 0 to 1."""
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2
