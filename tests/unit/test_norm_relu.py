"""BatchNorm, addition and ReLU in one, against torch's own in double precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_eurosat.model import native
from hvd_eurosat.model import norm_relu as module
from hvd_eurosat.model.norm_relu import is_available, norm_relu
from hvd_eurosat.model.resnet import build
from tests.unit.conftest import libraries_for

SHAPES = [(2, 64, 7, 3), (3, 48, 20, 17)]  # fewer rows than a tile; several tiles, the last not full
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, params=["AVX2", "AVX512"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with libraries_for(request.param, monkeypatch):
        assert is_available()
        yield


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    """Random ones, channels last."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def a_norm(channels: int) -> nn.BatchNorm2d:
    """With random weights and biases."""
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


def trained(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, learns: bool = True, relu: bool = True
) -> dict[str, Tensor]:
    """The output, all gradients (x's if it `learns`), and the norm's buffers after one pass each way."""
    x, residual = x.requires_grad_(learns), None if residual is None else residual.requires_grad_()
    output = norm_relu(norm, x, residual, relu)
    output.backward(images(tuple(x.shape), 3, torch.bfloat16, 0.1).to(x.dtype).contiguous())
    trains = {"x": x, "residual": residual, **dict(norm.named_parameters())}
    grads = {name: leaf.grad for name, leaf in trains.items() if leaf is not None and leaf.grad is not None}
    return {"output": output.detach(), **grads, **dict(norm.named_buffers())}


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "first"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "norm"])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "adds"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_torch_computes(
    shape: tuple[int, ...], dtype: torch.dtype, adds: bool, relu: bool, learns: bool
) -> None:
    x, residual = images(shape, 1, dtype), images(shape, 2, dtype) if adds else None
    norm = a_norm(shape[1])
    exact = trained(
        copy.deepcopy(norm).double(), x.double(), None if residual is None else residual.double(), learns, relu
    )
    ours = trained(norm, x.clone(), residual, learns, relu)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        difference = (ours[name].double() - value).norm() / value.double().norm()
        assert difference < ERROR[dtype], name


def test_a_mean_far_from_zero() -> None:
    x = images(SHAPES[1], 1, torch.float32, mean=1000.0)
    norm = a_norm(x.shape[1])
    exact = F.relu(copy.deepcopy(norm).double()(x.double()))
    assert (norm_relu(norm, x) - exact).abs().max() < 1e-2


def test_a_first_pixel_far_from_the_others() -> None:
    x = images((16, 64, 64, 64), 1, torch.float32).mul_(0.3)
    x[0, :, 0, 0] = 100
    norm = a_norm(64)
    trained(norm, x.clone(), None)
    of_torch = a_norm(64).double()
    of_torch(x.double())
    ours, exact = (dict(each.named_buffers())["running_var"] for each in (norm, of_torch))
    assert torch.allclose(ours.double(), exact, rtol=1e-4)


def test_the_same_bits_on_any_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        results.append(trained(a_norm(48), *(images(SHAPES[1], seed, torch.bfloat16) for seed in (1, 2))))
    torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, norm = images(SHAPES[0], 1, torch.bfloat16), a_norm(64)
    x[0, 3, 0, 0] = value
    output = norm_relu(norm, x)
    assert output[:, 3].isnan().all()
    assert dict(norm.named_buffers())["running_var"][3].isnan()
    assert output.isfinite().sum() == output.numel() * 63 / 64


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "training"),
    [
        ((2, 60, 4, 4), torch.float32, torch.channels_last, True),
        ((2, 64, 4, 4), torch.float32, torch.contiguous_format, True),
        ((2, 64, 4, 4), torch.float64, torch.channels_last, True),
        ((2, 64, 4, 4), torch.float32, torch.channels_last, False),
    ],
    ids=["channels", "layout", "dtype", "evaluation"],
)
def test_everything_else_is_torchs_own(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, training: bool
) -> None:
    x = images(shape, 1, dtype).contiguous(memory_format=layout)
    norm = a_norm(shape[1]).to(dtype).train(training)
    assert torch.equal(norm_relu(norm, x, x), F.relu(copy.deepcopy(norm)(x) + x))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_the_network_computes_with_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    call, calls = module._call, []
    monkeypatch.setattr(module, "_call", lambda name, *arguments: (calls.append(name), call(name, *arguments)))
    model = build("resnet50", 10, "bn+head", seed=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(images((2, 3, 64, 64), 1, torch.float32)).sum()
    loss.backward()
    assert (calls.count("forward"), calls.count("backward")) == (53, 53)  # every norm of the network


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda name: None)
    x, norm = images(SHAPES[0], 1, torch.float32), a_norm(64)
    assert torch.equal(norm_relu(norm, x), F.relu(copy.deepcopy(norm)(x)))


def test_one_value_for_each_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(a_norm(64), images((1, 64, 1, 1), 1, torch.float32))


def test_batches_are_counted_once_for_all_layers() -> None:
    """As on GPUs: apart from the count the norm does what torch's does, and a layer that is frozen counts nothing."""
    images = torch.randn(4, 8, 3, 3)
    ours, theirs, frozen = (nn.BatchNorm2d(8, momentum=0.3) for _ in range(3))
    frozen.eval()
    assert torch.equal(module.uncounted(ours, images), theirs(images))
    module.count([ours, frozen])
    module.count([frozen])
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert frozen.num_batches_tracked == 0


def test_a_residual_of_another_shape_is_refused() -> None:
    """Torch's own says so; memory beyond the smaller one is never read."""
    x, residual = images((2, 64, 8, 8), 0, torch.float32), images((2, 64, 4, 4), 1, torch.float32)
    with pytest.raises(RuntimeError, match="size"):
        norm_relu(a_norm(64), x, residual)
