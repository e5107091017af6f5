"""Checkpoints: everything that a run depends on, in files that are whole or not there."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_eurosat import __version__
from hvd_eurosat.config import Config, Model, flatten
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build
from hvd_eurosat.training.files import replacing, write_text

FORMAT = 1
MAY_DIFFER = ("train.epochs", "valid.", "run.")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `epoch` epochs and `step` steps.

    model: state dict with the BatchNorm statistics averaged over the ranks; rank_buffers: float32 [world size, n],
    each rank's own statistics, flattened; config: the resolved configuration (nested keys); digest: of the data's
    content; precision: the one that the run took; history: the events of metrics.jsonl.
    """

    model: dict[str, Tensor]
    optimiser: dict[str, Any]
    rank_buffers: Tensor
    epoch: int
    step: int
    config: dict[str, Any]
    classes: list[str]
    digest: str
    precision: str
    history: list[dict[str, Any]] = field(default_factory=list)

    def build_model(self, device: torch.device) -> LandCoverResNet:
        """The network as it was validated."""
        settings = Model(**self.config["model"])
        model = build(settings.arch, len(self.classes), settings.trainable, seed=0, details=Details.of(settings))
        model.to(device)
        model.load_state_dict(self.model)
        return model

    def check_resumable(self, config: Config, classes: Sequence[str], digest: str) -> None:
        """Raise UserError, by name, if the run would not go on as the same run."""
        was, now = flatten(self.config), config.flat()
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key) and not key.startswith(MAY_DIFFER):
                raise UserError(
                    f"cannot resume: {key} was {was.get(key)!r} and is {now.get(key)!r} now "
                    f"(take it back, or another run.dir)"
                )
        if self.classes != list(classes):
            raise UserError(f"cannot resume: the checkpoint knows the classes {', '.join(self.classes)}")
        if self.digest != digest:
            raise UserError(f"cannot resume: the images of {config.data.root} are not those that the run began with")


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write to a temporary name, sync, rename, sync the folder. Raises RunError where that fails."""
    versions = {"hvd_eurosat": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    content = {"format": FORMAT, "versions": versions, **vars(checkpoint)}
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # as which torch reports a full disk
        raise RunError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is executed. Raises UserError if it is not a whole one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except Exception:  # the reader lets through whatever damaged bytes lead it to
        raise UserError(f"checkpoint {path}: damaged, or not a checkpoint") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"checkpoint {path}: not a checkpoint of this version of hvd_eurosat")
    content.pop("versions", None)
    return Checkpoint(**content)


class CheckpointFolder:
    """`checkpoints/` of a run: the newest `keep`, the best, and last.json and best.json, which name them.

    Each of the two holds file, epoch, step and metric (validation accuracy, a fraction).
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def last(self) -> dict[str, Any] | None:
        """What last.json says, if there is a checkpoint."""
        return self._read("last.json")

    def best(self) -> dict[str, Any] | None:
        """What best.json says, if there is a checkpoint."""
        return self._read("best.json")

    def path(self, note: dict[str, Any]) -> Path:
        """Where the checkpoint is that last.json or best.json names."""
        return self.folder / str(note["file"])

    def add(self, checkpoint: Checkpoint, accuracy: float) -> None:
        """Save, point last.json (and best.json) at it, then remove what neither names and `keep` does not hold."""
        path = self.folder / f"epoch-{checkpoint.epoch:04d}.pt"
        save(checkpoint, path)
        note = json.dumps({"file": path.name, "epoch": checkpoint.epoch, "step": checkpoint.step, "metric": accuracy})
        best = self.best()
        if best is None or accuracy > best["metric"]:
            write_text(self.folder / "best.json", note + "\n")
        write_text(self.folder / "last.json", note + "\n")
        self._remove_old()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            note = json.loads((self.folder / name).read_text())
            return {"file": str(note["file"]), "epoch": int(note["epoch"]), "metric": float(note["metric"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder / name}: unreadable; name a checkpoint with --run.resume FILE") from None

    def _remove_old(self) -> None:
        files = sorted(self.folder.glob("epoch-*.pt"))
        kept = {*files[-self._keep :], *(self.path(note) for note in (self.last(), self.best()) if note)}
        for path in set(files) - kept:
            path.unlink()
