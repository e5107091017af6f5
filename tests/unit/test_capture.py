"""A step that is captured and replayed gives what the step as it stands gives, bit for bit.

The graphs are those of tests/unit/tape.py, for no GPU is at hand; the loop, its ranks and their exchange are those of
tests/reference/product.py. Learning rates are powers of two, which float32 (on the device) holds as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data, Model, Optim, Run, Train, mixes
from hvd_eurosat.data.batches import Draw, Images, TrainBatches, ordered_batches
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.model.resnet import LandCoverResNet, build
from hvd_eurosat.run.header import header
from hvd_eurosat.training import capture, large_batch, metrics
from hvd_eurosat.training.capture import KEPT, WARM_UP, Captured, Graphs
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.features import Features
from hvd_eurosat.training.gradients import GradientBuckets
from hvd_eurosat.training.inference import Network
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from hvd_eurosat.training.stragglers import Stopwatch
from tests.reference import product
from tests.reference.cases import CLASSES, splits, weights
from tests.reference.product import Trained
from tests.unit import tape
from tests.unit.conftest import narrow

IMAGES = 7  # 4 steps an epoch in batches of 2, the last of which is padded
REPLAYS = 8 - WARM_UP  # of two epochs


def configuration(**keys: Any) -> Config:
    """Of two epochs; keys: section__key=value."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"image_size": 32},
        "model": {"arch": "resnet18", "weights": "none"},
        "optim": {"name": "sgd", "lr": 2**-6, "schedule": "step", "step_size": 1, "gamma": 0.5},
        "train": {"epochs": 2, "batch_size": 2, "precision": "fp32"},
        "run": {"verify_interval": 0},
    }
    for key, value in keys.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    kinds = {"data": Data, "model": Model, "optim": Optim, "train": Train, "run": Run}
    return Config(**{name: kinds[name](**values) for name, values in sections.items()})


def train(config: Config, start: Checkpoint | None = None, ranks: int = 1, images: int = IMAGES, **how: Any) -> Trained:
    """To the end, or up to step `stop`; at the steps of `faults` a loss is nan."""
    data = splits(images, config.data.image_size)
    how = {"stop": None, "faults": {}} | how
    return product.run(config, data, CLASSES, weights(config.model.bn_affine), start, ranks, **how)


def same(one: Trained, other: Trained) -> None:
    """Losses, rates and sums of all steps and epochs, weights, statistics and what the optimiser keeps."""
    assert repr(one.log) == repr(other.log)
    assert one.diverged == other.diverged
    found, wanted = (tree_leaves(dataclasses.asdict(trained.saved)) for trained in (one, other))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


