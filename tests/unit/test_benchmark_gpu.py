"""`benchmark gpu` without a GPU: its plan, what it reads out of a profile, its table, and its refusal on cores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_eurosat import benchmark
from hvd_eurosat.benchmarks import gpu, gpu_job, job, results, roofline
from hvd_eurosat.benchmarks.gpu import KINDS, MODES, SIZES
from hvd_eurosat.benchmarks.roofline import Event
from hvd_eurosat.benchmarks.settings import GpuJobSettings, GpuSettings
from hvd_eurosat.cluster import device
from hvd_eurosat.config.schema import Config
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import LandCoverResNet
from tests.unit.conftest import Grow
from tests.unit.test_keys import grow_tree, here


def test_the_plan() -> None:
    tasks = [task for task in gpu.plan(25_380) if task.kind != gpu.RUN]
    assert sorted((task.mode, task.kind) for task in tasks) == sorted((mode, kind) for mode in MODES for kind in KINDS)
    assert {task.sizes for task in tasks if task.kind != "compiled"} == {SIZES}
    assert {task.sizes for task in tasks if task.kind == "compiled"} == {(64, 512)}
    assert tasks[0] == ("bn+head", "graphs", SIZES)
    assert gpu.plan(25_380)[3:6] == [(mode, gpu.RUN, (size,)) for mode, size in gpu.RUNS]
    assert {task.sizes for task in gpu.plan(100)} == {(32, 64), (64,)}
    assert {task.kind for task in gpu.plan(40)} == {"graphs", "eager"}
    assert not gpu.plan(31)


def test_a_profile() -> None:
    """Two kernels side by side count once; what only the host does is no launch."""
    events = [
        Event("cudaLaunchKernel", False, 0, 1),
        Event("cudaLaunchKernelExC", False, 1, 2),
        Event("cudaGraphLaunch", False, 2, 3),
        Event("cudaMemcpyAsync", False, 3, 4),
        Event("cudaEventRecord", False, 4, 5),
        Event("aten::conv2d", False, 0, 9),
        Event("a kernel", True, 10, 20),
        Event("another", True, 15, 25),
        Event("within", True, 11, 12),
        Event("the last", True, 30, 40),
    ]
    assert roofline.launches(events) == 4
    assert roofline.busy(events) == pytest.approx(25 / 30)
    assert roofline.busy(events[:6]) is None


def test_what_torch_says_of_a_profile() -> None:
    """Its own ranges are neither calls nor work of the device."""
    span = SimpleNamespace(start=1.0, end=2.0)
    found = [
        SimpleNamespace(name="cudaLaunchKernel", device_type="DeviceType.CPU", time_range=span),
        SimpleNamespace(name="kernel", device_type="DeviceType.CUDA", time_range=span, is_user_annotation=False),
        SimpleNamespace(name="step", device_type="DeviceType.CUDA", time_range=span, is_user_annotation=True),
    ]
    assert list(roofline._events(found)) == [
        Event("cudaLaunchKernel", False, 1, 2),
        Event("kernel", True, 1, 2),
    ]


def test_what_a_step_asks_for() -> None:
    """A small network: a head alone goes forward; all weights go back twice for each time forward, but the first."""
    config = Config(model={"arch": "resnet18"}, data={"image_size": 32})
    head, all_of = (roofline.work(config, mode, 10, 4) for mode in ("head", "all"))
    first = 2 * 4 * 16 * 16 * 64 * 3 * 7 * 7
    assert all_of.flops == pytest.approx(3 * head.flops - first, rel=1e-3)
    twice = roofline.work(config, "head", 10, 8)
    assert twice.flops == 2 * head.flops
    weights = 2 * 11_176_512
    assert head.bytes > weights
    assert twice.bytes == pytest.approx(2 * head.bytes - weights, rel=0.05)


PEAKS = {"flops": 8e14, "bytes": 4e12}


class Planted:
    """A launcher whose jobs found this: 1,000 steps a second, whatever the size, if it fits: below `limit` images."""

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self.keys: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []

    def threads(self, ranks: int) -> int:
        return 1

    def measured(self, module: str, ranks: int, steps: int, threads: int, keys: dict[str, Any]) -> list[dict[str, Any]]:
        assert (ranks, module) == (1, "gpu_job")
        assert keys["train.epochs"] == gpu.EPOCHS
        self.keys.append(keys)
        (mode,) = json.loads(keys["modes"])
        cases = [
            {
                "size": size,
                "images_per_second": 1000.0 * size,
                "launches": 840.4,
                "busy": 0.25,
                "flops": 8e10,
                "bytes": 2e9,
                "peak_mb": 1234.0,
                "fixed": {"order": 0.05, "validation": 0.1, "snapshot": 0.05},
                "kept": {"images_per_second": 9e6, "launches": 2.0, "busy": None} if mode == "head" else None,
            }
            for size in json.loads(keys["sizes"])
        ]
        cases = [case if case["size"] < self.limit else {"size": case["size"]} for case in cases]
        return [{"GPU": "NVIDIA H200", "precision": "bf16", "peaks": PEAKS, "cases": cases}]

    def trained(self, keys: dict[str, Any]) -> dict[str, float]:
        self.runs.append(keys)
        return {"start_up": 9.0, "all": 20.0, "training": 15.0, "validation": 4.0}


@pytest.fixture
def data(grow: Grow) -> Path:
    """A tree with 64 training images."""
    return grow(
        "data", {"train/A": 32, "train/B": 32, **{f"{s}/{name}": 1 for s in ("valid", "test") for name in "AB"}}
    )


def test_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    monkeypatch.setattr(device, "visible", lambda: (1, ""))
    launcher = Planted()
    *_, found = gpu.measure(launcher, GpuSettings(data={"root": data}), lambda _: None)
    assert [json.loads(keys["modes"]) for keys in launcher.keys] == [[mode] for mode in MODES] * 3
    assert [keys["train.graphs"] for keys in launcher.keys] == [True] * 3 + [False] * 3 + [True] * 3
    assert [keys["train.compile"] for keys in launcher.keys] == [False] * 6 + [True] * 3
    ran = {"model.trainable": "bn+head", "train.batch_size": 64, "train.epochs": 50} | KINDS["graphs"]
    assert launcher.runs == [ran]  # of 64 images no step has 512
    rows = list(gpu.rows(found))
    assert len({tuple(row) for row in rows}) == 1
    assert list(rows[0].values()) == [
        "bn+head", "graphs", "32", "32,000", "840", "25 %", "10 %", "50 %", "1,234", "0.20", "",
    ]  # fmt: skip
    assert next(row for row in rows if row["what"] == "compiled")["of memory"] == ""
    kept = [row for row in rows if row["what"].endswith(", kept")]
    assert {row["mode"] for row in kept} == {"head"}
    assert [kept[0][name] for name in ("images/s", "launches", "GPU busy", "fixed s")] == ["9,000,000", "2", "", ""]
    nothing = [""] * 5
    assert [list(row.values()) for row in rows[-2:]] == [
        ["bn+head", "train", "64", "160", *nothing, "0.10", "20"],
        ["bn+head", "rmldnn on an A100", "64", "2,115", *nothing, "", "600"],
    ]
    found["cases"][1]["busy"] = None
    assert list(gpu.rows(found))[1]["GPU busy"] == ""
    found["cases"].append({"size": 1024, "mode": "all", "kind": "eager"})
    results.draw(results.merge(tmp_path, "gpu", found), tmp_path / "benchmark.png")
    results.show("gpu", results.read_results(tmp_path)["gpu"])
    said = capsys.readouterr().out
    assert "too large" in said
    assert "rmldnn" in said
    assert all(name in said for name in gpu.COLUMNS)


def test_no_run_of_batches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(device, "visible", lambda: (1, ""))
    launcher = Planted(limit=64)
    *_, found = gpu.measure(launcher, GpuSettings(data={"root": data}), lambda _: None)
    assert not launcher.runs
    assert [row["images/s"] for row in gpu.rows(found)][:2] == ["32,000", "too large"]


def test_cores_are_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before the data are looked for."""
    monkeypatch.setattr(device, "visible", lambda: (0, ""))
    monkeypatch.setattr(device, "obstacle", lambda: None)
    assert benchmark.main(["gpu", f"--run.dir={tmp_path}", "--data.root=nowhere"]) == 2
    said = "error: benchmark gpu: there is no NVIDIA GPU that this process may use; the other subcommands measure cores"
    assert capsys.readouterr().err.splitlines() == [f"{said}, too"]


