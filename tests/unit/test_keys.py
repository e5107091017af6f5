"""No key of the configuration is ignored: each is named beside a test that fails if it is.

TRAINING: keys that change what training computes, and what of it; a few steps with and without each (tests/reference/
product.py). PACKED: keys that change the packed images. JOB: keys that one whole run shows, each by its own trace.
ELSEWHERE: keys that another test takes care of.
"""

from __future__ import annotations

import ast
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_eurosat import train
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Model, Valid
from hvd_eurosat.data.batches import open_images
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build
from hvd_eurosat.run.directory import RunDirectory
from hvd_eurosat.run.journal import Journal
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.training import checkpoint, step
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from hvd_eurosat.weights.keras_graph import HEAD
from hvd_eurosat.weights.keras_json import write_layers
from hvd_eurosat.weights.settle import settle
from tests.parallel.conftest import events, summary
from tests.reference import cases, product
from tests.reference.product import Trained

ROOT = Path(__file__).parents[2]
CLASSES = ("Forest", "River")


class Row(NamedTuple):
    """A key, another value, what must differ, and the setting in which it matters."""

    key: str
    value: object
    facet: str
    setting: dict[str, Any] = {}  # noqa: RUF012


BASE: dict[str, Any] = {
    "data.image_size": 32,
    "data.augment": False,
    "model.arch": "resnet18",
    "model.weights": "none",
    "optim.name": "sgd",
    "optim.lr": 0.01,
    "optim.schedule": "constant",
    "train.epochs": 1,
    "train.batch_size": 4,
    "train.precision": "fp32",
    "valid.batch_size": 7,
    "run.verify_interval": 0,
}
ADAM, EPOCHS = {"optim.name": "adam"}, {"train.epochs": 2}
WARM = {"optim.warmup_epochs": 0.5, "optim.schedule": "cosine"}
TRAINING = [
    Row("data.input_size", 48, "images"),
    Row("data.mean", (0.1, 0.2, 0.3), "images"),
    Row("data.std", (0.1, 0.2, 0.3), "images"),
    Row("data.augment", True, "images"),
    Row("data.max_shift", 3, "images", {"data.augment": True}),
    Row("data.random_horizontal_flip", 1.0, "images"),
    Row("data.random_vertical_flip", 1.0, "images"),
    Row("data.random_rotate", 30.0, "images"),
    Row("data.jitter_crop", 0.3, "images"),
    Row("data.random_zoom", 0.3, "images"),
    Row("data.random_brightness", 0.4, "images"),
    Row("data.random_contrast", 0.4, "images"),
    Row("data.random_gain", 0.4, "images"),
    Row("data.random_erase", 1.0, "images"),
    Row("optim.name", "adam", "weights"),
    Row("optim.lr", 0.02, "rates"),
    Row("optim.momentum", 0.5, "weights"),
    Row("optim.nesterov", False, "weights"),
    Row("optim.beta1", 0.5, "weights", ADAM),
    Row("optim.beta2", 0.9, "weights", ADAM),
    Row("optim.eps", 0.1, "weights", ADAM),
    Row("optim.amsgrad", True, "weights", {**ADAM, "optim.beta2": 0.1}),
    Row("optim.trust", 0.1, "weights", {"optim.name": "lars"}),
    Row("optim.weight_decay", 0.1, "weights"),
    Row("optim.layer_decay", 0.5, "weights", {"model.trainable": "all"}),
    Row("optim.unfreeze_epochs", 1, "weights", {"model.trainable": "all", "optim.schedule_epochs": 6}),
    Row("optim.schedule", "cosine", "rates"),
    Row("optim.gamma", 0.5, "rates", {**EPOCHS, "optim.schedule": "exponential"}),
    Row("optim.step_size", 1, "rates", {**EPOCHS, "optim.schedule": "step"}),
    Row(
        "optim.milestones", (1,), "rates", {"train.epochs": 3, "optim.schedule": "multistep", "optim.milestones": (2,)}
    ),
    Row("optim.warmup_epochs", 0.5, "rates"),
    Row("optim.warmup_start", 0.5, "rates", WARM),
    Row("optim.warmup_stairs", True, "rates", {**WARM, **EPOCHS, "optim.warmup_epochs": 1.5}),
    Row("optim.schedule_epochs", 4, "rates", {"optim.schedule": "cosine"}),
    Row("optim.lr_scaling", "linear", "rates"),
    Row("optim.reference_batch", 2, "rates", {"optim.lr_scaling": "sqrt"}),
    Row("optim.compression", "fp16", "weights"),
    Row("train.epochs", 2, "epochs"),
    Row("train.batch_size", 6, "images"),
    Row("train.start_size", 32, "images", {**EPOCHS, "data.image_size": 48}),
    Row("train.ema", 0.9, "weights"),
    Row("train.mixup", 0.5, "images"),
    Row("train.cutmix", 1.0, "losses"),
    Row("train.label_smoothing", 0.1, "losses"),
    Row("train.class_weights", (1.0, 2.0, 4.0), "losses"),
    Row("train.seed", 1, "images"),
]


