"""What is handed on with an exported network: model_card.md for people, stac_item.json for catalogues.

The item has the STAC extension for machine-learning models (MLM 1.4, https://github.com/stac-extensions/mlm).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import hvd_eurosat
from hvd_eurosat.config.schema import flatten
from hvd_eurosat.data.inputs import EUROSAT_CLASSES
from hvd_eurosat.data.tree import read_manifest
from hvd_eurosat.errors import UserError
from hvd_eurosat.run.rendering import between, environment, percent, shown
from hvd_eurosat.run.status import counted
from hvd_eurosat.run.story import Confusion, Story, beginning, read_story
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.scores import calibration_error
from hvd_eurosat.weights.known import KNOWN
from hvd_eurosat.weights.stored import named

CARD, ITEM = "model_card.md", "stac_item.json"
MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
EO = "https://stac-extensions.github.io/eo/v1.1.0/schema.json"
FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
EUROPE = (-25.0, 34.0, 45.0, 72.0)  # west, south, east, north, in degrees: the countries that EuroSAT was taken from
BANDS = (("B04", "red"), ("B03", "green"), ("B02", "blue"))
COMMON_NAMES = {**dict(BANDS), "B01": "coastal", "B08": "nir", "B8A": "nir08", "B09": "nir09", "B10": "cirrus"}
COMMON_NAMES |= {"B05": "rededge", "B06": "rededge", "B07": "rededge", "B11": "swir16", "B12": "swir22"}
TRAINING = ("data", "model", "optim", "train")  # sections of the configuration
WEIGHTS_LICENCES = {
    **{name: f"it began with the weights {name} ({known.licence})" for name, known in KNOWN.items()},
    "none": "it began with random weights, which nobody has a right in",
    "imagenet": "it began with torchvision's ImageNet weights (BSD-3-Clause), of images with terms of their own",
}


@dataclass(frozen=True)
class Kind:
    """A format as others call it: framework, its Python package, the type of the artifact, and its media type."""

    framework: str
    package: str
    artifact: str
    media: str


KINDS = {
    "keras": Kind("Keras", "keras", "tf.keras.Model.save_weights", "application/x-hdf5"),
    "safetensors": Kind("PyTorch", "torch", "safetensors.torch.save_file", "application/octet-stream"),
    "onnx": Kind("ONNX", "onnx", "onnx", "application/octet-stream; application=onnx"),
    "deepness": Kind("ONNX", "onnx", "onnx", "application/octet-stream; application=onnx"),
    "torch": Kind("PyTorch", "torch", "torch.save", "application/octet-stream; application=pytorch"),
    "pt2": Kind("PyTorch", "torch", "torch.export.save", "application/octet-stream; application=pytorch"),
}


@dataclass(frozen=True)
class Export:
    """What was exported. facts: see export.describe; parameters: of the network; files: their names in `folder`.

    saved: the checkpoint at `checkpoint`, both None of a network that was prepared and not trained.
    """

    folder: Path
    format: str
    facts: Mapping[str, Any]
    parameters: int
    files: Sequence[str]
    saved: Checkpoint | None
    checkpoint: Path | None

    @property
    def layout(self) -> tuple[list[int], list[str]]:
        """Shape and dimensions of the input."""
        size, bands = self.facts["image_size"], len(self.facts["bands"])
        if self.format == "keras":
            return [-1, size, size, bands], ["batch", "height", "width", "channel"]
        return [-1, bands, size, size], ["batch", "channel", "height", "width"]

    @property
    def classes(self) -> list[str]:
        """Their names; none of a network that was not trained."""
        return list(self.facts.get("classes", ()))


def write_card(export: Export) -> list[Path]:
    """Write both files beside the network. Raises RunError where that cannot be."""
    from hvd_eurosat.training.files import write_text

    story = story_of(export.checkpoint)
    judged = judgement(export.saved, story)
    bins = story.calibration if story and judged and judged.split == "test" else None
    facts = card(export, story, judged, calibration_error(bins) if bins is not None else None)
    text = environment().get_template("card.md.jinja").render(card=facts)
    write_text(export.folder / CARD, text)
    item = stac_item(export, judged, facts)
    write_text(export.folder / ITEM, json.dumps(item, indent=2) + "\n")
    return [export.folder / CARD, export.folder / ITEM]


def story_of(checkpoint: Path | None) -> Story | None:
    """The run that a checkpoint lies in, if it still does and can be read."""
    folder = named(checkpoint).parent.parent if checkpoint else None
    if not folder or not (folder / "metrics.jsonl").exists():
        return None
    with contextlib.suppress(UserError):
        return read_story(folder)
    return None


def judgement(saved: Checkpoint | None, story: Story | None) -> Confusion | None:
    """How good the checkpoint was found: in the test of its run if it was this one that was tested, else validation."""
    if saved is None or saved.samples:
        return None
    own = [event for event in saved.history if event["event"] == "valid" and event["epoch"] == saved.epoch]
    if story and story.confusion and story.confusion.split == "test" and story.confusion.epoch == saved.epoch:
        theirs = [event for event in story.of("valid") if event["epoch"] == saved.epoch]
        if own and theirs and own[-1] == theirs[-1]:
            return story.confusion
    if not own or "confusion" not in own[-1]:
        return None
    return Confusion("valid", saved.epoch, np.array(own[-1]["confusion"], dtype=np.int64))


# --- for people ---


def card(export: Export, story: Story | None, judged: Confusion | None, off: float | None) -> dict[str, Any]:
    """All that the card says. off: the test's expected calibration error, a fraction 0..1."""
    facts, config = export.facts, flatten(export.saved.config) if export.saved else {}
    names = export.classes
    synthetic = _is_synthetic(config, story)
    rows = []
    if judged:
        for n, name in enumerate(names):
            found, given = judged.of_class(n)
            rows.append({"name": name, "found": found, "given": given, "between": between(*found.interval)})
    return {
        "name": _name(export, story),
        "format": export.format,
        "facts": facts,
        "mean": ", ".join(f"{value:g}" for value in facts["mean"]),
        "std": ", ".join(f"{value:g}" for value in facts["std"]),
        "pixels": "pixel" if facts["dtype"] == "uint16" else "pixel / 255",
        "colours": ", ".join(_colours(facts)),
        "parameters": export.parameters,
        "classes": names,
        "files": [_file(export.folder / name) for name in export.files],
        "layout": ", ".join("N" if n < 0 else str(n) for n in export.layout[0]),
        "software": f"hvd_eurosat {hvd_eurosat.__version__}, {KINDS[export.format].framework}",
        "saved": export.saved,
        "lead": lead(export, judged, synthetic),
        "verdict": verdict(judged) if judged else "",
        "training": _training(export, config, story),
        "data": Path(config["data.root"]).name if config else "",
        "judged": judged,
        "rows": rows,
        "calibration_error": off,
        "caveats": caveats(export.saved, facts) if export.saved else [],
        "synthetic": synthetic,
        "is_eurosat": set(names) == set(EUROSAT_CLASSES) and not synthetic,
        "weights_licence": _weights_licence(config.get("model.weights", "none")),
    }


