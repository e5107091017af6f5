"""BatchNorm, addition and ReLU as Triton's kernels, against torch's operators in double precision; and how fast.

Where there is no GPU, tests/unit/test_norm_relu_gpu.py runs them by Triton's interpreter, on tensors of the CPU: all
but those that want a real one.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_eurosat.model import norm_relu as module
from hvd_eurosat.model.norm_relu import norm_relu
from tests.gpu.conftest import Note
from tests.gpu.loop import Loop, Scale, configuration
from tests.gpu.test_step import PRECISIONS

kernels: Any = pytest.importorskip("hvd_eurosat.model.norm_relu_kernels", reason="there is no Triton")
norm_relu_gpu: Any = pytest.importorskip("hvd_eurosat.model.norm_relu_gpu")
Cut = norm_relu_gpu.Cut

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
SMALL = (2, 48, 7, 6)  # interpreted: two columns, the second not full, and two parts, of which the first has two tiles
LARGE = [(64, 64, 32, 32), (33, 256, 16, 16), (64, 2048, 2, 2)]  # as in ResNet-50
ERROR = {torch.float32: 2e-3, torch.bfloat16: 1e-2}  # a number beside 0 may be on ReLU's other side
KINDS = {  # whether it adds, has a ReLU, and whether its input learns
    "alone": (False, True, True),
    "adds": (True, True, True),
    "shortcut": (False, False, True),
    "first": (False, True, False),
}
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="it takes a GPU")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what `norm_relu` takes."""
    if INTERPRETED:
        monkeypatch.setattr(module, "_is_on_gpu", lambda _: True)
        monkeypatch.setattr(module, "obstacle", lambda *_: None)
        monkeypatch.setattr(norm_relu_gpu, "PROGRAMS", 4)
        for name, number in (("ROWS", 32), ("HALF", 16), ("PARTS", 8)):
            monkeypatch.setattr(kernels, name, kernels.tl.constexpr(number))
    for dtype in ERROR:
        assert module.obstacle(DEVICE, dtype) is None


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    """Random ones, channels last."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def a_norm(channels: int) -> nn.BatchNorm2d:
    """With random weights, biases and statistics."""
    norm, generator = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, statistics(norm)["running_mean"]):
            tensor.copy_(torch.randn(channels, generator=generator))
        statistics(norm)["running_var"].add_(torch.rand(channels, generator=generator))
    return norm.to(DEVICE)


def statistics(norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    """The running ones."""
    return {name: buffer for name, buffer in norm.named_buffers() if buffer.is_floating_point()}


def trained(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, learns: bool = True, relu: bool = True
) -> dict[str, Tensor]:
    """The output, all gradients (x's if it `learns`), and the norm's buffers after one pass each way."""
    x, residual = x.requires_grad_(learns), None if residual is None else residual.requires_grad_()
    output = norm_relu(norm, x, residual, relu)
    output.backward(images(tuple(x.shape), 3, torch.bfloat16, 0.1).to(x.dtype).contiguous())
    trains = {"x": x, "residual": residual, **dict(norm.named_parameters())}
    grads = {name: leaf.grad for name, leaf in trains.items() if leaf is not None and leaf.grad is not None}
    return {"output": output.detach(), **grads, **statistics(norm)}


def apart(one: Tensor, other: Tensor) -> float:
    """In proportion."""
    return float((one.detach().double() - other.detach()).norm() / other.detach().double().norm())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    launch, names = Cut.launch, []

    def counted(cut: Any, kernel: Any, *arguments: Any, **how: Any) -> None:
        names.append(kernel.__name__)
        launch(cut, kernel, *arguments, **how)

    monkeypatch.setattr(Cut, "launch", counted)
    return names


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("adds", "relu", "learns"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", [SMALL, *(pytest.param(shape, marks=on_a_gpu) for shape in LARGE)], ids=str)
def test_it_is_what_torch_computes(
    shape: tuple[int, ...], dtype: torch.dtype, adds: bool, relu: bool, learns: bool, launches: list[str]
) -> None:
    x, residual = images(shape, 1, dtype), images(shape, 2, dtype) if adds else None
    norm = a_norm(shape[1])
    exact = trained(
        copy.deepcopy(norm).double(), x.double(), None if residual is None else residual.double(), learns, relu
    )
    assert launches == []
    ours = trained(norm, x.clone(), residual, learns, relu)
    assert launches == ["statistics", "forward", "sums", "backward"]
    assert ours.keys() == exact.keys()
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, value in exact.items():
        assert apart(ours[name], value) < ERROR[dtype], name


@pytest.mark.timeout(60)
def test_the_trial_at_the_start_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(norm_relu_gpu, "CASE", (3, 48, 7, 4))
    norm_relu_gpu.obstacle.cache_clear()
    assert norm_relu_gpu.obstacle(DEVICE, torch.bfloat16) is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "adds"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_evaluation_is_one_kernel(dtype: torch.dtype, adds: bool, launches: list[str]) -> None:
    """Where nothing trains; it changes no statistics."""
    x, residual = images(SMALL, 1, dtype), images(SMALL, 2, dtype) if adds else None
    norm = a_norm(SMALL[1]).eval()
    before = [buffer.clone() for buffer in norm.buffers()]
    exact = copy.deepcopy(norm).double()(x.double()) + (0 if residual is None else residual.double())
    with torch.no_grad():
        ours = norm_relu(norm, x, residual)
    assert apart(ours, F.relu(exact)) < ERROR[dtype]
    assert launches == ["forward"]
    assert all(map(torch.equal, before, norm.buffers()))
    norm_relu(norm, x, residual).sum().backward()
    assert launches == ["forward"]  # its weight learns: that is torch's


@pytest.mark.timeout(60)
def test_a_mean_far_from_zero() -> None:
    x, norm = images(SMALL, 1, torch.float32, mean=1000.0), a_norm(SMALL[1])
    exact = F.relu(F.batch_norm(x.double(), None, None, norm.weight.double(), norm.bias.double(), True, eps=norm.eps))
    assert (norm_relu(norm, x) - exact).abs().max() < 1e-2


@pytest.mark.timeout(60)
def test_a_first_pixel_far_from_the_others() -> None:
    x, norm = images((2, 16, 32, 8), 1, torch.float32).mul_(0.03), a_norm(16)
    x[0, :, 0, 0] = 100
    exact = copy.deepcopy(norm).double()
    exact(x.double())
    norm_relu(norm, x)
    ours, wanted = (statistics(each)["running_var"].double() for each in (norm, exact))
    assert torch.allclose(ours, wanted, rtol=1e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, norm = images(SMALL, 1, torch.bfloat16), a_norm(SMALL[1])
    x[0, 3, 0, 0] = value
    output = norm_relu(norm, x)
    assert output[:, 3].isnan().all()
    assert statistics(norm)["running_var"][3].isnan()
    assert output.isfinite().sum() * 48 == output.numel() * 47


@pytest.mark.timeout(60)
def test_nothing_beside_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads, and what it makes, lies among numbers that are none."""
    pieces = []

    def beside(count: int, dtype: torch.dtype) -> Tensor:
        pieces.append(torch.full((count + 2 * 4096,), torch.nan, dtype=dtype, device=DEVICE))
        return pieces[-1][4096:-4096]

    def like(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return beside(x.numel(), x.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)

    def empty(*shape: int, device: torch.device) -> Tensor:
        return beside(torch.Size(shape).numel(), torch.float32).view(shape)

    x, residual, gradient = (
        like(images(SMALL, 1, torch.float32)).copy_(images(SMALL, n, torch.float32)) for n in (1, 2, 3)
    )
    norm = a_norm(SMALL[1])
    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch, "empty", empty)
    norm_relu(norm, x.requires_grad_(), residual.requires_grad_()).backward(gradient)
    assert len(pieces) == 3 + 3 + 4  # matrices given, matrices made, tables and vectors
    for piece in pieces:
        assert piece[:4096].isnan().all()
        assert piece[-4096:].isnan().all()
        assert not piece[4096:-4096].isnan().any()


@on_a_gpu
@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", [SMALL, *LARGE], ids=str)
def test_bits_repeat(shape: tuple[int, ...]) -> None:
    results = [trained(a_norm(shape[1]), *(images(shape, seed, torch.bfloat16) for seed in (1, 2))) for _ in range(10)]
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, result[name]), name