CASES: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam, weight by weight": {"optim__name": "adam", "optim__amsgrad": True, "optim__weight_decay": 0.25},
    "all weights, averaged": {"model__trainable": "all", "optim__name": "adamw", "train__ema": 0.9},
    "mixed images": {"train__mixup": 0.2, "train__cutmix": 1.0, "train__class_weights": (1.0, 2.0, 0.5)},
    "other images": {"data__random_erase": 0.5, "data__max_shift": 2, "train__label_smoothing": 0.1},
    "by depth": {"optim__layer_decay": 0.5, "optim__unfreeze_epochs": 1, "optim__schedule_epochs": 6},
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_graphs_train_as_the_step_does(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(**keys)
    plain = train(config)
    tapes = tape.install(monkeypatch)
    same(train(config), plain)
    apart = config.train.ema > 0  # the first step, and then every eighth, counts for the average: another update
    assert [one.replays for one in tapes] == [REPLAYS, REPLAYS - apart]


@pytest.mark.parametrize("name", ["lars", "lamb", "adagrad", "rmsprop"])
def test_norms_and_counts_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is skipped, the first even, changes nothing; the host is not asked whether it is."""
    keys = {"optim__name": name, "optim__weight_decay": 0.25, "model__trainable": "all"}
    config, faults = configuration(**keys, optim__lr=2 if name == "lars" else 2**-8), {0: 0, 6: 0}
    plain = train(config, faults=faults)
    tapes = tape.install(monkeypatch)
    monkeypatch.setattr(large_batch, "one_by_one", lambda _: False)
    found = train(config, faults=faults)
    for state in found.saved.optimiser["state"].values():
        if "steps" in state:
            state["steps"] = int(state["steps"])
    same(found, plain)
    assert [one.replays for one in tapes] == [REPLAYS, REPLAYS]


def test_each_size_of_the_images_has_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(data__image_size=48, train__start_size=32)
    plain = train(config)
    tapes = tape.install(monkeypatch)
    same(train(config), plain)
    assert [one.replays for one in tapes] == [
        4 - WARM_UP,
        REPLAYS,
        4 - WARM_UP,
    ]  # forward and backward, the update, forward and backward


def test_epochs_of_the_head_alone_have_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the bits of the step that keeps no features."""
    config = configuration(model__trainable="head", data__augment=False)
    with monkeypatch.context() as patch:
        patch.setattr(Features, "keeps", False)
        plain = train(config)
    same(train(config), plain)
    tapes = tape.install(monkeypatch)
    same(train(config), plain)
    assert [one.replays for one in tapes] == [4 - WARM_UP, REPLAYS, 4 - WARM_UP]


@pytest.mark.parametrize("faults", [{0: 0, 4: 0, 6: 0}, {3: 0, 4: 0, 5: 0}])
def test_steps_are_skipped_and_end_the_run(faults: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(optim__name="adam", train__ema=0.9)
    plain = train(config, faults=faults)
    assert plain.diverged == (5 in faults)
    tape.install(monkeypatch)
    same(train(config, faults=faults), plain)


def test_a_run_stops_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is one of any other run: it holds plain learning rates."""
    config = configuration(optim__name="adam", train__ema=0.9)
    plain = train(config, stop=4)
    whole = train(config, plain.saved)
    tapes = tape.install(monkeypatch)
    stopped = train(config, stop=4)
    same(stopped, plain)
    assert all(type(group["lr"]) is float for group in stopped.saved.optimiser["param_groups"])
    assert stopped.saved.step == 4
    del tapes[:]
    same(train(config, stopped.saved), whole)
    assert [one.replays for one in tapes] == [4 - WARM_UP] * 2


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_ranks_exchange_between_the_graphs(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(optim__compression=compression, data__max_shift=1)
    plain = train(config, ranks=2, faults={4: 1}, images=13)
    tapes = tape.install(monkeypatch)
    same(train(config, ranks=2, faults={4: 1}, images=13), plain)
    assert len(tapes) == 4


def test_what_cannot_be_captured_is_launched_as_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration()
    plain = train(config)
    tapes = tape.install(monkeypatch)
    optimise = Step._optimise
    monkeypatch.setattr(Step, "_optimise", lambda step, skip: None if skip else optimise(step, skip))
    same(train(config), plain)
    assert [one.replays for one in tapes] == [REPLAYS, 0]
    assert capsys.readouterr().err == (
        "warning: rank 0 of 1 launches its steps kernel by kernel, which is slower: no CUDA graph: CUDA error: "
        "operation not permitted when stream is capturing\n"
    )


def test_only_the_newest_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one function; what it is given is copied to where they read it."""
    tapes = tape.install(monkeypatch)
    found = torch.zeros(())
    captured = Captured(lambda factor, number: found.copy_(factor * number), Graphs(ALONE))

    def call(factor: int) -> float:
        captured(factor, torch.tensor(10.0 + factor))
        return float(found)

    for factor in range(1, KEPT + 2):
        assert [call(factor) for _ in range(WARM_UP + 2)] == [factor * (10 + factor)] * (WARM_UP + 2)
    assert len(tapes) == KEPT + 1
    assert [call(1), call(2)] == [11, 24]
    assert [one.replays for one in tapes] == [2, 3, *[2] * (KEPT - 1)]


def packed() -> Packed:
    """The training images."""
    split = splits(IMAGES, 32)["train"]
    return Packed(split.images, split.labels, ())


TREE = Tree(Path("nowhere"), ("a", "b", "c"), "d", synthetic=True, image_size=None, checksums=Checksums.of({}))


def on(kind: str) -> World:
    """The only rank, on a device of this kind."""
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device(kind), threads=1)


ALONE = on("cpu")


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        ("cpu", {}, ""),
        ("cpu", {"train__graphs": False}, ""),
        ("cuda", {}, None),
        ("cuda", {"train__graphs": False}, "train.graphs is false"),
        ("cuda", {"optim__name": "rmsprop"}, None),
    ],
)
def test_why_a_step_is_not_captured(kind: str, keys: dict[str, Any], why: str | None) -> None:
    assert capture.obstacle(on(kind), configuration(**keys)) == why


