"""Weights as other trainers save them: where they are in a file, and files that hold no network of ours."""

from __future__ import annotations

import argparse
import collections
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import LandCoverResNet, build
from hvd_eurosat.weights.loading import Taken, load_weights
from tests.unit.conftest import blank, narrow, saved_checkpoint, without_memory
from tests.unit.test_keras import lively

State = dict[str, Tensor]
CLASSES = 10


@pytest.fixture(scope="module")
def source() -> LandCoverResNet:
    """A narrow ResNet-18 as if it had been trained."""
    with narrow():
        model = build("resnet18", CLASSES, "all", seed=3).eval()
    lively(model)
    return model


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def to(dtype: torch.dtype, state: State) -> State:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def projected(state: State) -> State:
    """With MoCo's projection in place of the head."""
    layers = {f"fc.{n}.{kind}": torch.ones(2) for n in (0, 2) for kind in ("weight", "bias")}
    return without_head(state) | layers


def moco(prefix: str, state: State) -> State:
    """Query and key encoder and the queue, of which the first is the network."""
    other = under(f"{prefix}encoder_k.", projected({name: torch.zeros_like(t) for name, t in state.items()}))
    queue = {f"{prefix}queue": torch.zeros(2, 3), f"{prefix}queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return other | under(f"{prefix}encoder_q.", projected(state)) | queue


def lightning(state: State) -> Any:
    """With what Lightning's trainers put beside the weights."""
    attributes = collections.defaultdict(list, {"lr": [np.float32(0.1)]})
    return {
        "epoch": 9,
        "global_step": 1000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": under("model.", to(torch.float16, state)) | {"criterion.weight": torch.ones(CLASSES)},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": np.float64(0.9), "path": Path("a/b")}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "hyper_parameters": argparse.Namespace(bands=("B04", "B03"), mean=np.array([0.1, 0.2]), more=attributes),
    }


def dino(state: State) -> Any:
    other = under("module.backbone.", {name: torch.zeros_like(t) for name, t in without_head(state).items()})
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    teacher = under("backbone.", without_head(state)) | head
    return {"student": other, "teacher": teacher, "epoch": 99, "args": argparse.Namespace(arch="resnet18")}


HEADLESS = "it has no head"
KINDS: dict[str, tuple[Callable[[State], Any], str]] = {
    "a state dict": (lambda s: s, "121 tensors"),
    "state_dict": (lambda s: {"state_dict": s, "arch": "r"}, "121 tensors of state_dict; left out: arch"),
    "DataParallel": (
        lambda s: {"net": under("module.", s), "acc": 97.5},
        "121 tensors under module. of net; left out: acc",
    ),
    "compiled": (lambda s: {"model": under("_orig_mod.", s)}, "121 tensors under _orig_mod. of model"),
    "model_state_dict": (
        lambda s: {"model_state_dict": under("backbone.", s), "loss": np.float32(1)},
        "121 tensors under backbone. of model_state_dict; left out: loss",
    ),
    "bfloat16": (lambda s: under("encoder.", to(torch.bfloat16, s)), "121 tensors under encoder."),
    "Lightning": (
        lightning,
        "121 tensors under model. of state_dict; left out: criterion, epoch, global_step, pytorch-lightning_version, "
        "callbacks, optimizer_states, 1 more",
    ),
    "MoCo": (
        lambda s: moco("", s),
        f"120 tensors under encoder_q.; {HEADLESS}; "
        "left out: encoder_k (124 tensors), encoder_q.fc (4 tensors), queue, queue_ptr",
    ),
    "MoCo on many ranks": (
        lambda s: {"epoch": 200, "state_dict": moco("module.", s)},
        f"120 tensors under module.encoder_q. of state_dict; {HEADLESS}; left out: module.encoder_k (124 tensors), "
        "module.encoder_q.fc (4 tensors), module.queue, module.queue_ptr, epoch",
    ),
    "DINO": (
        dino,
        f"120 tensors under backbone. of teacher; {HEADLESS}; left out: head (2 tensors), student, epoch, args",
    ),
    "a chain": (
        lambda s: {"model": {"state_dict": under("module._orig_mod.model.encoder.", s)}},
        "121 tensors under module._orig_mod.model.encoder. of model.state_dict",
    ),
    "old": (lambda s: {n: t for n, t in s.items() if "tracked" not in n}, "101 tensors"),
}


