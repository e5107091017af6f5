"""What evaluate, predict and export are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import CliSuppress

from hvd_eurosat.config.reading import read
from hvd_eurosat.config.schema import Data, Model, Place, Settings, UserPath


class EvaluateSettings(Settings):
    """Tell how good a checkpoint is on a split. Images and precision are those of the run that saved it."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    split: Literal["train", "valid", "test"] = "test"
    """which images of data.root"""
    input: UserPath | None = None
    """a folder of images to take instead of a split of data.root; with class folders in it there is an accuracy, too"""
    out: UserPath | None = None
    """folder for output_1.h5 (log-probabilities) and predictions.csv; default: they are not written"""
    batch_size: NonNegativeInt = 0
    """images per step; 0: as in the run that saved the checkpoint"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint. Log-probabilities in bf16 differ by some 0.03 from those in fp32
    and of an exported network"""
    data: Place = Place()
    expected: CliSuppress[dict[str, Any]] = Field(default={}, exclude=True)
    """how an rmldnn configuration prepares images and its layers, which must be as in the checkpoint"""


class PredictSettings(Settings):
    """Predict the class of each image. Images of another size than the network's are resized."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    input: tuple[UserPath, ...]
    """images, and folders of images, with their subfolders"""
    out: UserPath
    """folder for output_1.h5 (log-probabilities) and predictions.csv (file, class, probability)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint. Log-probabilities in bf16 differ by some 0.03 from those in fp32
    and of an exported network"""


class ExportSettings(Settings):
    """Write a trained network, or one prepared for training, in the format of another tool."""

    checkpoint: UserPath | None = None
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt; without one, the network that the keys of model describe"""
    format: Literal["keras", "safetensors", "onnx", "torch"]
    """keras: layers.json and model.h5; safetensors: model.safetensors; onnx: model.onnx; torch: model.pt"""
    out: UserPath
    """folder for the files"""
    classes: PositiveInt = 10
    """classes of the network, where there is no checkpoint"""
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
