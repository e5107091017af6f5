"""The network's exact figures, what trains, and weights from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import Details, LandCoverResNet, build, count_parameters
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.weights.loading import load_weights
from tests.unit.conftest import without_memory


@pytest.mark.parametrize(
    ("trainable", "count"), [("bn+head", 73_600), ("head", 20_480), ("layer4,fc", 14_985_216), ("all", 23_528_512)]
)
def test_parameters(trainable: str, count: int) -> None:
    with torch.device("meta"):
        model = LandCoverResNet("resnet50", 10, trainable)
    assert count_parameters(model) == (23_528_512, count)


def in_torchvision(ours: LandCoverResNet) -> nn.Module:
    """The same ResNet-50 as torchvision's, with the same weights."""
    from torchvision.models import resnet50

    with without_memory():
        theirs = resnet50(num_classes=10)
        theirs.fc = nn.Linear(2048, 10, bias=False)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    return theirs


def test_log_probabilities_are_those_of_torchvisions_network() -> None:
    ours = build("resnet50", 10, "all", seed=0)
    theirs = in_torchvision(ours)
    for size in (32, 64, 65):
        images = torch.randn(3, 3, size, size)
        for mode in (True, False):
            expected = theirs.train(mode)(images).log_softmax(1)
            assert torch.allclose(ours.train(mode)(images), expected, atol=1e-4)


@pytest.mark.parametrize("trainable", ["all", "bn+head"])
def test_gradients_are_those_of_torchvisions_network(trainable: str) -> None:
    ours = build("resnet50", 10, trainable, seed=0)
    theirs = in_torchvision(ours)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)  # in float32 a ReLU at 0 decides differently now and then
    ours.double()(images)[:, 0].sum().backward()
    theirs.double()(images).log_softmax(1)[:, 0].sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not mine.requires_grad:
            assert mine.grad is None
            continue
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())), name


def test_gradients_come_in_the_order_of_torchvisions() -> None:
    ours = build("resnet50", 10, "all", seed=0)
    orders: list[list[str]] = []
    for model in (ours, in_torchvision(ours)):
        order: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        model(images).sum().backward()
        orders.append([name for name in order if "conv" in name or "downsample.0" in name])
    assert orders[0] == orders[1]


@pytest.mark.usefixtures("narrow")
def test_frozen_weights_that_are_replaced_are_used() -> None:
    model = build("resnet18", 10, "bn+head", seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    for precision in (Precision("fp32"), Precision("bf16")):
        for seed in (1, 2):
            other = build("resnet18", 10, "bn+head", seed).eval()
            model.load_state_dict(other.state_dict())
            with precision.autocast(images.device):
                assert torch.equal(model(images), other(images))


@pytest.mark.usefixtures("narrow")
def test_a_frozen_backbone_stays_in_evaluation_mode() -> None:
    model = build("resnet18", 10, "head", seed=0)
    before = model.state_dict()["bn1.running_mean"].clone()
    model(torch.randn(4, 3, 64, 64))
    assert torch.equal(model.bn1.running_mean, before)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_with_another_head(tmp_path: Path, suffix: str) -> None:
    source = build("resnet18", 200, "all", seed=4)
    state = {**source.state_dict(), "fc.bias": torch.zeros(200)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    model = build("resnet18", 10, "bn+head", seed=5)
    head = model.fc.weight.clone()
    lacking = load_weights(model, Model(weights=str(path), arch="resnet18")).lacking
    assert lacking == "its head of 200 units is left out, for there are 10 classes"
    name = "layer4.1.conv2.weight"
    assert torch.equal(model.get_parameter(name), source.get_parameter(name))
    assert torch.equal(model.fc.weight, head)


BIASED = "its head is left out, for it has biases (model.head_bias true keeps them)"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({}, "it has no head"),
        ({"fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}, BIASED),
        ({"fc.weight": torch.ones(10, 128), "fc.bias": torch.zeros(10)}, ""),
    ],
)
def test_what_becomes_of_a_head_is_said(tmp_path: Path, head: dict[str, torch.Tensor], said: str) -> None:
    state = {
        name: value for name, value in build("resnet18", 10, "all", seed=4).state_dict().items() if name[:2] != "fc"
    }
    torch.save(state | head, tmp_path / "w.pt")
    model = build("resnet18", 10, "all", seed=5)
    assert load_weights(model, Model(weights=str(tmp_path / "w.pt"), arch="resnet18")).lacking == said
    assert bool((model.fc.weight == 1).all()) == (not said)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("source", ["imagenet", "weights.pt", "weights.safetensors"])
def test_another_epsilon_is_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """torchvision's 1e-5 is what a bare state dict means, whatever this network adds to its variances."""
    theirs = build("resnet18", 10, "all", seed=3)
    nn.init.uniform_(theirs.bn1.running_var, 1e-3, 1e-2)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    monkeypatch.setattr("hvd_eurosat.weights.loading._imagenet", lambda arch: state)
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    place = source if source == "imagenet" else str(tmp_path / source)
    ours = build("resnet18", 10, "all", seed=4, details=Details(epsilon=1e-3))
    load_weights(ours, Model(weights=place, arch="resnet18", bn_epsilon=1e-3))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), atol=1e-4, rtol=1e-4)


class Exploit:
    """Unpickled, it would write a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.canary,))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "No such file or directory"),
        (b"", "not a file of weights"),
        (b"not weights at all", "not a file of weights"),
        ("other arch", r"not weights of resnet18: .* \(\d+ differences\)"),
        ("missing", r"not weights of resnet18: conv1.weight is missing \(1 differences\)"),
        ("not finite", r"conv1.weight is not finite \(1 differences\)"),
        ("list", "not a state dict"),
        ("pickle", "not a file of weights: beside tensors and plain values it holds getattr: save "),
    ],
)
def test_bad_weights(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    if content == "other arch":
        torch.save(build("resnet50", 10, "all", seed=0).state_dict(), path)
    if content == "missing":
        state = build("resnet18", 10, "all", seed=0).state_dict()
        del state["conv1.weight"]
        torch.save(state, path)
    if content == "not finite":
        model = build("resnet18", 10, "all", seed=0)
        model.conv1.weight.data[0] = torch.nan
        torch.save(model.state_dict(), path)
    if content == "list":
        torch.save([1, 2], path)
    if content == "pickle":
        torch.save({"model": Exploit(tmp_path / "canary")}, path)
    with pytest.raises(UserError) as error:
        load_weights(build("resnet18", 10, "all", seed=0), Model(weights=str(path), arch="resnet18"))
    assert re.search(message, str(error.value))
    assert not (tmp_path / "canary").exists()


@pytest.mark.usefixtures("narrow")
def test_imagenet_weights_come_from_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message names the file; the real file cannot be had here, so its hash is not checked."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    model = build("resnet18", 10, "bn+head", seed=0)
    with pytest.raises(RunError) as error:
        load_weights(model, Model(arch="resnet18"))
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert f"put https://download.pytorch.org/models/resnet18-f37072fd.pth at {place}" in str(error.value)
    source = build("resnet18", 1000, "all", seed=9)
    torch.save(source.state_dict(), place)
    load_weights(model, Model(arch="resnet18"))
    assert torch.equal(model.conv1.weight, source.conv1.weight)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")
