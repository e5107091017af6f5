"""What evaluate, predict, map and export are told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_settings import CliSuppress, CliToggleFlag

from hvd_eurosat.config.reading import read
from hvd_eurosat.config.schema import Data, Model, Number, Place, Probability, Settings, UserPath, Views


class Predictions(Settings):
    """What evaluate and predict have in common."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    top: PositiveInt = 1
    """how many classes of an image predictions.csv names, with their probabilities"""
    skip_bad: CliToggleFlag[bool] = Field(default=False, validation_alias=AliasChoices("skip-bad", "skip_bad"))
    """leave out files that are no usable image, and name them in skipped.csv; without it, any of them is an error"""
    strict: CliToggleFlag[bool] = False
    """with --skip-bad: end with status 3 where files were left out"""
    views: Views | None = None
    """1 or 8, how often each image is shown: as it is, or in its eight flips and turns; default: as in the run that
    saved the checkpoint"""
    raw: CliToggleFlag[bool] = False
    """probabilities without the temperature that was fitted after training"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint. Log-probabilities in bf16 differ by some 0.03 from those in fp32
    and of an exported network"""

    @model_validator(mode="after")
    def _goes_together(self) -> Predictions:
        if self.strict and not self.skip_bad:
            raise ValueError("--strict goes with --skip-bad")
        return self


class EvaluateSettings(Predictions):
    """Tell how good a checkpoint is on a split. Images and precision are those of the run that saved it."""

    split: Literal["train", "valid", "test"] = "test"
    """which images of data.root"""
    input: UserPath | None = None
    """a folder of images to take instead of a split of data.root; with class folders in it there is an accuracy, too"""
    out: UserPath | None = None
    """folder for output_1.h5 (log-probabilities) and predictions.csv; default: they are not written"""
    batch_size: NonNegativeInt = 0
    """images per step; 0: as in the run that saved the checkpoint"""
    against: UserPath | None = None
    """another checkpoint, which is asked about the same images: is either better, by McNemar's test?"""
    data: Place = Place()
    expected: CliSuppress[dict[str, Any]] = Field(default={}, exclude=True)
    """how an rmldnn configuration prepares images and its layers, which must be as in the checkpoint"""


class PredictSettings(Predictions):
    """Predict the class of each image. Images of another size than the network's are resized."""

    input: tuple[UserPath, ...] = ()
    """images, and folders: of images alone, or of class folders, split or not. In a tree of folders every image lies in
    a class folder, as for train and evaluate; images and folders that are named here themselves may lie anywhere"""
    list: UserPath | None = None
    """a file with the path of an image on each line, or - for standard input; these images are named by their paths,
    without a first slash"""
    out: UserPath
    """folder for output_1.h5 (log-probabilities) and predictions.csv (name, file, class, probability); both have the
    same name for an image"""

    @model_validator(mode="after")
    def _has_images(self) -> PredictSettings:
        if not self.input and self.list is None:
            raise ValueError("--input or --list is required")
        return self


class MapSettings(Settings):
    """A land-cover map of whole scenes, larger than memory, over all ranks; the same command goes on with it."""

    checkpoint: UserPath
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt, or best.json or last.json beside it"""
    scene: tuple[UserPath, ...]
    """scenes; files of one band each are one scene, where their names differ in the band alone"""
    out: UserPath
    """folder for the map; of several scenes each gets its own in it"""
    stride: NonNegativeInt = 0
    """pixels from window to window, and from map pixel to map pixel; 0: the side of the network's windows"""
    max_masked: Probability = 0.25
    """a window with a larger share of masked pixels has no class"""
    bands: tuple[str, ...] = ()
    """names of the bands in the scene's file, in its order, where the file has none: B04,B03,B02; - stands for a band
    that is not needed"""
    offset: Number | None = None
    """what was added to the digital numbers, where no metadata say it: 1000 in products of baseline 04.00 or later
    (since January 2022, and older ones processed anew), 0 in others"""
    stretch: tuple[Number, Number] | None = None
    """LOW,HIGH: the digital numbers that become black and white, in place of what the checkpoint's images had"""
    resolution: PositiveFloat | None = None
    """bring the scene to pixels of this many metres first; EuroSAT has 10"""
    mask: str | None = None
    """pixels that do not count: SCL (clouds and shadows of an L2A product), SCL=3,8,9 (these of its classes), another
    band, or a file"""
    probabilities: bool = False
    """write the probabilities of all classes, too: probabilities.tif; the flag without a value means true"""
    min_area: NonNegativeFloat = 0.0
    """in map.geojson areas of fewer hectares go to their largest neighbour"""
    memory: PositiveFloat = 2.0
    """GB that a rank may take for a scene, beside what the network needs"""
    batch_size: NonNegativeInt = 0
    """windows per step at most; 0: as in the run that saved the checkpoint"""
    views: Views | None = None
    """1 or 8, how often each window is shown: as it is, or in its eight flips and turns; default: as in the run that
    saved the checkpoint"""
    raw: CliToggleFlag[bool] = False
    """probabilities without the temperature that was fitted after training"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: as in the run that saved the checkpoint. Log-probabilities in bf16 differ by some 0.03 from those in fp32
    and of an exported network"""
    watchdog_seconds: NonNegativeFloat = 600.0
    """end the job when a rank makes no progress for so long, and name it; 0: never"""


