"""Convolutions as products with prepared weights, against torch's own in double precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hvd_eurosat.model import native, products
from hvd_eurosat.model.convolution import Convolution, use_matrix_products
from hvd_eurosat.model.resnet import build
from tests.unit.conftest import libraries_for

ERROR = 1e-5
# Side of the kernel, stride, in, out, and the images: whole tiles, parts of tiles, less than one, a line; more than a
# group of tiles; pointwise with more of all than a thread takes at once; strided; and those on and onto 2x2 pixels.
CASES = {
    "tiles": (3, 1, 32, 48, (5, 8, 8)),
    "parts": (3, 1, 32, 16, (3, 7, 5)),
    "less": (3, 1, 16, 16, (2, 3, 3)),
    "line": (3, 1, 16, 16, (1, 1, 9)),
    "groups": (3, 1, 16, 16, (4, 20, 20)),
    "pointwise": (1, 1, 528, 272, (9, 4, 4)),
    "strided": (1, 2, 16, 32, (3, 8, 8)),
    "dense": (3, 1, 16, 32, (7, 2, 2)),
    "corners": (3, 2, 16, 32, (7, 4, 4)),
}


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with libraries_for("AVX2", monkeypatch):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the library's functions, as they are called."""
    call, names = native.call, []
    monkeypatch.setattr(native, "call", lambda *words: (names.append(words[1]), call(*words)))
    return names


def a_convolution(case: str, trains: bool) -> tuple[nn.Conv2d, Tensor]:
    """With its images, both channels last."""
    side, stride, into, out, (batch, height, width) = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(into, out, side, stride, padding=side // 2, bias=False))
    use_matrix_products(model)
    convolution = model.to(memory_format=torch.channels_last)[0]
    assert isinstance(convolution, Convolution)
    convolution.weight.requires_grad_(trains)
    return convolution, torch.randn(batch, into, height, width).contiguous(memory_format=torch.channels_last)


def results(convolution: nn.Conv2d, images: Tensor, first: bool = False) -> dict[str, Tensor]:
    """Of one pass each way; the images of the first convolution have no gradient."""
    images = images.clone().requires_grad_(not first)
    output = convolution(images)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    found = {"output": output.detach(), "images": images.grad, "weight": convolution.weight.grad}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_torch_computes(case: str, trains: bool, calls: list[str]) -> None:
    convolution, images = a_convolution(case, trains)
    exact = results(copy.deepcopy(convolution).double(), images.double())
    assert not calls
    ours = results(convolution, images)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert (ours[name].double() - value).norm() < ERROR * value.norm(), name
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    if case in ("tiles", "parts", "less", "line", "groups"):
        assert calls == ["convolution"] * 2 + (["tiles_of_gradient", "tiles_of_images"] if trains else [])
    else:
        assert calls == ([] if trains else ["product"] * (8 if case == "corners" else 2))


def test_images_without_a_gradient() -> None:
    convolution, images = a_convolution("tiles", trains=True)
    exact = results(copy.deepcopy(convolution).double(), images.double(), first=True)
    ours = results(convolution, images, first=True)
    assert ours.keys() == {"output", "weight"}
    assert (ours["weight"].double() - exact["weight"]).norm() < ERROR * exact["weight"].norm()


def test_images_in_another_order() -> None:
    convolution, images = a_convolution("parts", trains=False)
    assert torch.equal(convolution(images.contiguous()), convolution(images))


@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.parametrize("case", ["tiles", "pointwise"])
def test_a_changed_weight_is_prepared_anew(case: str, trains: bool) -> None:
    convolution, images = a_convolution(case, trains)
    before = convolution(images).detach()
    with torch.no_grad():
        convolution.weight.mul_(2)
    assert torch.allclose(convolution(images), 2 * before, rtol=1e-4, atol=1e-4)
    convolution.weight = nn.Parameter(convolution.weight.detach() / 2, requires_grad=trains)
    assert torch.allclose(convolution(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["groups", "pointwise"])
def test_the_same_bits_on_any_number_of_threads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found.append(results(*a_convolution(case, trains=False)))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    convolution, images = a_convolution("tiles", trains=False)
    images[1, 3, 2, 2] = value
    output = convolution(images)
    assert not output[1, :, 1:4, 1:4].isfinite().any()
    assert output[[0, 2, 3, 4]].isfinite().all()


def test_the_network_computes_with_it(calls: list[str]) -> None:
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    build("resnet50", 10, "bn+head", seed=0)(images).sum().backward()
    assert (calls.count("convolution"), calls.count("product")) == (2 * 11, 2 * 42)
    calls.clear()
    build("resnet50", 10, "all", seed=0)(images).sum().backward()
    assert (calls.count("convolution"), calls.count("tiles_of_images"), calls.count("product")) == (2 * 11, 11, 0)


@pytest.mark.parametrize("case", ["channels", "bf16", "fp64", "weight", "autocast"])
def test_everything_else_is_torchs_own(case: str) -> None:
    weight, images = torch.ones(16, 16, 3, 3), torch.ones(1, 16, 8, 8)
    assert products.are_fast(images, weight)
    others = {"bf16": images.bfloat16(), "fp64": images.double()}
    weights = {"channels": torch.ones(24, 16, 3, 3), "weight": weight.bfloat16()}
    with torch.autocast("cpu", enabled=case == "autocast"):
        assert not products.are_fast(others.get(case, images), weights.get(case, weight))


def test_avx512_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, images = torch.ones(16, 16, 3, 3), torch.ones(1, 16, 8, 8)
    assert products.are_fast(images, weight)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    native.library.cache_clear()
    assert not products.are_fast(images, weight)
