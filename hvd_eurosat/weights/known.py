"""Weights that have a name: what was trained on Sentinel-2, as torchgeo publishes it, and what each wants to see.

Addresses, band order and scale are those of torchgeo.models (ResNet18_Weights, ResNet50_Weights). A file's name ends
with the first digits of its sha256.
"""

from __future__ import annotations

import hashlib
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

from hvd_eurosat.config.schema import Data
from hvd_eurosat.data.bands import RGB, SENTINEL2
from hvd_eurosat.data.inputs import DIGITAL_NUMBERS, REFLECTANCE, Inputs
from hvd_eurosat.errors import RunError, UserError

FAMILY = "sentinel2-"  # with which the names begin
HUB = "https://hf.co/torchgeo"
SSL4EO = "CC-BY-4.0, SSL4EO-S12 (Wang et al. 2023, https://arxiv.org/abs/2211.07044)"
DOWNLOAD_SECONDS = 20.0  # without an answer; a compute node's network may drop every packet


@dataclass(frozen=True)
class Known:
    """urls: by model.arch. bands: in the network's order. scale: the digital number (reflectance x 10,000) of 1."""

    urls: dict[str, str]
    bands: tuple[str, ...]
    scale: float
    licence: str


def _moco(bands: str, revision18: str, digest18: str, revision50: str, digest50: str) -> dict[str, str]:
    files = {"resnet18": (revision18, digest18), "resnet50": (revision50, digest50)}
    name = f"sentinel2_{bands}_moco"
    return {
        arch: f"{HUB}/{arch}_{name}/resolve/{revision}/{arch}_{name}-{digest}.pth"
        for arch, (revision, digest) in files.items()
    }


ALL_MOCO = _moco(
    "all",
    "5b8cddc9a14f3844350b7f40b85bcd32aed75918",
    "59bfdff9",
    "da4f3c9dbe09272eb902f3b37f46635fa4726879",
    "df8b932e",
)
RGB_MOCO = _moco(
    "rgb",
    "e1c032e7785fd0625224cdb6699aa138bb304eec",
    "e3a335e3",
    "efd9723b59a88e9dc1420dc1e96afb25b0630a3c",
    "2b57ba8b",
)
ALL_DINO = {
    "resnet50": f"{HUB}/resnet50_sentinel2_all_dino/resolve/d7f14bf5530d70ac69d763e58e77e44dbecfec7c/"
    "resnet50_sentinel2_all_dino-d6c330e9.pth"
}
KNOWN = {
    f"{FAMILY}all-moco": Known(ALL_MOCO, SENTINEL2, 10_000, SSL4EO),
    f"{FAMILY}all-dino": Known(ALL_DINO, SENTINEL2, 10_000, SSL4EO),
    f"{FAMILY}rgb-moco": Known(RGB_MOCO, RGB, 10_000, SSL4EO),
}
NAMES = ("none", "imagenet", *KNOWN)  # of which no file is meant


def check_name(weights: str, arch: str) -> None:
    """Raise UserError where model.weights is a name of Sentinel-2 weights that are not there for this network."""
    if weights in KNOWN and arch not in KNOWN[weights].urls:
        raise UserError(f"model.weights {weights} is of {', '.join(KNOWN[weights].urls)}, and model.arch is {arch}")
    if weights.startswith(FAMILY) and weights not in KNOWN and not Path(weights).exists():
        raise UserError(f"model.weights {weights} is neither a file nor one of {', '.join(KNOWN)}")


def bands_by_name(weights: str) -> tuple[str, ...]:
    """Of weights that have a name, in order."""
    return KNOWN[weights].bands if weights in KNOWN else RGB


def normalised(data: Data, weights: str, inputs: Inputs | None) -> Data:
    """With the mean and std that named weights want, unless others are given.

    inputs: what the images' numbers are, None where there are no images yet. Raises UserError where the digital numbers
    behind their grey are not known.
    """
    if weights not in KNOWN or data.mean or data.std:
        return data
    bands, scale = len(inputs.bands if inputs else RGB), KNOWN[weights].scale
    if inputs and inputs.unit == REFLECTANCE:
        mean, std = 0.0, scale / inputs.scale
    elif inputs and inputs.unit == "grey" and inputs.stretch:
        mean, std = grey_scaling(inputs.stretch, scale)
    else:
        what = "which one the numbers of the images mean is not known: give data.mean and data.std"
        told = inputs is not None and inputs.unit == DIGITAL_NUMBERS
        flag = f", or prepare the images with --unit {shlex.quote(REFLECTANCE)}, if they hold that" if told else ""
        raise UserError(f"model.weights {weights} wants reflectance, and {what}{flag}")
    return data.model_copy(update={"mean": (mean,) * bands, "std": (std,) * bands})


def grey_scaling(stretch: tuple[float, float], scale: float) -> tuple[float, float]:
    """mean and std by which pixels of 0..1 become digital numbers / scale.

    stretch: the digital numbers that are 1 and 255 of grey.
    """
    low, high = stretch
    step = (high - low) / 254  # digital numbers from grey to grey
    return (1 - low / step) / 255, scale / (255 * step)


def fetched(weights: str, arch: str) -> Path:
    """The file of named weights, from torch's cache or the network, its digest checked.

    Raises UserError for a damaged file, RunError for a failed download.
    """
    import torch

    url = KNOWN[weights].urls[arch]
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    digest = place.stem.rsplit("-", 1)[-1]
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), hash_prefix=digest, progress=False)
        found = hashlib.sha256(place.read_bytes()).hexdigest()
    except Exception as error:  # of the network, or of the file system
        raise RunError(cannot_fetch(f"the weights {weights}", url, place, error)) from None
    finally:
        socket.setdefaulttimeout(None)
    if not found.startswith(digest):
        damage = f"{place} is damaged (its sha256 does not begin with {digest}): remove it"
        raise UserError(f"model.weights {weights}: {damage}")
    return place


def cannot_fetch(what: str, url: str, place: Path, error: Exception) -> str:
    """The same words for all weights that are fetched."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot fetch {what} ({reason}): put {url} at {place}, or give --model.weights FILE (or none)"
