"""The device of a rank: its GPU, or the cores; and what keeps torch from a GPU that is there."""

from __future__ import annotations

import os
import re
import socket
import warnings
from functools import cache
from pathlib import Path

import torch

from hvd_eurosat.errors import UserError

FILES = Path("/dev")  # among them nvidia0, nvidia1, …: one for each GPU
DRIVER = Path("/proc/driver/nvidia/version")
HIDDEN = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES where no GPU is wanted; the last is Slurm's word
DRIVERS = {12: 525, 13: 580}  # the oldest driver for each CUDA, by NVIDIA's compatibility guide
ON_CORES = "the cores do it with CUDA_VISIBLE_DEVICES= (or --train.device cpu)"


def choose(wanted: str, local_rank: int) -> torch.device:
    """The device for `train.device`; a GPU becomes the current one. Raises UserError.

    auto is a GPU wherever there is one that this process may use, and not the cores because torch cannot use it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    count, _ = visible()
    if not count:
        trouble = obstacle()
        if trouble or wanted == "cuda":
            nothing = f"{socket.gethostname()} has no NVIDIA GPU that this process may use"
            raise UserError(f"{trouble or nothing}; {ON_CORES}")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % count)
    capability = torch.cuda.get_device_capability(device)
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"{socket.gethostname()}: this torch (for CUDA {torch.version.cuda}) has no code for the {name}, whose "
            f"compute capability is {'.'.join(map(str, capability))}: install a torch for an older CUDA; {ON_CORES}"
        )
    torch.cuda.set_device(device)
    return device


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether one of sm_75, sm_90a, compute_120, … runs there: machine code in its major version, PTX from it on."""
    major, minor = capability
    for kind, *version in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(architectures)):
        built = tuple(map(int, version))
        if (built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return True
    return not architectures


@cache
def visible() -> tuple[int, str]:
    """How many GPUs torch can use and, in its own words, why none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    words = str(said[-1].message) if said else ""
    return count, re.split(r"\. |\s*\(Triggered", words)[0].removeprefix("CUDA initialization: ")


def granted() -> int:
    """How many NVIDIA GPUs this process may open; Slurm's cgroups and containers deny those of others."""
    count = 0
    for path in FILES.glob("nvidia[0-9]*"):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError:
            continue
        except OSError:  # there, but its driver does not answer
            pass
        count += 1
    return count


def driver() -> str:
    """The version of NVIDIA's kernel module, "" where there is none."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def obstacle() -> str | None:
    """Why torch can use none of the GPUs here, and the cure; None where it can, or where none is wanted or granted."""
    count, reason = visible()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = granted()
    if count or not there or (chosen is not None and chosen.split(",")[0].strip() in HIDDEN):
        return None
    what = f"{socket.gethostname()} has {there} NVIDIA GPU{'s' if there > 1 else ''}, of which torch can use none"
    if torch.version.cuda is None:
        return f"{what}: it is a CPU build; launch/install.sh brings the one for CUDA"
    version, needed = driver(), DRIVERS.get(int(torch.version.cuda.split(".")[0]), 0)
    facts = f"(driver {version or 'unknown'}, torch for CUDA {torch.version.cuda})"
    said = f": {reason}" if reason else ""
    if version and int(version.split(".")[0]) < needed:
        return f"{what} {facts}{said}: install driver {needed} or newer, or NVIDIA's cuda-compat package"
    if chosen is not None:
        return f"{what} with CUDA_VISIBLE_DEVICES={chosen} {facts}{said}: name GPUs that are there, or unset it"
    return f"{what} {facts}{said}: look at nvidia-smi; a container needs --gpus all"
