"""Whether a state dict is one of this network, and if not, why."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import BLOCKS, Details, LandCoverResNet

NAMED = 3  # differences, the nearest ones


def check_fit(
    source: str, arch: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Collection[str]
) -> None:
    """Raise UserError, with the differences that are nearest to a fit, unless the state has the network's own tensors.

    source: model.weights. own: the network's state dict. optional: names that may be missing.
    """
    found = list(_differences(state, own, optional))
    if not found:
        return
    raise UserError(f"model.weights {source}: not weights of {arch}: {nearest(found)}{_hint(state, arch)}")


def nearest(differences: Sequence[str]) -> str:
    """The first of them, and how many there are."""
    return f"{'; '.join(differences[:NAMED])} ({len(differences)} differences)"


def plain_norms(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of 1 and biases of 0 for all of the network's BatchNorm layers."""
    norms = [name.removesuffix(".running_var") for name in own if name.endswith(".running_var")]
    ones = {f"{norm}.weight": torch.ones_like(own[f"{norm}.running_var"]) for norm in norms}
    zeros = {f"{norm}.bias": torch.zeros_like(own[f"{norm}.running_var"]) for norm in norms}
    return {name: tensor for name, tensor in (ones | zeros).items() if name in own}


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Collection[str]) -> Iterator[str]:
    """The nearest first: tensors of another kind, then those that are missing, then those that are unknown."""
    unknown = [name for name in state if name not in own]
    for name, tensor in own.items():
        if name not in state:
            continue
        given = state[name]
        if given.shape != tensor.shape:
            yield f"{name} is {list(given.shape)}, expected {list(tensor.shape)}"
        elif given.is_floating_point() != tensor.is_floating_point() or given.is_complex():
            yield f"{name} is {str(given.dtype).removeprefix('torch.')}"
        elif not given.isfinite().all():
            yield f"{name} is not finite"
    missing = (name for name in own if name not in state and name not in optional)
    for number, name in enumerate(missing):
        near = difflib.get_close_matches(name, unknown, 1) if number < NAMED else []  # slow
        yield f"{name} is missing" + (f", the nearest is {near[0][:80]}" if near else "")
    yield from (f"{name[:80]} is unknown" for name in unknown)


def _hint(state: Mapping[str, Tensor], arch: str) -> str:
    """What the file is of, if that is plain."""
    if any("patch_embed" in name for name in state):
        return "; it begins with a patch embedding, as vision transformers do"
    for other in BLOCKS.keys() - {arch}:
        with torch.device("meta"):
            theirs = LandCoverResNet(other, 1, "all", Details()).state_dict()
        if _shapes(state) == _shapes(theirs):
            return f"; it is a {other}: give --model.arch {other}"
    return ""


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Of all convolutions but the first, which depends on the bands, and the shortcuts'."""
    return {name: tensor.shape for name, tensor in state.items() if ".conv" in name}