def test_a_torch_that_is_too_old_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose graphs would be broken by what Horovod's threads call meanwhile."""
    monkeypatch.setattr(torch.cuda, "graph", lambda cuda_graph, pool=None, stream=None: None)
    assert capture.obstacle(on("cuda"), configuration()) == f"torch {torch.__version__} is too old"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("why", "said"),
    [(None, ", steps as CUDA graphs"), ("", ""), ("torch is too old", ", steps not as CUDA graphs: torch is too old")],
)
def test_the_header_says_how_steps_are_made(why: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tape.install(monkeypatch)
    monkeypatch.setattr(capture, "obstacle", lambda *_: why)
    monkeypatch.setattr(Tree, "files", lambda *_: [])
    config = configuration(run__dir="nowhere")
    batches = TrainBatches(Images(packed(), ALONE.device), 2, 0, 1, 0)
    model = build("resnet18", CLASSES, config.model.trainable, 0)
    state = TrainingState(ALONE, config, TREE, model, Precision("fp32"))
    features = Features(ALONE, config, state, IMAGES, 1)
    facts = header(ALONE, config, TREE, state, Step(state, ALONE, config, None), batches, "", features)
    assert facts["world"].endswith(f", fp32{said}")
    assert facts["validation"] == "128 images a step on 1 rank"


@pytest.fixture
def shallow() -> Iterator[None]:
    """A ResNet-18 has a block in each stage."""
    with narrow(depths=[1, 1, 1, 1]):
        yield


def test_a_number_that_the_host_reads_ends_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in as by CUDA; and as there nothing that was captured is done."""
    tape.install(monkeypatch)
    number = torch.ones(())
    with pytest.raises(RuntimeError, match="not permitted"), tape.Tape().capture():
        number.add_(1).item()
    assert number == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "keys",
    [
        {"optim__name": "lars", "train__mixup": 0.2, "train__ema": 0.9},
        {"optim__name": "lamb", "model__trainable": "all"},
        {"optim__name": "adagrad", "optim__weight_decay": 0.1},
        {"optim__name": "rmsprop"},
        {"optim__name": "lars", "model__trainable": "head", "data__augment": False},
    ],
)
def test_all_that_is_captured_is_on_the_device(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the host asks for no number: fake tensors of a GPU refuse both. They know no backward and no fused Adam."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tape.install(monkeypatch)
    monkeypatch.setattr(Stopwatch, "mark", lambda _: 0.0)
    monkeypatch.setattr(GradientBuckets, "backward", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
    config, world = configuration(**keys), on("cuda")
    batches = TrainBatches(Images(packed(), ALONE.device), 2, 0, 1, 0, mixes(config.train))
    with FakeTensorMode():
        batches._images = Images(packed(), world.device)
        with world.device:
            model = LandCoverResNet("resnet18", CLASSES, config.model.trainable)
        state = TrainingState(world, config, TREE, model, Precision("fp32"))
        features = Features(world, config, state, IMAGES, 1)
        step = Step(state, world, config, None, features)
        drawn = Draw(torch.zeros(2, dtype=torch.int64, device="cuda"), torch.ones(2, device="cuda"), 2, batches)
        for size in (32, 0) if features.keeps else (32,):
            step._forward_and_backward(size, drawn)
        step._update(True)
        assert {tensor.device.type for tensor in (step._found, step._sums, model.fc.weight)} == {"cuda"}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("views", [1, 8])
def test_an_evaluation_is_on_the_device(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the host asks for no number before its sums are whole: fake tensors of a GPU refuse both."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
    world, config = on("cuda"), configuration()
    with FakeTensorMode():
        images = Images(packed(), world.device)
        with world.device:
            model = LandCoverResNet("resnet18", CLASSES, config.model.trainable).eval()
        network, kept = Network(model, config.data, Precision("fp32"), views), {}
        for temperature in (1.0, 1.5):  # the second time by what the head saw the first time
            batches = ordered_batches(images, 4)
            loss, confusion, bins, _ = metrics._evaluate(world, network, batches, lambda: False, temperature, kept)
            assert {tensor.device.type for tensor in (loss, confusion, bins)} == {"cuda"}
    assert {feature.device.type for features in kept.values() for feature in features} == {"cuda"}
    assert [len(features) for features in kept.values()] == [views, views]
