"""Write a trained network, or one prepared for training, in the format of another tool.

python -m hvd_eurosat.export --checkpoint runs/finetune/checkpoints/best.json --format keras --out exported
python -m hvd_eurosat.export --model.weights imagenet --format keras --out prepared
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.export)  # before the imports below, which take seconds

from pathlib import Path
from typing import Any

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build
from hvd_eurosat.run.display import Display
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.files import make_folder, replacing
from hvd_eurosat.weights import exporters
from hvd_eurosat.weights.loading import load_weights
from hvd_eurosat.weights.settle import settle

WRITERS = {
    "keras": {"model.h5": exporters.keras_weights, "layers.json": exporters.keras_layers},
    "safetensors": {"model.safetensors": exporters.safetensors_file},
    "onnx": {"model.onnx": exporters.onnx_file},
    "torch": {"model.pt": exporters.torch_file},
}


def main(world: World, settings: ExportSettings) -> None:
    """Rank 0 writes; others, should there be any, wait."""
    lines = world.on_main(lambda: export(settings))
    Display(world.is_main).say("\n".join(lines))


def export(settings: ExportSettings) -> list[str]:
    """Write the files; a line for each. Raises UserError, having written nothing, where that cannot be."""
    if settings.checkpoint and (settings.model, images(settings.data)) != (Model(), images(Data())):
        raise UserError("--checkpoint says all about its network and images: leave out model.* and data.*")
    lacking = ""
    if settings.checkpoint:
        model, facts = trained(settings.checkpoint)
    else:
        model, facts, lacking = prepared(settings)
    if settings.format == "keras" and facts["arch"] != "resnet50":
        raise UserError(f"--format keras is for resnet50, and this network is a {facts['arch']}")
    make_folder(settings.out, "--out")
    for name, write in WRITERS[settings.format].items():
        with replacing(settings.out / name) as file:
            write(model, facts, file)
    notes = [f"model.weights {settings.model.weights}: {lacking}; the one written is random"] if lacking else []
    return [*notes, *(f"wrote {settings.out / name}" for name in WRITERS[settings.format])]


def trained(path: Path) -> tuple[LandCoverResNet, dict[str, Any]]:
    """The network of a checkpoint, and what its user must know."""
    saved = checkpoint.load(path)
    model = saved.build_model(torch.device("cpu"))
    facts = {"classes": saved.classes, "epoch": saved.epoch, "config": saved.config}
    return model, describe(model, saved.config["model"]["arch"], saved.data) | facts


def prepared(settings: ExportSettings) -> tuple[LandCoverResNet, dict[str, Any], str]:
    """The network as training would begin with it, what its user must know, and why it has a head of its own."""
    if not settings.data.image_size:
        raise UserError("data.image_size 0, the images' own, is for train: give the size")
    chosen = settle(settings.model, settings.classes, settings.data.image_size)
    model = build(chosen.arch, settings.classes, chosen.trainable, seed=0, details=Details.of(chosen))
    lacking = load_weights(model, chosen)
    return model, describe(model, chosen.arch, settings.data), lacking


def describe(model: LandCoverResNet, arch: str, data: Data) -> dict[str, Any]:
    """What an export says of itself: arch, variant, bn_epsilon, and how images become its input."""
    return {"arch": arch, "variant": model.details.variant, "bn_epsilon": model.details.epsilon, **images(data)}


def images(data: Data) -> dict[str, Any]:
    """What the network was shown: images at `resize`, the middle `center_crop` of them (0: not that), at `image_size`;

    of their pixels of 0..1 mean and std.
    """
    sides = {"resize": data.resize, "center_crop": data.center_crop, "image_size": data.image_size}
    return {**sides, "mean": list(data.mean), "std": list(data.std)}


if __name__ == "__main__":
    job.run(verbs.export, main)
