"""A checkpoint's files: FILE.pt (tensors and settings), FILE.json (what it is, and its digest), the frozen weights.

The weights that do not train are written once, as safetensors, and named by every checkpoint that goes with them.
The .json is written last: where it stands, the checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvd_eurosat.errors import UserError

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Blob(BaseModel):
    """A file beside the .json, by its name, size in bytes and sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    size: int
    sha256: str

    @staticmethod
    def of(file: str, content: bytes) -> Blob:
        """What to note of a file."""
        return Blob(file=file, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read(self, folder: Path) -> bytes:
        """The file's bytes. Raises UserError unless they are the ones that were written."""
        path = folder / self.file
        if Path(self.file).name != self.file:
            raise UserError(f"checkpoint {folder}: {self.file!r} is not a file beside it")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
        if Blob.of(self.file, content) != self:
            raise UserError(f"checkpoint {path}: damaged (its sha256 is not the one in the .json)")
        return content


class Record(BaseModel):
    """What a checkpoint's .json says, for people and programs.

    epoch: completed ones; step: optimiser steps in all; samples: seen of the epoch in progress; metric: validation
    accuracy (a fraction), where the checkpoint was validated; temperatures: fitted after training, by the number of
    views that an image is shown in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    epoch: int
    step: int
    samples: int
    metric: float | None
    world_size: int
    content: Blob
    frozen: Blob | None
    versions: dict[str, str]
    temperatures: dict[int, Temperature] = {}


def named(path: Path) -> Path:
    """The checkpoint that best.json or last.json names; any other path is the checkpoint itself."""
    if path.name not in ("best.json", "last.json"):
        return path
    try:
        return path.parent / Path(str(json.loads(path.read_bytes())["file"])).name
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {path}: names no checkpoint") from None


def read_record(path: Path) -> Record:
    """What FILE.json says. Raises UserError if it is missing or damaged."""
    try:
        return Record.model_validate_json(path.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        missing = path if not path.exists() else path.with_suffix(".json")
        raise UserError(f"checkpoint {missing}: No such file or directory") from None
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except ValidationError:
        raise UserError(f"checkpoint {path.with_suffix('.json')}: damaged, or not of this version") from None


def has_record(path: Path) -> bool:
    """Whether FILE.json is a checkpoint's, and not some other file of the same name."""
    try:
        read_record(path)
    except UserError:
        return False
    return True


def read_content(path: Path, frozen: bool = True) -> dict[str, Any]:
    """What is in FILE.pt, "model" with its frozen weights if wanted; every byte verified, nothing executed.

    Raises UserError where a file is missing or damaged, or holds more than tensors and plain values.
    """
    path = named(path)
    record = read_record(path)
    if record.content.file != path.name:
        raise UserError(f"checkpoint {path}: its .json belongs to {record.content.file}")
    content = record.content.read(path.parent)
    beside = record.frozen.read(path.parent) if record.frozen and frozen else None
    try:
        fields = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        if beside:
            fields["model"] = {**safetensors.torch.load(beside), **fields["model"]}
    except Exception:  # the readers let through whatever a forged file leads them to
        raise UserError(f"checkpoint {path}: not a checkpoint") from None
    return fields
