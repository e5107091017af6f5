"""Finds the network in what other trainers save: inside of other things, and under prefixes of its names.

Keys of ResNets are the same in torchvision and in timm, so they are known by them. Nothing else is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.weights.first_layer import stated_bands
from hvd_eurosat.weights.weight_file import Weights

NESTS = ("state_dict", "model", "model_state_dict", "net", "teacher")  # the first of several is taken
DEPTH = 4  # of nests in each other
WRAPPERS = ("module", "_orig_mod", "model", "backbone", "encoder", "encoder_q", "net")
PREFIX = re.compile(rf"((?:{'|'.join(WRAPPERS)})\.)*")
BODY = re.compile(r"(conv|bn|norm|layer|stem|stage|block|patch|downsample|cls_|pos_)")  # which no head begins with
HEAD = ("fc.weight", "fc.bias")


def find_network(content: Any, facts: Mapping[str, Any] | None = None) -> Weights:
    """The state dict in what was read of a file, without prefixes; what else is there is named, not taken.

    facts: variant, bn_epsilon and bands, as our checkpoints and exports state them; else those in the state dict's own
    metadata. Raises ValueError where there is no network, or more than one.
    """
    found = _nested(content, (), ())
    if found is None:
        raise ValueError(f"not a state dict, nor one inside {', '.join(NESTS)}")
    tensors, nests, left_out = found
    facts = facts or getattr(tensors, "_metadata", {}).get("", {})
    prefix = _prefix(tensors)
    state: dict[str, Tensor] = {}
    others: Counter[str] = Counter()
    for name, tensor in tensors.items():
        wrapping = _wrapping(name)
        own = name.removeprefix(prefix or "")
        if prefix is None or (wrapping == prefix and (BODY.match(own) or own in HEAD)):
            state[own] = _strided(name, tensor)
        else:
            others[wrapping + name.removeprefix(wrapping).split(".")[0]] += 1
    words = [f"under {prefix}"] if prefix else []
    words += [f"of {'.'.join(nests)}"] if nests else []
    more = tuple(f"{name} ({count} tensors)" if count > 1 else name for name, count in others.items())
    variant, epsilon = facts.get("variant"), facts.get("bn_epsilon")
    return Weights(
        state,
        None if variant is None else str(variant),
        None if epsilon is None else float(epsilon),
        found=" ".join(words),
        left_out=(*more, *left_out),
        bands=stated_bands(facts.get("bands")),
    )


def _nested(
    content: Any, nests: tuple[str, ...], left_out: tuple[str, ...]
) -> tuple[Mapping[str, Tensor], tuple[str, ...], tuple[str, ...]] | None:
    """The tensors of a network, the keys that lead to them, and what lies beside these keys."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return None
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    inner = [key for key in NESTS if isinstance(content.get(key), Mapping)] if len(nests) < DEPTH else []
    if any(BODY.match(name[len(_wrapping(name)) :]) for name in tensors) or (tensors and not inner):
        rest = tuple(name for name in content if name not in tensors)
        return (content if not rest else tensors), nests, (*left_out, *rest)
    found = []
    for key in inner:
        beside = tuple(name for name in content if name != key)
        if one := _nested(content[key], (*nests, key), (*left_out, *beside)):
            found.append(one)
    resnets = (one for one in found if any(name.endswith("layer1.0.conv1.weight") for name in one[0]))
    return next(resnets, found[0] if found else None)


def _wrapping(name: str) -> str:
    """The prefix of a tensor's name: `module.encoder_q.`, or "" for none."""
    match = PREFIX.match(name)
    return match[0] if match else ""


def _prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """The one under which there is a ResNet; None where there is none, as the names show that are said to be wrong."""
    names = {"conv1.weight", "layer1.0.conv1.weight"}
    prefixes = {_wrapping(name) for name in tensors}
    whole = sorted(prefix for prefix in prefixes if all(f"{prefix}{name}" in tensors for name in names))
    if len(whole) > 1:
        under = " and ".join(prefix or "no prefix" for prefix in whole)
        raise ValueError(f"there are {len(whole)} networks in it, under {under}: save the one that is meant alone")
    return whole[0] if whole else None


def _strided(name: str, tensor: Tensor) -> Tensor:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{name[:60]} is quantized, sparse or without values")
    return tensor.detach()