def loaded(path: Path, **settings: Any) -> tuple[LandCoverResNet, Taken]:
    model = build("resnet18", CLASSES, "all", seed=8)
    taken = load_weights(model, Model(weights=str(path), arch="resnet18", **settings))
    return model.eval(), taken


def check_same(model: LandCoverResNet, other: LandCoverResNet, head: bool) -> None:
    """Of log-probabilities or, without the head, of features."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, theirs = (one(images) if head else one.features(images) for one in (model, other))
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_checkpoints_are_the_same_function(tmp_path: Path, source: LandCoverResNet, kind: str) -> None:
    make, said = KINDS[kind]
    torch.save(make(source.state_dict()), tmp_path / "w.pth")
    model, taken = loaded(tmp_path / "w.pth")
    assert taken.line == said
    dtype = {"Lightning": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    rounded = build("resnet18", CLASSES, "all", seed=0).eval()
    rounded.load_state_dict(to(dtype, source.state_dict()))
    check_same(model, rounded, head=HEADLESS not in said)


@pytest.mark.usefixtures("narrow")
def test_safetensors_under_a_prefix(tmp_path: Path, source: LandCoverResNet) -> None:
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(under("module.", state), tmp_path / "w.safetensors")
    model, taken = loaded(tmp_path / "w.safetensors")
    assert taken.line == "121 tensors under module."
    check_same(model, source, head=True)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_networks_of_other_libraries(tmp_path: Path, library: str, arch: str) -> None:
    """Saved by these themselves. In double precision, where only another function can differ."""
    import timm
    import torchvision

    torch.manual_seed(2)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    theirs: Any = make(arch, num_classes=CLASSES).eval()
    nn.init.zeros_(theirs.fc.bias)
    lively(theirs)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = blank(arch=arch).eval()
    assert load_weights(ours, Model(weights=str(tmp_path / "w.pth"), arch=arch)).lacking == ""
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        logits = ours.double().fc(ours.features(images))
        torch.testing.assert_close(logits, theirs.double()(images), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_attribute_dictionaries_of_lightning(
    tmp_path: Path, source: LandCoverResNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning is not needed to read what it saved."""
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
            patch.setitem(sys.modules, name, module)
        hyper = module.AttributeDict(rate=0.1)
        torch.save({"hyper_parameters": hyper, "state_dict": source.state_dict()}, tmp_path / "w.ckpt")
    model, taken = loaded(tmp_path / "w.ckpt")
    assert taken.line == "121 tensors of state_dict; left out: hyper_parameters"
    check_same(model, source, head=True)


