"""What goes with an exported network: its card, its STAC item, and what ONNX' runtime, QGIS and torch make of it.

The network is small, for nothing here is of its size: exporting it as a graph takes a second and not four.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvd_eurosat.config.schema import Config, Data, Model, Valid
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.data.augment import normalise
from hvd_eurosat.data.sample import SCENES
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import LandCoverResNet, build
from tests.unit.conftest import narrow, saved_checkpoint
from tests.unit.runs import CLASSES, epoch_events, grow_run

SCHEMA = Path(__file__).with_name("schemas") / "mlm_item.json"
PIXELS: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
SMALL = Model(arch="resnet18", trainable="all", weights="none")


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with narrow(depths=[1, 1, 1, 1]):
        yield


@pytest.fixture(scope="module")
def network() -> LandCoverResNet:
    return build("resnet18", 3, "all", seed=0).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, network: LandCoverResNet) -> Path:
    """Of the third epoch of a run that was tested; its best.json names it."""
    run = grow_run(tmp_path_factory.mktemp("runs") / "first")
    history = [event for epoch in (1, 2, 3) for event in epoch_events(epoch)]
    facts: dict[str, Any] = {"history": history, "image_side": 64}
    path = run / "checkpoints" / "epoch-0003.pt"
    saved_checkpoint(path, network, CLASSES, SMALL, Data(root=Path("data/Patches")), **facts)
    best = {"file": path.name, "epoch": 3, "step": 30, "metric": 0.8}
    (path.parent / "best.json").write_text(json.dumps(best))
    return path.parent / "best.json"


def exported(folder: Path, checkpoint: Path | None, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The card and the item."""
    export(ExportSettings.model_validate({"checkpoint": checkpoint, "format": kind, "out": folder, **more}))
    return (folder / "model_card.md").read_text(), json.loads((folder / "stac_item.json").read_text())


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Folder, card and item of a plain export of the tested checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *exported(folder, checkpoint, "torch")


def ours(network: LandCoverResNet) -> NDArray[np.float32]:
    with torch.no_grad():
        return network(normalise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), Data())).numpy()


def problems(item: dict[str, Any]) -> list[str]:
    from jsonschema import Draft7Validator

    schema = json.loads(SCHEMA.read_text())
    Draft7Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(item)]


def test_the_card_of_a_tested_network(plain: tuple[Path, str, dict[str, Any]]) -> None:
    """The test's figures are those of the checkpoint that was tested, and of no other."""
    _, card, item = plain
    for words in (
        "# Model card: first",
        "On 180 test images, which it had never seen, it is right in 93.33 % (95 % interval 88.7 to 96.1 %).",
        "| data | Patches: 900 train, 180 valid, 180 test images |",
        "| Pasture | 60 | 80.00 % | 68.2 to 88.2 % | 100.00 % |",
        "| River | 60 | 100.00 % | 94.0 to 100.0 % | 83.33 % |",
        "expected calibration error 0.",
        "random weights, which nobody has a right in",
        "terms of their owner",
    ):
        assert words in card, words
    assert "Europe" not in card
    for table in ("| | |", "| class |"):
        assert all(before.endswith("\n\n") for before in card.split(table)[:-1]), "a table follows an empty line"
    assert item["properties"]["hvd_eurosat:test_accuracy"] == pytest.approx(168 / 180)
    assert (item["id"], item["geometry"]) == ("first", None)


def test_the_card_of_a_network_that_was_not_tested(network: LandCoverResNet, tmp_path: Path) -> None:
    path = tmp_path / "alone.pt"
    events = epoch_events(3)
    saved_checkpoint(path, network, CLASSES, SMALL, history=events)
    card, item = exported(tmp_path / "out", path, "safetensors")
    assert "of the validation images are classified rightly: 168 of 180" in card
    assert "It was not tested." in card
    assert "Calibration: not measured." in card
    assert "hvd_eurosat:valid_accuracy" in item["properties"]