@on_a_gpu
@pytest.mark.timeout(60)
def test_a_graph_gives_the_same_bits() -> None:
    x, residual, gradient = (images(LARGE[1], seed, torch.bfloat16) for seed in (1, 2, 3))
    norm = a_norm(LARGE[1][1])
    leaves = [x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias]

    def work() -> list[Tensor]:
        output = norm_relu(norm, x, residual)
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    wanted = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))


@on_a_gpu
@pytest.mark.timeout(60)
@pytest.mark.parametrize("trainable", ["bn+head", "all"])
def test_a_step_is_that_of_torchs_operators(trainable: str, scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, by its gradients, within what test_step.py allows."""
    gradients = []
    for obstacle in (None, "not wanted"):
        monkeypatch.setattr(module, "obstacle", lambda *_, said=obstacle: said)
        loop = Loop(configuration(scale, "sgd", trainable), scale.device, graphs=False)
        loop.losses(1)
        gradients.append(torch.cat(loop.step.gradients.buffers).double())
    assert apart(*gradients) < PRECISIONS["fp32"][1]


@on_a_gpu
@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [4, 32])
def test_how_fast_it_is(times: int, scale: Scale, note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of bn+head in bf16 as graphs, with the kernels and with torch's operators: which is faster decides."""
    scale = dataclasses.replace(scale, batch=times * scale.batch)
    for name, obstacle in (("Triton's kernels", None), ("torch's operators", "not wanted")):
        monkeypatch.setattr(module, "obstacle", lambda *_, said=obstacle: said)
        loop = Loop(configuration(scale, precision="bf16"), scale.device, count=30 * scale.batch)
        loop.losses(8)
        rate = 20 * scale.batch / loop.seconds(20)
        note(f"bn+head, batches of {scale.batch}, graphs, BatchNorm by {name}: images/s", rate)