class ExportSettings(Settings):
    """Write a trained network, or one prepared for training, in the format of another tool."""

    checkpoint: UserPath | None = None
    """the checkpoint, runs/NAME/checkpoints/epoch-NNNN.pt; without one, the network that the keys of model describe"""
    format: Literal["keras", "safetensors", "onnx", "deepness", "torch", "pt2"]
    """keras: layers.json and model.h5; safetensors: model.safetensors; onnx: model.onnx; deepness: model.onnx for QGIS'
    plug-in Deepness; torch: model.pt, a state dict; pt2: model.pt2, a program for torch.export.load"""
    out: UserPath
    """folder for the files, a model card (model_card.md) and a STAC item (stac_item.json) among them"""
    with_normalisation: CliToggleFlag[bool] = Field(default=False, alias="with-normalisation")
    """of keras, onnx and pt2: the network takes pixels as they are in files, and normalises them itself"""
    raw: CliToggleFlag[bool] = False
    """leave out the temperature that was fitted after training; without this the head's weights are divided by it"""
    resolution: PositiveFloat = 10.0
    """metres that a pixel of the images covers, as QGIS and the STAC item are told; Sentinel-2's are 10"""
    classes: PositiveInt = 10
    """classes of the network, where there is no checkpoint"""
    data: Data = Data()
    model: Model = Model()

    @property
    def device(self) -> str:
        """It computes nothing."""
        return "cpu"


def evaluate(argv: Sequence[str]) -> EvaluateSettings:
    """The settings that a command line of `evaluate` asks for."""
    return read(EvaluateSettings, argv, "evaluate")


def predict(argv: Sequence[str]) -> PredictSettings:
    """The settings that a command line of `predict` asks for."""
    words, images = _listed("input", argv)
    return read(PredictSettings, words, "predict", **images)


def map_scenes(argv: Sequence[str]) -> MapSettings:
    """The settings that a command line of `map` asks for."""
    words, scenes = _listed("scene", argv)
    words = [re.sub(r"^--(max|min)-(masked|area)\b", r"--\1_\2", word) for word in words]
    return read(MapSettings, _switch("--probabilities", words), "map", **scenes)


def export(argv: Sequence[str]) -> ExportSettings:
    """The settings that a command line of `export` asks for."""
    return read(ExportSettings, argv, "export")


def _switch(flag: str, argv: Sequence[str]) -> list[str]:
    """`flag` alone as `flag true`."""
    words = list(argv)
    if flag in words:
        value = words.index(flag) + 1
        if value == len(words) or words[value].startswith("--"):
            words.insert(value, "true")
    return words


def _listed(key: str, argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The command line without `--key a b`, and {key: [a, b]}, empty where there are none; any file name as it is."""
    words: list[str] = []
    found: list[str] = []
    inside = False
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            inside = flag == f"--{key}"
        if not inside:
            words.append(word)
        elif not word.startswith("--") or equals:
            found.append(value if word.startswith("--") else word)
    return words, {key: found} if found else {}
