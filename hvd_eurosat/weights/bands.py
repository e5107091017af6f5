"""Weights for other bands than the images': their first convolution is what has to fit."""

from __future__ import annotations

from torch import Tensor

from hvd_eurosat.errors import UserError

FIRST = "conv1.weight"


def bring_bands(
    source: str, state: dict[str, Tensor], bands: tuple[str, ...], wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """The state dict with its first convolution [64, bands, 7, 7] for images of the bands `wanted`, in their order.

    source: model.weights. bands: that the weights are for, in order. Either is empty where nobody says, and then all
    stays as it is. Raises UserError where the bands are not the same.
    """
    if not bands or not wanted or bands == wanted:
        return state
    named, had = ", ".join(bands), ", ".join(wanted)
    raise UserError(f"model.weights {source} takes the bands {named}, and the images have {had}")