def test_too_few_images(monkeypatch: pytest.MonkeyPatch, grow: Grow) -> None:
    monkeypatch.setattr(device, "visible", lambda: (1, ""))
    few = grow("few", {f"{split}/{name}": 1 for split in ("train", "valid", "test") for name in "AB"})
    with pytest.raises(UserError, match="few has 2 training images, fewer than the 32 of the smallest step"):
        list(gpu.measure(Planted(), GpuSettings(data={"root": few}), print))


def test_a_size_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the next one is measured."""

    def measured(*_: Any) -> dict[str, Any]:
        size = _[-1]
        if size == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"precision": "bf16", "images_per_second": 3.0}

    monkeypatch.setattr(gpu_job, "measured", measured)
    monkeypatch.setattr(gpu_job, "opened", lambda world, settings, splits: (settings, None, None))
    monkeypatch.setattr(roofline, "peaks", lambda _: PEAKS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    world = SimpleNamespace(device=torch.device("cuda", 0), watch=lambda _: None)
    gpu_job.main(world, GpuJobSettings(modes=("all",), sizes=(32, 64, 128), out=tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    assert found["precision"] == "bf16"
    assert [case.get("images_per_second") for case in found["cases"]] == [3.0, None, 3.0]


def test_a_case_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On cores, in place of the GPU: the loop, its profile and what an epoch costs once."""
    nothing = {
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 5e6,
    }
    for name, stand_in in nothing.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls: list[int] = []
    whole: list[int] = []
    features, timed = LandCoverResNet.features, gpu_job.timed
    monkeypatch.setattr(LandCoverResNet, "features", lambda *given: (calls.append(1), features(*given))[1])

    def counted(loop: job.Loop, steps: int) -> float:
        before, seconds = len(calls), timed(loop, steps)
        whole.append(len(calls) - before)
        return seconds

    monkeypatch.setattr(gpu_job, "timed", counted)
    profile = [Event("cudaLaunchKernel", False, 0, 1)] * 10
    monkeypatch.setattr(roofline, "profiled", lambda task: (task(), profile)[1])
    keys = {"arch": "resnet18", "weights": "none"}
    given = GpuJobSettings(
        modes=("head",),
        sizes=(4,),
        steps=2,
        warm_up=1,
        out=tmp_path,
        model=keys,
        data={"root": grow_tree(tmp_path / "tree", 32), "image_size": 32},
    )
    settings, opened, images = job.opened(here(), given, ["train", "valid"])
    found = gpu_job.measured(here(), settings, opened, images, "head", 4)
    assert found["images_per_second"] > 0
    assert (found["launches"], found["busy"], found["peak_mb"]) == (10 / gpu_job.PROFILED, None, 5)
    assert found["flops"] == roofline.work(settings, "head", 2, 4).flops
    assert found["fixed"].keys() == {"order", "validation", "snapshot"}
    assert not found["captured"]
    assert found["kept"]["images_per_second"] > 0
    assert whole == [2, 0]  # of the two steps that are timed, first as they begin, then with features kept