def lead(export: Export, judged: Confusion | None, synthetic: bool) -> str:
    """What it is, in a paragraph."""
    arch, size = export.facts["arch"], export.facts["image_size"]
    if not export.saved:
        return f"A {arch} prepared for training. **It is not trained: its answers mean nothing yet.**"
    words = [f"A {arch} that gives a whole image of {size}x{size} pixels one of {len(export.classes)} classes."]
    if judged and judged.split == "test":
        right = f"it is right in {percent(judged.all.share)} (95 % interval {between(*judged.all.interval)})"
        words.append(f"On {judged.all.total:,} test images, which it had never seen, {right}.")
    if synthetic:
        words.append("**It was trained on synthetic images, for trying things out: it is of no use for real ones.**")
    return " ".join(words)


def verdict(judged: Confusion) -> str:
    """How good it is on all classes together."""
    split = "test" if judged.split == "test" else "validation"
    counts = f"{judged.all.correct:,} of {judged.all.total:,}, 95 % interval {between(*judged.all.interval)}"
    found = f"{percent(judged.all.share)} of the {split} images are classified rightly: {counts}."
    if split == "test":
        return found
    return f"{found} These images chose the epoch, so with new ones it will be somewhat lower. It was not tested."


def caveats(saved: Checkpoint, facts: Mapping[str, Any]) -> list[str]:
    """In what the network that was judged is another than the one that is exported."""
    views, found = saved.views(None), []
    if views > 1:
        found.append(
            f"It was judged by the mean of {views} views of each image. By one view it is a little less accurate."
        )
    if facts["temperature"] != saved.temperature(views):
        found.append("Its probabilities are not calibrated as those that were judged: it has another temperature.")
    return found


