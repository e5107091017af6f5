"""Write a trained network, or one prepared for training, in the format of another tool, with a card.

python -m hvd_eurosat.export --checkpoint runs/finetune/checkpoints/best.json --format keras --out exported
python -m hvd_eurosat.export --model.weights imagenet --format keras --out prepared
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.export)  # before the imports below, which take seconds

from typing import Any

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.bands import RGB, canonical
from hvd_eurosat.data.inputs import IMAGENET_MEAN, IMAGENET_STD, PICTURES, Inputs
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build, count_parameters
from hvd_eurosat.run.card import Export, write_card
from hvd_eurosat.run.display import Display
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.files import make_folder, replacing
from hvd_eurosat.weights import exporters
from hvd_eurosat.weights.known import normalised
from hvd_eurosat.weights.loading import Taken, load_weights
from hvd_eurosat.weights.settle import settle

WRITERS = {
    "keras": {"model.h5": exporters.keras_weights, "layers.json": exporters.keras_layers},
    "safetensors": {"model.safetensors": exporters.safetensors_file},
    "onnx": {"model.onnx": exporters.onnx_file},
    "deepness": {"model.onnx": exporters.deepness_file},
    "torch": {"model.pt": exporters.torch_file},
    "pt2": {"model.pt2": exporters.exported_program},
}
NORMALISING = ("keras", "onnx", "pt2")


def main(world: World, settings: ExportSettings) -> None:
    """Rank 0 writes; others, should there be any, wait."""
    lines = world.on_main(lambda: export(settings))
    Display(world.is_main).say("\n".join(lines))


def export(settings: ExportSettings) -> list[str]:
    """Write the files; a line for each. Raises UserError, having written nothing, where that cannot be."""
    told = settings.model, settings.data.bands, images(settings.data)
    if settings.checkpoint and told != (Model(), (), images(Data())):
        raise UserError("--checkpoint says all about its network and images: leave out model.* and data.*")
    if settings.with_normalisation and settings.format not in NORMALISING:
        why = "it does so by itself" if settings.format == "deepness" else "the others hold weights alone"
        raise UserError(f"--with-normalisation is for {', '.join(NORMALISING)}, not for {settings.format}: {why}")
    saved, taken = checkpoint.load(settings.checkpoint) if settings.checkpoint else None, Taken()
    if saved:
        model, facts = trained(saved, settings)
    else:
        model, facts, taken = prepared(settings)
    if settings.format == "keras" and facts["arch"] != "resnet50":
        raise UserError(f"--format keras is for resnet50, and this network is a {facts['arch']}")
    if settings.format == "deepness" and facts["bands"] != list(RGB):
        raise UserError(f"--format deepness is for red, green and blue; this network takes {', '.join(facts['bands'])}")
    make_folder(settings.out, "--out")
    writers = WRITERS[settings.format]
    for name, write in writers.items():
        with replacing(settings.out / name) as file:
            write(model, facts, file)
    parameters, _ = count_parameters(model)
    done = Export(settings.out, settings.format, facts, parameters, list(writers), saved, settings.checkpoint)
    notes = [f"model.weights {settings.model.weights}: {taken.line}"] if taken.line else []
    notes += ["the head that is written is random"] if taken.lacking else []
    return [*notes, *(f"wrote {path}" for path in [*(settings.out / name for name in writers), *write_card(done)])]


def trained(saved: Checkpoint, settings: ExportSettings) -> tuple[LandCoverResNet, dict[str, Any]]:
    """The network of a checkpoint, its temperature in the head unless `raw`, and what its user must know."""
    model = saved.build_model(torch.device("cpu"))
    temperature = 1.0 if settings.raw else saved.temperature(views=1)
    for parameter in model.fc.parameters():
        parameter.data /= temperature
    facts = {"classes": saved.classes, "epoch": saved.epoch, "temperature": temperature, "config": saved.config}
    side = saved.image_side or saved.data.image_size
    return model, describe(model, saved.config["model"]["arch"], saved.data, settings, side, saved.wants) | facts


def prepared(settings: ExportSettings) -> tuple[LandCoverResNet, dict[str, Any], Taken]:
    """The network as training would begin with it, what its user must know, and what of the weights was taken."""
    size = settings.data.image_size
    if not size:
        raise UserError("data.image_size 0, the images' own, is for train: give the size")
    if settings.data.bands:
        raise UserError("data.bands is for train: without a checkpoint the network takes red, green and blue")
    chosen = settle(settings.model, settings.classes, settings.data.input_side)
    model = build(chosen.arch, settings.classes, chosen.trainable, seed=0, details=Details.of(chosen))
    data = normalised(settings.data, chosen.weights, inputs=None)
    taken = load_weights(model, chosen)
    return model, describe(model, chosen.arch, data, settings, size, PICTURES), taken


def describe(
    model: LandCoverResNet, arch: str, data: Data, settings: ExportSettings, side: int, wants: Inputs
) -> dict[str, Any]:
    """What an export says of itself: arch, variant, bn_epsilon, and how images become its input.

    side: of the images' files in pixels; resolution: metres that a pixel of the network's input covers; bands, unit and
    dtype: of its pixels before mean and std.
    """
    first = data.resize or side
    resolution = settings.resolution * side / first * (data.center_crop or first) / data.image_size
    network = {"arch": arch, "variant": model.details.variant, "bn_epsilon": model.details.epsilon}
    inputs = {"normalises": settings.with_normalisation, "resolution": resolution, "outputs": model.fc.out_features}
    pixels = {"bands": [canonical(name) for name in wants.bands], "unit": wants.unit, "dtype": wants.dtype}
    return {**network, **images(data), **pixels, **inputs}


def images(data: Data) -> dict[str, Any]:
    """What the network was shown: images at `resize`, the middle `center_crop` of them (0: not that), at `image_size`,

    then at `input_size`; mean and std of their pixels, which are 0..1 where they are 8-bit.
    """
    sides = {"resize": data.resize, "center_crop": data.center_crop, "image_size": data.image_size}
    sides |= {"input_size": data.input_side}
    return {**sides, "mean": list(data.mean or IMAGENET_MEAN), "std": list(data.std or IMAGENET_STD)}


if __name__ == "__main__":
    job.run(verbs.export, main)
