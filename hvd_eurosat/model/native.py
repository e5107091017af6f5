"""The libraries in C++ that launch/install.sh builds for the CPU's instructions, where it can."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The one of this name for AVX-512 or AVX2, if there is one. It shares torch's threads, whose libgomp is loaded."""
    spec = find_spec(f"hvd_eurosat.model._{name}_{torch.backends.cpu.get_cpu_capability().lower()}")
    try:
        return ctypes.CDLL(spec.origin) if spec and spec.origin else None
    except OSError:  # built by a compiler with another OpenMP
        return None


def call(name: str, function: str, *arguments: Tensor | float | None) -> None:
    """A function of library `name`, with the number of threads as its last argument.

    An int is passed as long, a float as float, a tensor as its address: the caller sees to its layout.
    """
    words: list[Any] = [_word(argument) for argument in arguments]
    getattr(library(name), function)(*words, torch.get_num_threads())


def _word(argument: Tensor | float | None) -> Any:
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
