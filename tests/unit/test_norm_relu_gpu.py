"""BatchNorm and ReLU as Triton's kernels: what they compute, by Triton's interpreter; when they are taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_eurosat.model import norm_relu as module
from hvd_eurosat.model import norm_relu_gpu
from hvd_eurosat.model.norm_relu import norm_relu
from hvd_eurosat.model.norm_relu_gpu import Cut
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run import header
from hvd_eurosat.training.precision import Precision

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cpu")
ON_GPU = "tests/gpu/test_norm_relu.py"


@pytest.mark.long
def test_they_compute_what_torch_does() -> None:
    """The tests for a GPU, by Triton's interpreter, which must be asked for before Triton is imported."""
    words = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", ON_GPU]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


Launch = tuple[Any, tuple[Any, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would be launched."""
    asked: list[Launch] = []
    monkeypatch.setattr(Cut, "launch", lambda cut, kernel, *given, **_: asked.append((kernel, (*given, 7, 48, 256, 1))))
    return asked


@pytest.mark.parametrize(
    ("adds", "learns", "dtype", "capability"),
    [
        (True, True, torch.bfloat16, 90),
        *(
            pytest.param(adds, learns, dtype, capability, marks=pytest.mark.long)
            for capability in (80, 90, 120)
            for dtype in (torch.bfloat16, torch.float32)
            for adds, learns in ((True, True), (False, True), (False, False))
        ),
    ],
)
def test_they_compile_for_gpus(
    adds: bool,
    learns: bool,
    dtype: torch.dtype,
    capability: int,
    launches: list[Launch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To machine code, as they are called; and no number is kept outside of the registers."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, norm = torch.zeros(2, 48, 4, 4, dtype=dtype).to(memory_format=torch.channels_last), nn.BatchNorm2d(48)
    output = norm_relu_gpu.norm_relu(norm, x.requires_grad_(learns), x.clone() if adds else None, True)
    output.sum().backward()
    norm_relu_gpu.norm_relu(norm.eval(), x, None, True)
    assert [kernel.__name__ for kernel, _ in launches] == ["statistics", "forward", "sums", "backward", "forward"]
    for kernel, given in launches:
        words = dict(zip(kernel.arg_names, given, strict=True))
        kinds = {name: kind_of(value) for name, value in words.items()}
        constants = {name: value for name, value in words.items() if kinds[name] == "constexpr"}
        aligned = [name for name, kind in kinds.items() if kind.startswith("*") or name == "channels"]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, kinds, constants, attributes)
        made = compiled(source, GPUTarget("cuda", capability, 32), {"num_warps": norm_relu_gpu.WARPS})
        assert made.asm["cubin"]
        assert ".local" not in made.asm["ptx"]
        assert "ld.global.v4" in made.asm["ptx"]  # 16 bytes at a time
        assert not re.search(r"\b(atom|red)\.", made.asm["ptx"])


def kind_of(value: Any) -> str:
    """As Triton names an argument's type."""
    if isinstance(value, Tensor):
        return {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
    return {int: "i32", float: "fp32"}.get(type(value), "constexpr")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Tensors count as on a GPU; the kernels compute as torch does, and take down what they are given."""
    given: list[Tensor] = []

    def taken(norm: nn.BatchNorm2d, images: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        given.append(images)
        return norm_relu_gpu._by_torch(norm, images, residual, relu)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_is_on_gpu", lambda _: True)
        patch.setattr(module, "obstacle", lambda *_: None)
        patch.setattr(norm_relu_gpu, "norm_relu", taken)
        yield given


def images(seed: int = 0, channels: int = 64) -> Tensor:
    """Random ones, float32 [2, channels, 4, 4], channels last."""
    values = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return values.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("trainable", ["bn+head", "head"])
def test_every_layer_takes_them_in_training_and_evaluation(trainable: str, on_gpu: list[Tensor]) -> None:
    model = build("resnet18", 10, trainable, seed=0)
    model(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
    assert len(on_gpu) == 20
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert len(on_gpu) == 40


@pytest.mark.parametrize(
    "call",
    [
        lambda: norm_relu(nn.BatchNorm2d(60), images(channels=60)),
        lambda: norm_relu(nn.BatchNorm2d(64), images().contiguous()),
        lambda: norm_relu(nn.BatchNorm2d(64).double(), images().double()),
        lambda: norm_relu(nn.BatchNorm2d(64, affine=False), images()),
        lambda: norm_relu(nn.BatchNorm2d(64).eval(), images()),
        lambda: norm_relu(nn.BatchNorm2d(64).eval().requires_grad_(False), images().requires_grad_()),
    ],
    ids=["channels", "layout", "dtype", "no weights", "evaluation that learns", "a frozen layer between others"],
)
def test_everything_else_is_torchs_own(call: Callable[[], Tensor], on_gpu: list[Tensor]) -> None:
    assert call().requires_grad or not on_gpu
    assert on_gpu == []


def test_more_numbers_than_the_kernels_count(on_gpu: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", images().numel())
    norm_relu(nn.BatchNorm2d(64), images())
    assert on_gpu == []
    norm_relu(nn.BatchNorm2d(64), images()[:1])
    assert len(on_gpu) == 1


def test_compiled_code_is_inductors(on_gpu: list[Tensor]) -> None:
    """With torch's operators in one graph, which inductor fuses by itself."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    norm, x = nn.BatchNorm2d(64), images()
    compiled = torch.compile(norm_relu, fullgraph=True, backend=backend)
    assert torch.equal(compiled(norm, x, images(1)), F.relu(nn.BatchNorm2d(64)(x) + images(1)))
    assert len(graphs) == 1
    assert on_gpu == []
    norm_relu(norm, x)
    assert len(on_gpu) == 1


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU was tried yet, and a small case does."""
    monkeypatch.setattr(norm_relu_gpu, "CASE", (3, 48, 3, 3))
    norm_relu_gpu.obstacle.cache_clear()
    yield
    norm_relu_gpu.obstacle.cache_clear()


def broken(*_: object) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


WRONG = {
    "right": (norm_relu_gpu._by_torch, None),
    "its output": (lambda *given: norm_relu_gpu._by_torch(*given) * 1.1, "Triton's output is not torch's"),
    "no number": (lambda *given: norm_relu_gpu._by_torch(*given) * torch.nan, "Triton's output is not torch's"),
    "a gradient": (
        lambda norm, x, *given: norm_relu_gpu._by_torch(norm, x * 1.0 + 0.1 * (x - x.detach()), *given),
        "Triton's gradient of images is not torch's",
    ),
    "no compiler": (
        broken,
        "Triton failed: Failed to find C compiler. Please specify via CC environment variable.",
    ),
}


@pytest.mark.parametrize(("computes", "why"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh")
def test_a_gpu_is_tried_first(
    computes: Callable[..., Tensor], why: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and in bf16, too, where nothing has a gradient."""
    monkeypatch.setattr(norm_relu_gpu, "norm_relu", computes)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert norm_relu_gpu.obstacle(DEVICE, dtype) == why


@pytest.mark.usefixtures("fresh")
def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    why = module.obstacle(torch.device("cuda", 0), torch.float32)
    assert why == "its compute capability is 7.5, and Triton wants 8.0"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module._gpu.cache_clear()
    monkeypatch.setitem(sys.modules, "hvd_eurosat.model.norm_relu_gpu", None)
    monkeypatch.delattr("hvd_eurosat.model.norm_relu_gpu")
    assert module.obstacle(torch.device("cuda", 0), torch.float32) == "there is no Triton"
    module._gpu.cache_clear()


@pytest.mark.parametrize(
    ("compiled", "others", "said"),
    [
        (False, [], "NVIDIA H100, BatchNorm and ReLU not fused: no torch.bfloat16"),
        (True, [], "NVIDIA H100"),
        (True, ["no compiler"], "NVIDIA H100, BatchNorm and ReLU not fused: no compiler"),
    ],
)
def test_the_header_says_why_they_are_not_taken(
    compiled: bool, others: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any rank; where the network is compiled they are not wanted."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(module, "obstacle", lambda device, dtype: f"no {dtype}")
    state, step = SimpleNamespace(precision=Precision("bf16")), SimpleNamespace(compiled=compiled)
    world = SimpleNamespace(device=torch.device("cuda", 0), gather=lambda mine: [mine, *others])
    assert header._device(world, step, state) == said