@pytest.mark.parametrize(
    ("views", "raw", "other_views", "other_temperature"),
    [(1, False, False, False), (1, True, False, True), (8, False, True, True)],
)
def test_a_network_that_is_not_quite_the_one_that_was_judged(
    network: LandCoverResNet, tmp_path: Path, views: int, raw: bool, other_views: bool, other_temperature: bool
) -> None:
    path, valid = tmp_path / "alone.pt", Valid(views=views)
    config = Config(model=SMALL, valid=valid).model_dump(mode="json")
    facts: dict[str, Any] = {"history": epoch_events(3), "config": config, "temperatures": {1: 1.5, 8: 1.25}}
    saved_checkpoint(path, network, CLASSES, SMALL, **facts)
    card, _ = exported(tmp_path / "out", path, "safetensors", raw=raw)
    assert ("by the mean of 8 views" in card) == other_views
    assert ("another temperature" in card) == other_temperature


def test_the_card_of_eurosat(network: LandCoverResNet, tmp_path: Path) -> None:
    ten = build("resnet18", 10, "all", seed=0)
    saved_checkpoint(tmp_path / "alone.pt", ten, list(SCENES), SMALL, image_side=64)
    card, item = exported(tmp_path, tmp_path / "alone.pt", "torch")
    for words in ("Sentinel-2 L1C", "34 European countries", "pixels of 10 m", "Copernicus Sentinel data", "MIT"):
        assert words in card, words
    assert item["bbox"] == [-25, 34, 45, 72]
    assert problems(item) == []


def test_the_card_of_a_network_that_was_not_trained(tmp_path: Path) -> None:
    card, item = exported(tmp_path, None, "torch", model=SMALL, classes=4)
    assert "**It is not trained: its answers mean nothing yet.**" in card
    assert problems(item) == []
    assert item["properties"]["mlm:output"][0]["result"]["shape"] == [-1, 4]


def test_names_in_a_card_stay_in_their_cells(network: LandCoverResNet, tmp_path: Path) -> None:
    saved_checkpoint(tmp_path / "alone.pt", network, ["a|b", "<c>", "d\ne"], SMALL, history=epoch_events(3))
    card, item = exported(tmp_path, tmp_path / "alone.pt", "torch")
    assert "| classes | a\\|b, &lt;c>, d e |" in card
    assert [one["name"] for one in item["properties"]["mlm:output"][0]["classification:classes"]] == [
        "a_b",
        "_c_",
        "d_e",
    ]
    assert problems(item) == []


def test_the_item_says_how_images_become_input(plain: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, item = plain
    assert problems(item) == []
    properties = item["properties"]
    (given,) = properties["mlm:input"]
    assert given["bands"] == [band["name"] for band in item["assets"]["model"]["eo:bands"]] == ["B04", "B03", "B02"]
    structure = {"shape": [-1, 3, 64, 64], "dim_order": ["batch", "channel", "height", "width"]}
    assert given["input"] == structure | {"data_type": "float32"}
    scaled = [(PIXELS[..., n] - one["mean"]) / one["stddev"] for n, one in enumerate(given["value_scaling"])]
    expected = normalise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), Data()).numpy()
    assert np.allclose(np.stack(scaled, axis=1), expected, atol=1e-5)
    assert properties["mlm:total_parameters"] == sum(
        p.numel() for p in build("resnet18", 3, "all", seed=0).parameters()
    )
    assert (properties["mlm:pretrained"], properties["mlm:pretrained_source"]) == (False, None)
    model = item["assets"]["model"]
    assert (folder / model["href"]).stat().st_size == model["file:size"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda item: item["properties"].pop("mlm:input"), "'mlm:input' is a required property"),
        (lambda item: item["assets"]["model"].pop("mlm:artifact_type"), "'mlm:artifact_type' is a required property"),
        (lambda item: item["properties"].update({"mlm:nonsense": 1}), "mlm:nonsense"),
        (lambda item: item["properties"].update({"mlm:name": "-"}), "does not match"),
        (lambda item: item["properties"]["mlm:input"][0]["input"].update(data_type="float"), "is not one of"),
    ],
)
def test_the_schema_finds_mistakes(plain: tuple[Path, str, dict[str, Any]], change: Any, problem: str) -> None:
    item = copy.deepcopy(plain[2])
    change(item)
    assert any(problem in found for found in problems(item))


