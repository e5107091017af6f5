"""What torch.compile needs at run time, and whether every rank has it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sysconfig
from pathlib import Path

import torch

from hvd_eurosat.cluster.world import World


def obstacle(world: World) -> str | None:
    """What keeps some rank, and so all of them, from compiling: "node3 has no working g++". Collective."""
    missing = _missing(world.device)
    return next(filter(None, world.gather(missing and f"{socket.gethostname()} has no {missing}")), None)


def _missing(device: torch.device) -> str | None:
    """For CPUs inductor calls a C++ compiler, for GPUs Triton a C compiler, and both compile against Python."""
    if device.type == "cpu":
        language, compilers = "c++", [shlex.split(os.environ.get("CXX", "")) or ["g++"]]  # ccache g++
    else:
        language, compilers = "c", [[os.environ["CC"]]] if os.environ.get("CC") else [["gcc"], ["clang"]]
    if not any(_works(compiler, language) for compiler in compilers):
        return f"working {shlex.join(compilers[0])}"
    if device.type == "cuda" and not _triton_finds_the_driver():
        return "libcuda.so.1 where Triton looks for it (ldconfig, or TRITON_LIBCUDA_PATH)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else str(header)


def _triton_finds_the_driver() -> bool:
    try:
        from triton.backends.nvidia.driver import libcuda_dirs

        libcuda_dirs()
    except (ImportError, AssertionError, OSError, subprocess.CalledProcessError):
        return False
    return True


def _works(compiler: list[str], language: str) -> bool:
    """Whether it takes an empty program."""
    try:
        words = [*compiler, "-x", language, "-fsyntax-only", "-"]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
