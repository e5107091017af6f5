"""The first convolution of weights that are for other bands than the network's: by name, never by position."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_eurosat.data.bands import canonical
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import RGB, LandCoverResNet
from hvd_eurosat.weights.weight_file import Weights

NAME = "conv1.weight"
SMALL = 0.1  # of a random kernel, for bands that the weights do not know


def stated_bands(fact: Any) -> tuple[str, ...]:
    """What a file says of its bands, as a list, JSON or B04,B03,B02; () where it says nothing."""
    if isinstance(fact, str):
        fact = json.loads(fact) if fact.lstrip().startswith("[") else fact.split(",")
    return tuple(canonical(str(name)) for name in fact or ())


def bands_of(weights: Weights, own: Sequence[str], source: str) -> tuple[str, ...]:
    """The bands that weights are for; red, green and blue where three are not named.

    Raises UserError for others that are not named: their order cannot be known.
    """
    channels = channels_of(weights.state)
    known = tuple(map(canonical, weights.bands or (RGB if channels == len(RGB) else ())))
    if channels and len(known) != channels:
        says = f"it names {len(known)}" if known else "does not say which, and an order is not guessed"
        raise UserError(
            f"model.weights {source}: its first convolution takes {channels} bands and {says}; the data has "
            f"{', '.join(own)}: a .safetensors file says it in its metadata, bands = B01,B02,…"
        )
    return known


def channels_of(state: dict[str, Tensor]) -> int:
    """Of the images that the first convolution takes; 0 where there is none."""
    kernel = state.get(NAME)
    return kernel.shape[1] if kernel is not None and kernel.ndim == 4 else 0


def lacking_bands(known: Sequence[str], own: Sequence[str]) -> list[str]:
    """The network's own bands that weights do not know."""
    return [band for band in own if canonical(band) not in known]


def fit_first(state: dict[str, Tensor], weights: Weights, model: LandCoverResNet, source: str) -> str:
    """Bring the state's first convolution to the model's bands, in place, where it is of its kind.

    Returns and raises what `fit_bands` and `bands_of` do.
    """
    kernel, own = state.get(NAME), model.conv1.weight
    if kernel is None or kernel.ndim != 4 or not kernel.is_floating_point():
        return ""
    if (kernel.shape[0], *kernel.shape[2:]) != (own.shape[0], *own.shape[2:]):
        return ""
    state[NAME], note = fit_bands(kernel.float(), bands_of(weights, model.bands, source), model, source)
    return note


def fit_bands(kernel: Tensor, known: Sequence[str], model: LandCoverResNet, source: str) -> tuple[Tensor, str]:
    """The first convolution's kernel for the model's bands, and a word on those that it is not for, "" without any.

    kernel: [64, known bands, 7, 7]. The others get small random kernels, of the model's seed. Raises UserError where
    the two have no band in common.
    """
    own = tuple(map(canonical, model.bands))
    if tuple(known) == own:
        return kernel, ""
    missing = lacking_bands(known, own)
    if len(missing) == len(own):
        both = f"its bands are {', '.join(known)}, the data's {', '.join(model.bands)}"
        raise UserError(f"model.weights {source}: {both}: none is in both; --model.weights none begins without")
    random = SMALL * model.conv1.weight.detach()
    columns = [kernel[:, known.index(band)] if band in known else random[:, n] for n, band in enumerate(own)]
    note = f"they know no {', '.join(missing)}, whose kernels begin small" if missing else ""
    return torch.stack(columns, 1), note
