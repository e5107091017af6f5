"""What evaluate, predict and export are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import CliSuppress, CliToggleFlag

from hvd_eurosat.config.reading import read
from hvd_eurosat.config.schema import Data, Model, Place, Settings, UserPath, Views


class EvaluateSettings(Settings):
    """How good a checkpoint is on a split; images are prepared and computed with as in the run that saved it."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    split: Literal["train", "valid", "test"] = "test"
    """which images"""
    input: UserPath | None = None
    """a folder of class folders to take instead of a split of data.root; without those there is no accuracy"""
    out: UserPath | None = None
    """folder for output_1.h5 (log-probabilities) and predictions.csv, if they are wanted"""
    batch_size: NonNegativeInt = 0
    """images per step; 0: as in the run that saved the checkpoint"""
    views: Views | None = None
    """1 or 8, how often each image is shown: as it is, or in its eight flips and turns; default: as in the run that
    saved the checkpoint"""
    raw: CliToggleFlag[bool] = False
    """probabilities without the temperature that was fitted after training"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint; bf16 differs from fp32, and from an exported network, by some 0.03
    in log-probabilities"""
    against: UserPath | None = None
    """another checkpoint, which is asked about the same images: is either better, by McNemar's test?"""
    data: Place = Place()
    expected: CliSuppress[dict[str, Any]] = Field(default={}, exclude=True)
    """how an rmldnn configuration prepares images and its layers, which must be as in the checkpoint"""


class PredictSettings(Settings):
    """The class of each image in files and folders; images of another size than the network's are resized."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    input: tuple[UserPath, ...]
    """images, and folders of images, searched with their subfolders"""
    out: UserPath
    """folder for output_1.h5 (log-probabilities) and predictions.csv (file, class, probability)"""
    views: Views | None = None
    """1 or 8, how often each image is shown: as it is, or in its eight flips and turns; default: as in the run that
    saved the checkpoint"""
    raw: CliToggleFlag[bool] = False
    """probabilities without the temperature that was fitted after training"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint; bf16 differs from fp32, and from an exported network, by some 0.03
    in log-probabilities"""


class ExportSettings(Settings):
    """A trained network, or one prepared for training, in the formats of other tools."""

    checkpoint: UserPath | None = None
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt; without one, the network that model.* describes"""
    format: Literal["keras", "safetensors", "onnx", "torch"]
    """keras: layers.json and model.h5; safetensors: model.safetensors; onnx: model.onnx; torch: model.pt"""
    out: UserPath
    """folder for the files"""
    raw: CliToggleFlag[bool] = False
    """without the temperature that was fitted after training; else the head's weights are divided by it"""
    classes: PositiveInt = 10
    """units of the head, where there is no checkpoint"""
    data: Data = Data()
    model: Model = Model()


def evaluate(argv: Sequence[str]) -> EvaluateSettings:
    """The settings that a command line of `evaluate` asks for."""
    return read(EvaluateSettings, argv, "evaluate")


def predict(argv: Sequence[str]) -> PredictSettings:
    """The settings that a command line of `predict` asks for."""
    return read(PredictSettings, _as_list("--input", argv), "predict")


def export(argv: Sequence[str]) -> ExportSettings:
    """The settings that a command line of `export` asks for."""
    return read(ExportSettings, argv, "export")


def _as_list(flag: str, argv: Sequence[str]) -> list[str]:
    """`flag a b` with its words as a list in JSON, which takes any file name as it is."""
    words = list(argv)
    if flag in words:
        first = words.index(flag) + 1
        end = next((n for n in range(first, len(words)) if words[n].startswith("--")), len(words))
        words[first:end] = [json.dumps(words[first:end])] if end > first else []
    return words
