"""A head with biases: taken from weights, trained, saved, calibrated, handed on and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.export import export
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build, count_parameters
from hvd_eurosat.training import checkpoint
from hvd_eurosat.weights.loading import load_weights
from hvd_eurosat.weights.settle import settle
from tests.unit.conftest import blank, saved_checkpoint

BIASED = Details(head_bias=True)


def biased(arch: str = "resnet18") -> LandCoverResNet:
    model = build(arch, 3, "all", seed=1, details=BIASED).eval()
    nn.init.uniform_(model.fc.bias, 1, 2)
    return model


@pytest.mark.parametrize("mode", ["bn+head", "head", "all"])
def test_biases_are_parameters_that_train(mode: str) -> None:
    with torch.device("meta"):
        plain, model = (LandCoverResNet("resnet50", 10, mode, details) for details in (Details(), BIASED))
    assert [mine - theirs for mine, theirs in zip(*map(count_parameters, (model, plain)), strict=True)] == [10, 10]


@pytest.mark.usefixtures("narrow")
def test_convolutions_are_drawn_the_same() -> None:
    plain, model = build("resnet18", 3, "all", seed=1).state_dict(), biased().state_dict()
    assert all(torch.equal(tensor, model[name]) for name, tensor in plain.items())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("bias", [torch.ones(3), torch.zeros(3), None])
def test_a_head_is_kept_with_its_biases(tmp_path: Path, bias: Tensor | None) -> None:
    state = {**build("resnet18", 3, "all", seed=4).state_dict(), "fc.weight": torch.ones(3, 128)}
    torch.save(state if bias is None else {**state, "fc.bias": bias}, tmp_path / "w.pt")
    model = biased()
    taken = load_weights(model, Model(weights=str(tmp_path / "w.pt"), arch="resnet18", head_bias=True))
    assert taken.line == "122 tensors"
    assert torch.equal(model.fc.weight, torch.ones(3, 128))
    assert torch.equal(model.fc.bias, torch.zeros(3) if bias is None else bias)


@pytest.mark.usefixtures("narrow")
def test_a_head_that_is_left_out_says_how_to_keep_it(tmp_path: Path) -> None:
    torch.save(biased().state_dict(), tmp_path / "w.pt")
    model = build("resnet18", 3, "all", seed=5)
    said = "its head is left out, for it has biases (model.head_bias true keeps them)"
    assert load_weights(model, Model(weights=str(tmp_path / "w.pt"), arch="resnet18")).line == f"120 tensors; {said}"


@pytest.mark.usefixtures("narrow")
def test_a_checkpoint_and_its_exports_have_the_biases(tmp_path: Path) -> None:
    """Divided by the temperature, too."""
    model = biased()
    settings = Model(arch="resnet18", head_bias=True)
    path = saved_checkpoint(tmp_path / "c.pt", model, list("abc"), settings, Data(), temperatures={1: 2.0})
    assert torch.equal(checkpoint.load(path).build_model(torch.device("cpu")).fc.bias, model.fc.bias)
    export(ExportSettings(checkpoint=path, format="safetensors", out=tmp_path))
    again = build("resnet18", 3, "all", seed=7, details=BIASED).eval()
    load_weights(again, settings.model_copy(update={"weights": str(tmp_path / "model.safetensors")}))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), (model(images) / 2).log_softmax(1), atol=1e-5, rtol=1e-5)


def test_keras_has_the_biases(tmp_path: Path) -> None:
    model = biased("resnet50")
    path = saved_checkpoint(tmp_path / "c.pt", model, list("abc"), Model(head_bias=True))
    export(ExportSettings(checkpoint=path, format="keras", out=tmp_path))
    settled = settle(Model(weights=str(tmp_path / "model.h5"), layers=tmp_path / "layers.json"), 3, 64)
    assert settled.head_bias
    again = blank(Details.of(settled), classes=3)
    load_weights(again, settled)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
