"""Reads what torch.save wrote: tensors and plain containers. Nothing in the file is executed.

torch's weights-only reader builds tensors. Other values that trainers put beside them are on a list, and inert
stand-ins take their place, so that no class of theirs is looked up or called. What is not on the list is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning.pytorch.utilities.parsing",
    "lightning.fabric.utilities.data",
)
MAPPINGS = ("collections.defaultdict", *(f"{module}.AttributeDict" for module in LIGHTNING))
LISTS = ("collections.deque", "builtins.list")
OTHERS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "bool_", "float32", "float64", "int32", "int64")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "slice", "str", "tuple", "range")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
)


class _Mapping:
    """Takes the place of a kind of dictionary: a dictionary."""

    def __new__(cls, *_: Any) -> Any:
        return {}


class _List:
    def __new__(cls, *_: Any) -> Any:
        return []


class _Ignored:
    """Takes the place of a value that is of no use here, and keeps nothing of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Mapping, name) for name in MAPPINGS),
    *((_List, name) for name in LISTS),
    *((_Ignored, name) for name in OTHERS),
]


def read_plain(path: Path) -> Any:
    """What is in the file, tensors on the CPU. Raises ValueError, which says what it is instead, and OSError."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # of old formats, which are read all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(_reason(str(error))) from None


def _reason(message: str) -> str:
    """In our words: torch's advise to execute what is in the file."""
    cure = "save the network's state_dict() alone"
    if "TorchScript" in message:
        return f"it is a TorchScript program: {cure}"
    if found := re.search(r"GLOBAL (\S{1,80})", message):
        return f"beside tensors and plain values it holds {found[1]}: {cure}"
    return "it is damaged, or holds more than tensors"
