"""What a file of weights holds, whichever format it came in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """state: torchvision's keys; variant and epsilon: of the network that they are of, None where nobody says.

    bands: that the network takes, in order, empty where nobody says.
    """

    state: dict[str, Tensor]
    variant: str | None = None
    epsilon: float | None = None
    bands: tuple[str, ...] = ()