def _is_synthetic(config: Mapping[str, Any], story: Story | None) -> bool:
    if story and (story.status or story.summary):
        return bool(story.status.get("synthetic") or story.summary.get("synthetic"))
    try:
        return read_manifest(Path(config["data.root"])).synthetic if config else False
    except (UserError, OSError):
        return False


def _training(export: Export, config: Mapping[str, Any], story: Story | None) -> list[tuple[str, str]]:
    """What it was trained on and how, by name."""
    if not export.saved:
        return []
    status = story.status if story else {}
    header = status.get("header", {})
    rate = f"{config['optim.name']}, learning rate {config['optim.lr']:g} {config['optim.schedule']}"
    images = status.get("images", {})
    counts = ", ".join(f"{count:,} {split}" for split, count in images.items())
    return [
        ("data", f"{Path(config['data.root']).name}{f': {counts} images' if counts else ''}"),
        ("split", (story and story.split) or f"digest of the images {export.saved.digest[:12]}"),
        ("start", beginning(config)),
        ("optimiser", header.get("optimiser", rate)),
        ("length", f"epoch {export.saved.epoch} of {config['train.epochs']}, {export.saved.step:,} steps"),
        ("batch", f"{config['train.batch_size']} images on each of {counted(len(export.saved.rank_buffers), 'rank')}"),
        ("seed", str(config["train.seed"])),
    ]


def _weights_licence(weights: str) -> str:
    return WEIGHTS_LICENCES.get(weights, f"it began with `{Path(weights).name}`, whose terms hold for it too")


def _file(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"name": path.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _name(export: Export, story: Story | None) -> str:
    if story:
        return story.name
    return f"{export.facts['arch']}, {'trained' if export.saved else 'not trained'}"


# --- for catalogues ---


def stac_item(export: Export, judged: Confusion | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The STAC item. facts: the card's."""
    west, south, east, north = EUROPE
    corners = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    place: dict[str, Any] = {"geometry": None}
    if facts["is_eurosat"]:
        place = {"geometry": {"type": "Polygon", "coordinates": [corners]}, "bbox": list(EUROPE)}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM, EO, FILE],
        "id": re.sub(r"[^A-Za-z0-9_-]+", "-", facts["name"]).strip("-") or "model",
        **place,
        "properties": _properties(export, judged, facts),
        "links": [],
        "assets": _assets(export, facts["files"]),
    }