def configuration(flat: dict[str, Any]) -> Config:
    """Of {"train.epochs": 1, ...}."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return Config(**sections)


@cache
def trained(flat: frozenset[tuple[str, Any]], ranks: int) -> Trained:
    config = configuration(dict(flat))
    data = cases.splits(12, config.data.image_size)
    return product.run(config, data, cases.CLASSES, cases.weights(True), None, ranks, None, {})


def facet(of: Trained, name: str) -> list[torch.Tensor]:
    """What of a run is compared."""
    if name == "images":
        return [image for image in of.shown[0] if image is not None]
    if name == "weights":
        return list(of.saved.model.values())
    return [torch.tensor({"rates": of.log.rates, "losses": of.log.losses, "epochs": len(of.log.epochs)}[name])]


@pytest.mark.parametrize("row", TRAINING, ids=lambda row: row.key)
def test_it_changes_training(row: Row) -> None:
    ranks = 2 if row.key == "optim.compression" else 1
    plain = BASE | row.setting
    with_it, without = (trained(frozenset(flat.items()), ranks) for flat in (plain | {row.key: row.value}, plain))
    one, other = facet(with_it, row.facet), facet(without, row.facet)
    assert len(one) != len(other) or not all(map(torch.equal, one, other))


@pytest.mark.parametrize("views", [1, 8])
def test_validation_shows_each_image_in_so_many_views(monkeypatch: pytest.MonkeyPatch, views: int) -> None:
    shown = set()
    features = product.Double.features

    def spy(self: product.Double, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            shown.update(tuple(image.flatten().tolist()) for image in images)
        return features(self, images)

    monkeypatch.setattr(product.Double, "features", spy)
    config = configuration(BASE | {"valid.views": views})
    product.run(config, cases.splits(12, 32), cases.CLASSES, cases.weights(True), None, 1, None, {})
    assert len(shown) == 7 * views


def test_validation_by_the_kind_of_device() -> None:
    """What the settings leave open: GPUs share it, in batches of as many pixels."""
    left, said = Valid(), Valid(batch_size=7, sharded=False)
    assert [left.ranks(8, device) for device in ("cpu", "cuda")] == [1, 8]
    assert [said.ranks(8, device) for device in ("cpu", "cuda")] == [1, 1]
    assert [left.images_a_step(side, "cpu") for side in (32, 64, 1024)] == [128, 128, 128]
    assert [left.images_a_step(side, "cuda") for side in (32, 64, 128, 1024)] == [4096, 1024, 256, 128]
    assert said.images_a_step(64, "cuda") == 7


@pytest.mark.parametrize(("sharded", "ranks"), [(False, 1), (None, 1), (True, 2)])
def test_validation_is_on_rank_0_or_on_all(monkeypatch: pytest.MonkeyPatch, sharded: bool | None, ranks: int) -> None:
    networks = set()
    features = product.Double.features

    def spy(self: product.Double, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            networks.add(id(self))
        return features(self, images)

    monkeypatch.setattr(product.Double, "features", spy)
    config = configuration(BASE | {"valid.sharded": sharded, "valid.batch_size": 2})
    product.run(config, cases.splits(12, 32), cases.CLASSES, cases.weights(True), None, 2, None, {})
    assert len(networks) == ranks


def here() -> World:
    """The only rank."""
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)


def test_the_network_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[object, str]] = []
    monkeypatch.setattr(torch, "compile", lambda model, mode, **_: compiled.append((model, mode)) or model)
    monkeypatch.setattr(step, "obstacle", lambda _: None)
    for keys, mode in (
        ({}, None),
        ({"train.compile": True}, "reduce-overhead"),  # with graphs of its own where the step is none
        ({"train.compile": True, "train.graphs": False}, "default"),
    ):
        compiled.clear()
        config = configuration(BASE | keys)
        model = build("resnet18", 3, "head", seed=0)
        Step(TrainingState(here(), config, None, model, Precision("fp32")), here(), config, None)
        assert compiled == ([(model, mode)] if mode else [])


def test_where_a_network_strides() -> None:
    with torch.device("meta"):
        networks = [LandCoverResNet("resnet50", 3, "head", Details.of(Model(variant=v))) for v in ("v1", "v1.5")]
    assert [network.layer2[0].conv1.stride for network in networks] == [(2, 2), (1, 1)]


def test_a_layers_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(write_layers(Details("v1", 1e-3, 0.2), 10, 64, {HEAD})))
    settled = settle(Model(weights="none", layers=path), 10, 64)
    assert (settled.variant, settled.trainable, settled.bn_momentum) == ("v1", "head", 0.2)


def grow_tree(root: Path, size: int) -> Path:
    """Noise: 4 training images of each class, 2 to validate, 1 to test."""
    random = np.random.default_rng(0)
    for split, count in zip(SPLITS, (4, 2, 1), strict=True):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


PACKED = {"data.image_size": 48, "data.center_crop": 36, "data.resize": 64}


@pytest.mark.parametrize("key", PACKED)
def test_it_changes_the_packed_images(key: str, tmp_path: Path) -> None:
    tree = open_tree(grow_tree(tmp_path, 40))
    plain = {"data.image_size": 32, **({"data.center_crop": 32} if key == "data.resize" else {})}
    packed = []
    for flat in (plain, plain | {key: PACKED[key]}):
        data = configuration(flat).data
        packed.append(open_images(here(), tree, ["train"], data, data)["train"].images)
    assert packed[0].shape != packed[1].shape or not torch.equal(*packed)


@dataclass
class Job:
    """A run as one process, and what its parts were told."""

    folder: Path
    model: LandCoverResNet
    precision: str = ""
    watched: list[float] = field(default_factory=list)
    verified: int = 0
    saved: list[int] = field(default_factory=list)  # steps
    stop_at_once: list[bool] = field(default_factory=list)
    types: set[torch.dtype] = field(default_factory=set)  # of what the head sees
    validated: set[int] = field(default_factory=set)  # sizes of batches

    @property
    def run(self) -> Path:
        """run.dir."""
        return self.folder / "run"


SETTINGS: dict[str, Any] = {
    "data.image_size": 32,
    "model.arch": "resnet18",
    "model.weights": "none",
    "model.trainable": "head",
    "model.bn_epsilon": 1e-3,
    "model.bn_momentum": 0.2,
    "model.bn_affine": False,
    "model.head_bias": True,
    "optim.lr": 1e-9,  # all validations alike: after the first, none is the best
    "train.epochs": 3,
    "train.batch_size": 3,
    "train.precision": "bf16",
    "train.seed": 5,
    "valid.batch_size": 3,
    "run.checkpoint_interval": 3,
    "run.checkpoint_steps": 2,
    "run.on_save_error": "stop",
    "run.watchdog_seconds": 123.0,
    "run.verify_interval": 4,
    "run.page": False,
}
FOLDERS = ("data.root", "data.cache_dir", "run.dir", "run.numbered_checkpoints", "run.predictions")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """3 epochs of 3 steps with SETTINGS; all folders lie side by side, each named as its key."""
    folder = tmp_path_factory.mktemp("job")
    grow_tree(folder / "root", 32)
    paths = {key: folder / key.split(".")[1] for key in FOLDERS} | {"run.dir": folder / "run"}
    files = {"run.outfile": folder / "out.txt", "run.metrics_file": folder / "run.prom"}
    config = configuration(SETTINGS | paths | files)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGUSR1, signal.SIGTERM)]
    job = Job(folder, build("resnet18", 2, "head", seed=0))
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, job)
        assert train.train(here(), config) == 0
    for number, handler in handlers:
        signal.signal(number, handler)
    return job


def spy(patch: pytest.MonkeyPatch, job: Job) -> None:
    """Note what the parts of a run are told."""
    verify, save, features = TrainingState.verify, Journal.save, LandCoverResNet.features
    start_step, begin = Step.__init__, Saver.__init__

    def watch(_: World, seconds: float) -> None:
        job.watched.append(seconds)

    def verified(self: TrainingState) -> None:
        job.verified += 1
        verify(self)

    def saved(self: Journal, state: Checkpoint) -> None:
        job.saved.append(state.step)
        save(self, state)

    def seen(self: LandCoverResNet, images: torch.Tensor) -> torch.Tensor:
        result = features(self, images)
        job.types.add(result.dtype)
        if not self.training:
            job.validated.add(len(images))
        return result

    def made(self: Step, state: TrainingState, *others: Any) -> None:
        job.model, job.precision = state.model, state.precision.name
        start_step(self, state, *others)

    def saver(self: Saver, folder: Any, stop_at_once: bool, *others: Any) -> None:
        job.stop_at_once.append(stop_at_once)
        begin(self, folder, stop_at_once, *others)

    patch.setattr(World, "watch", watch)
    patch.setattr(TrainingState, "verify", verified)
    patch.setattr(Journal, "save", saved)
    patch.setattr(LandCoverResNet, "features", seen)
    patch.setattr(Step, "__init__", made)
    patch.setattr(Saver, "__init__", saver)


def norms(job: Job, attribute: str) -> set[Any]:
    """What all BatchNorm layers have."""
    return {getattr(m, attribute) for m in job.model.modules() if isinstance(m, torch.nn.BatchNorm2d)}


def test_a_run_is_calibrated(job: Job, alone: World, tmp_path: Path) -> None:
    """For one view and for eight, whatever the run itself shows; unless it shall not be."""
    places = {"data.root": job.folder / "root", "run.dir": tmp_path / "run"}
    keys = {"train.batch_size": 8, "valid.calibrate": False}
    assert train.train(alone, configuration(BASE | keys | places)) == 0
    for run, views in ((job.run, {1, 8}), (tmp_path / "run", set())):
        saved = checkpoint.load(run / "checkpoints" / "best.json")
        assert saved.temperatures.keys() == views
        assert ("temperatures" in summary(run)) == bool(views)
        assert (run / "plots" / "reliability.png").stat().st_size > 0


def saved_epochs(job: Job) -> list[int]:
    return [event["epoch"] for event in events(job.run, "checkpoint")]


def first_weights(job: Job) -> torch.Tensor:
    return build("resnet18", 2, "head", seed=5, details=Details(affine=False)).conv1.weight


JOB: dict[str, Callable[[Job], bool]] = {
    "data.root": lambda job: summary(job.run)["train_images"] == 8,
    "data.cache_dir": lambda job: len(list((job.folder / "cache_dir").glob("*.npy"))) == 3,
    "model.arch": lambda job: len(job.model.layer1) == 2,
    "model.trainable": lambda job: summary(job.run)["trainable_parameters"] == 1026,
    "model.bn_epsilon": lambda job: norms(job, "eps") == {1e-3},
    "model.bn_momentum": lambda job: norms(job, "momentum") == {0.2},
    "model.bn_affine": lambda job: norms(job, "affine") == {False},
    "model.head_bias": lambda job: job.model.fc.bias is not None,
    "train.precision": lambda job: job.precision == "bf16" and job.types == {torch.bfloat16},
    "train.seed": lambda job: torch.equal(job.model.conv1.weight, first_weights(job)),
    "valid.batch_size": lambda job: job.validated == {3},
    "run.dir": lambda job: (job.run / "metrics.jsonl").exists(),
    "run.checkpoint_interval": lambda job: saved_epochs(job) == [1, 3],
    "run.checkpoint_steps": lambda job: job.saved == [2, 3, 4, 6, 6, 8, 9],
    "run.on_save_error": lambda job: job.stop_at_once == [True],
    "run.watchdog_seconds": lambda job: job.watched == [123.0],
    "run.verify_interval": lambda job: job.verified == 2,
    "run.numbered_checkpoints": lambda job: (
        [path.name for path in (job.folder / "numbered_checkpoints").glob("*.pt")] == ["model_checkpoint_3.pt"]
    ),
    "run.outfile": lambda job: len((job.folder / "out_train.txt").read_text().splitlines()) >= 9,
    "run.predictions": lambda job: (job.folder / "predictions" / "output_1.h5").exists(),
    "run.page": lambda job: not (job.run / "index.html").exists(),
    "run.metrics_file": lambda job: (job.folder / "run.prom").exists(),
}


@pytest.mark.parametrize("key", JOB)
def test_a_run_shows_it(key: str, job: Job) -> None:
    assert JOB[key](job)


@pytest.mark.parametrize(("keep", "names"), [(1, [1, 4]), (3, [1, 2, 3, 4])])
def test_checkpoints_that_are_kept(tmp_path: Path, keep: int, names: list[int]) -> None:
    """Beside the first, which is the best."""
    directory = RunDirectory(configuration({"run.dir": tmp_path, "run.keep": keep}), print, 0.0, lambda: None)
    for epoch in range(1, 5):
        history = [{"event": "valid", "epoch": epoch, "accuracy": 1 / epoch}]
        empty = torch.zeros(1)
        directory.checkpoints.add(
            Checkpoint({}, [], {}, empty, empty, epoch, 0, epoch, {}, [], "", "fp32", history=history)
        )
    directory.close()
    assert [record.epoch for record in directory.checkpoints.records()] == names


ELSEWHERE = {
    "data.bands": "tests/unit/test_bands.py::test_bands_are_chosen_by_name_and_order",
    "model.weights": "tests/unit/test_model.py::test_weights_with_another_head",
    "model.variant": "tests/unit/test_keys.py::test_where_a_network_strides",
    "model.layers": "tests/unit/test_keys.py::test_a_layers_json_is_read",
    "train.device": "tests/unit/test_devices.py::test_the_device_of_a_rank",
    "train.deterministic": "tests/unit/test_devices.py::test_algorithms_that_repeat",
    "train.graphs": "tests/unit/test_capture.py::test_why_a_step_is_not_captured",
    "train.compile": "tests/unit/test_keys.py::test_the_network_is_compiled",
    "valid.calibrate": "tests/unit/test_keys.py::test_a_run_is_calibrated",
    "valid.views": "tests/unit/test_keys.py::test_validation_shows_each_image_in_so_many_views",
    "valid.sharded": "tests/unit/test_keys.py::test_validation_is_on_rank_0_or_on_all",
    "run.checkpoint_seconds": "tests/unit/test_keeping.py::test_a_checkpoint_within_an_epoch_by_the_clock_and_by_steps",
    "run.keep": "tests/unit/test_keys.py::test_checkpoints_that_are_kept",
    "run.resume": "tests/unit/test_training.py::test_a_run_goes_on_in_place_from_its_newest_checkpoint",
}


def test_every_key_has_a_test() -> None:
    named = {row.key for row in TRAINING} | PACKED.keys() | JOB.keys() | ELSEWHERE.keys()
    assert named == Config().flat().keys()


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_named_test_exists(key: str) -> None:
    path, name = ELSEWHERE[key].split("::")
    functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
