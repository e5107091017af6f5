"""What a file of weights holds, whichever format it came in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """state: torchvision's keys; variant and epsilon: of the network that they are of, None where nobody says.

    found: where in the file they were, for people (`under module. of state_dict`), "" where they are all that is in it;
    left_out: what else is in the file, by name. bands: that the network takes, in order, empty where nobody says.
    """

    state: dict[str, Tensor]
    variant: str | None = None
    epsilon: float | None = None
    found: str = ""
    left_out: tuple[str, ...] = ()
    bands: tuple[str, ...] = ()
