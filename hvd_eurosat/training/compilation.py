"""What torch.compile needs at run time, and whether every rank has it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sysconfig
from pathlib import Path

import torch

from hvd_eurosat.cluster import World


def obstacle(world: World) -> str | None:
    """What keeps some rank, and so all of them, from compiling: "node3 has no g++". Collective."""
    missing = _missing(world.device)
    return next(filter(None, world.gather(missing and f"{socket.gethostname()} has no {missing}")), None)


def _missing(device: torch.device) -> str | None:
    """For CPUs inductor calls a C++ compiler, for GPUs Triton a C compiler, and both compile against Python."""
    if device.type == "cpu":
        compilers = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[:1]  # ccache g++
    else:
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return compilers[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else str(header)