@pytest.mark.usefixtures("narrow")
def test_a_json_of_the_same_name_may_be_any(tmp_path: Path, source: LandCoverResNet) -> None:
    torch.save(source.state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.json").write_text('{"classes": ["a", "b"]}')
    model, _ = loaded(tmp_path / "w.pt")
    check_same(model, source, head=True)


@pytest.mark.usefixtures("narrow")
def test_a_checkpoint_of_ours_needs_its_json(tmp_path: Path, source: LandCoverResNet) -> None:
    path = saved_checkpoint(tmp_path / "epoch-0003.pt", source, list("abcdefghij"), Model(arch="resnet18"))
    record = path.with_suffix(".json")
    check_same(loaded(path)[0], source, head=True)
    record.write_text(record.read_text()[:-9])
    with pytest.raises(UserError, match=r"epoch-0003\.json: damaged"):
        loaded(path)
    record.unlink()
    with pytest.raises(UserError, match=r"epoch-0003\.json: No such file"):
        loaded(path)


def empty(state: State) -> State:
    """The same names and shapes, in a file of some kilobytes."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def of(make: Callable[[], nn.Module]) -> State:
    with without_memory():
        state = dict(make().state_dict())
    return empty(state)


def vision(arch: str) -> State:
    """torchvision's."""
    from torchvision.models import get_model

    return of(lambda: get_model(arch))


def refusal(path: Path) -> str:
    """What is said of a file; the network that would take it has no weights yet."""
    with torch.device("meta"):
        model = LandCoverResNet("resnet18", CLASSES, "all")
    with pytest.raises(UserError) as error:
        load_weights(model, Model(weights=str(path), arch="resnet18"))
    return str(error.value)


STAGES = of(lambda: LandCoverResNet("resnet18", CLASSES, "all"))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no network": (lambda: {"epoch": 3, "state_dict": [1]}, "not a file of weights: not a state dict, nor one inside "),
    "another depth": (
        lambda: vision("resnet34"),
        "not weights of resnet18: layer1.2.conv1.weight is unknown; layer1.2.bn1.weight is unknown; "
        "layer1.2.bn1.bias is unknown (96 differences)",
    ),
    "another width": (
        lambda: vision("wide_resnet50_2"),
        "not weights of resnet18: layer1.0.conv1.weight is [128, 64, 1, 1], expected [64, 64, 3, 3]; ",
    ),
    "another arch": (lambda: vision("resnet50"), "; it is a resnet50: give --model.arch resnet50"),
    "a vision transformer": (
        lambda: {"model": {"patch_embed.proj.weight": torch.ones(2), "blocks.0.norm1.weight": torch.ones(2)}},
        "; it begins with a patch embedding, as vision transformers do",
    ),
    "another prefix": (
        lambda: under("trunk.", STAGES),
        "conv1.weight is missing, the nearest is trunk.conv1.weight; bn1.weight is missing, the nearest is trunk.bn1.",
    ),
    "two networks": (
        lambda: under("model.", STAGES) | under("backbone.", STAGES),
        "there are 2 networks in it, under backbone. and model.: save the one that is meant alone",
    ),
    "more in a block": (
        lambda: STAGES | {"layer1.0.se.fc1.weight": torch.zeros(2)},
        "layer1.0.se.fc1.weight is unknown (1 differences)",
    ),
    "whole numbers": (
        lambda: STAGES | {"bn1.weight": torch.zeros(64, dtype=torch.int8)},
        "bn1.weight is int8 (1 differences)",
    ),
    "sparse": (
        lambda: STAGES | {"bn1.weight": torch.ones(64).to_sparse()},
        "bn1.weight is quantized, sparse or without values",
    ),
    "a whole module": (
        lambda: nn.Linear(2, 2),
        "beside tensors and plain values it holds torch.nn.modules.linear.Linear: save the network's state_dict()",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_network_of_ours_is_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    torch.save(make(), tmp_path / "w.pth")
    said = refusal(tmp_path / "w.pth")
    assert said.startswith(f"model.weights {tmp_path / 'w.pth'}: not ")
    assert message in said
    assert "\n" not in said
    assert said.count(";") <= 3  # three differences and a hint


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_refused_in_a_line(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt").endswith("it is a TorchScript program: save the network's state_dict() alone")


def test_bands_without_names_are_refused_in_a_line(tmp_path: Path) -> None:
    torch.save(STAGES | {"conv1.weight": torch.zeros(64, 13, 7, 7)}, tmp_path / "w.pth")
    assert "its first convolution takes 13 bands and does not say which" in refusal(tmp_path / "w.pth")


def test_what_is_allowed_beside_tensors_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of names is no leave to call what bears them."""
    from hvd_eurosat.weights.plain import read_plain

    torch.save({"a": argparse.Namespace(b=1), "c": Path("d"), "e": np.float64(1)}, tmp_path / "w.pth")
    called: list[object] = []
    monkeypatch.setattr(argparse, "Namespace", called.append)
    assert set(read_plain(tmp_path / "w.pth")) == {"a", "c", "e"}
    assert not called