def _properties(export: Export, judged: Confusion | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    config = flatten(export.saved.config) if export.saved else {}
    weights = config.get("model.weights", "none")
    written = (named(export.checkpoint) if export.checkpoint else export.folder / export.files[0]).stat().st_mtime
    kind = KINDS[export.format]
    what = {key: shown(value) for key, value in config.items() if key.split(".")[0] in TRAINING}
    found: dict[str, Any] = {f"hvd_eurosat:{judged.split}_accuracy": judged.all.share} if judged else {}
    if split := dict(facts["training"]).get("split"):
        found["hvd_eurosat:split"] = split
    return {
        "datetime": f"{datetime.fromtimestamp(written, tz=timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "description": f"A {export.facts['arch']} that classifies images of land cover; {CARD} says more.",
        "mlm:name": re.sub(r"[^A-Za-z0-9_. -]+", "-", f"model {facts['name']}").rstrip("_. -"),
        "mlm:architecture": {"resnet50": "ResNet-50", "resnet18": "ResNet-18"}[export.facts["arch"]],
        "mlm:tasks": ["scene-classification"],
        "mlm:framework": kind.framework,
        "mlm:framework_version": version(kind.package) if kind.package != "keras" else "2.15.0",
        "mlm:total_parameters": export.parameters,
        "mlm:memory_size": 4 * export.parameters,
        "mlm:pretrained": weights != "none",
        "mlm:pretrained_source": None if weights == "none" else Path(weights).name,
        "mlm:input": [_input(export)],
        "mlm:output": [_output(export)],
        **({"mlm:hyperparameters": what} if what else {}),
        **found,
    }


def _colours(facts: Mapping[str, Any]) -> list[str]:
    """Its bands in words, red, green and blue for those three alone."""
    names = dict(BANDS)
    return [names[band] for band in facts["bands"]] if set(facts["bands"]) == set(names) else list(facts["bands"])


def _eo_band(name: str) -> dict[str, str]:
    """With the common name of a band that has one in the extension EO 1.1."""
    common = COMMON_NAMES.get(name)
    return {"name": name, "common_name": common} if common else {"name": name}


def _metres(export: Export) -> str:
    return f"{export.facts['resolution']:g} m"


def _input(export: Export) -> dict[str, Any]:
    facts = export.facts
    shape, dimensions = export.layout
    pairs = zip(facts["mean"], facts["std"], strict=True)
    most = 255 if facts["dtype"] == "uint8" else 1
    scaling = [{"type": "z-score", "mean": most * mean, "stddev": most * std} for mean, std in pairs]
    kind = facts["dtype"] if facts["normalises"] else "float32"
    structure = {"shape": shape, "dim_order": dimensions, "data_type": kind}
    is_rgb = most == 255 and _colours(facts) != facts["bands"]
    before = "pixels of 0 to 255" if most == 255 else facts["unit"]
    described = f"patches of {facts['image_size']} x {facts['image_size']} pixels of {_metres(export)}"
    return {
        "name": "images",
        "description": f"{'RGB ' if is_rgb else ''}{described}; {before} before value_scaling",
        "bands": facts["bands"],
        "input": structure,
        "value_scaling": None if facts["normalises"] else scaling,
        "resize_type": None,
    }


def _output(export: Export) -> dict[str, Any]:
    size, count = export.facts["image_size"], export.facts["outputs"]
    shape, dimensions = [-1, count], ["batch", "class"]
    if export.format == "deepness":
        shape, dimensions = [-1, count, size, size], ["batch", "class", "height", "width"]
    classes = [
        {"value": n, "name": re.sub(r"[^0-9A-Za-z_-]+", "_", name) or str(n), "description": name}
        for n, name in enumerate(export.classes)
    ]
    return {
        "name": "probabilities" if export.format == "deepness" else "log_probabilities",
        "tasks": ["scene-classification"],
        "result": {"shape": shape, "dim_order": dimensions, "data_type": "float32"},
        "classification:classes": classes,
    }


def _assets(export: Export, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The weights are the model; what else there is describes it."""
    kind = KINDS[export.format]
    assets: dict[str, Any] = {}
    for file in files:
        is_model = not file["name"].endswith(".json")
        asset = {"href": f"./{file['name']}", "file:size": file["size"]}
        if is_model:
            asset |= {"type": kind.media, "roles": ["mlm:model", "mlm:weights"], "mlm:artifact_type": kind.artifact}
            asset["eo:bands"] = [_eo_band(name) for name in export.facts["bands"]]
        else:
            asset |= {"type": "application/json", "roles": ["metadata"], "title": "the layers, for model_from_json"}
        assets["model" if is_model else "layers"] = asset
    assets["card"] = {"href": f"./{CARD}", "type": "text/markdown", "roles": ["metadata"], "title": "model card"}
    return assets