def test_deepness_maps_tiles(checkpoint: Path, tmp_path: Path, network: LandCoverResNet) -> None:
    """As its documentation says and its code does: pixels / 255, standardised by the metadata, [N, C, S, S] in, a map
    of probabilities out, whose most probable class each pixel is given.
    """
    import onnxruntime

    _, item = exported(tmp_path, checkpoint, "deepness")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    notes = {
        key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items() if key in KEYS
    }
    assert notes["model_type"] == "Segmentor"
    assert notes["class_names"] == {str(n): name for n, name in enumerate(CLASSES)}
    assert (notes["resolution"], notes["tile_size"], notes["tiles_size"], notes["tiles_overlap"]) == (1000, 64, 64, 50)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert given.shape[1:] == [3, 64, 64]
    assert made.shape[1:] == [3, 64, 64]
    tiles = (PIXELS / 255 - notes["standardization_mean"]) / notes["standardization_std"]
    (maps,) = session.run(None, {given.name: tiles.transpose(0, 3, 1, 2).astype(np.float32)})
    assert maps.shape == (5, 3, 64, 64)
    assert np.allclose(maps, np.exp(ours(network))[:, :, None, None], atol=1e-4)
    maps[maps < notes["seg_thresh"]] = 0
    assert np.array_equal(maps.argmax(1)[:, 0, 0], ours(network).argmax(1))
    assert problems(item) == []


KEYS = {
    "model_type", "class_names", "resolution", "tile_size", "tiles_size", "tiles_overlap", "seg_thresh",
    "standardization_mean", "standardization_std",
}  # fmt: skip


def test_onnx(network: LandCoverResNet, tmp_path: Path) -> None:
    import onnxruntime

    data = Data(resize=72, center_crop=64)
    path = saved_checkpoint(tmp_path / "alone.pt", network, CLASSES, SMALL, data)
    exported(tmp_path, path, "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7, 64):
        images = torch.randn(count, 3, 64, 64)
        (theirs,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            assert np.abs(theirs - network(images).numpy()).max() < 1e-4
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert [json.loads(facts[key]) for key in ("resize", "center_crop", "image_size")] == [72, 64, 64]


def test_onnx_normalises_pixels_itself(checkpoint: Path, tmp_path: Path, network: LandCoverResNet) -> None:
    import onnxruntime

    card, item = exported(tmp_path, checkpoint, "onnx", **{"with-normalisation": True})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": PIXELS.transpose(0, 3, 1, 2)})
    assert np.abs(found - ours(network)).max() < 1e-4
    assert "standardization_mean" not in session.get_modelmeta().custom_metadata_map
    assert item["properties"]["mlm:input"][0]["input"]["data_type"] == "uint8"
    assert problems(item) == []
    assert "uint8 pixels, normalised by the network itself" in card


def test_an_exported_program(checkpoint: Path, tmp_path: Path, network: LandCoverResNet) -> None:
    _, item = exported(tmp_path, checkpoint, "pt2", **{"with-normalisation": True})
    extra = {"facts.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["facts.json"])["classes"] == CLASSES
    pixels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    found = program.module()(pixels)
    assert np.abs(found.detach().numpy() - ours(network)).max() < 1e-4
    assert problems(item) == []


@pytest.mark.parametrize(("kind", "why"), [("torch", "hold weights alone"), ("deepness", "it does so by itself")])
def test_normalisation_where_there_is_no_graph(checkpoint: Path, tmp_path: Path, kind: str, why: str) -> None:
    with pytest.raises(UserError, match=f"--with-normalisation is for keras, onnx, pt2, not for {kind}: .*{why}"):
        exported(tmp_path / "out", checkpoint, kind, **{"with-normalisation": True})
    assert not (tmp_path / "out").exists()


def test_resolution_of_what_the_network_sees(network: LandCoverResNet, tmp_path: Path) -> None:
    """Files of 128 pixels of 5 m, brought to 96, of which the middle 64 are shown at 32: 20 / 3 m, then 40 / 3 m."""
    data = Data(image_size=32, resize=96, center_crop=64)
    saved_checkpoint(tmp_path / "alone.pt", network, CLASSES, SMALL, data, image_side=128)
    _, item = exported(tmp_path, tmp_path / "alone.pt", "torch", resolution=5)
    assert "pixels of 13.3333 m" in item["properties"]["mlm:input"][0]["description"]
