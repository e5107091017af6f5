"""How fast one GPU trains: what trains, images a step, and how the step is launched; and what bounds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hvd_eurosat.benchmarks.launcher import Launcher
from hvd_eurosat.benchmarks.settings import GpuSettings
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError

MODES = ("bn+head", "all", "head")
SIZES = (32, 64, 128, 256, 512, 1024)
COMPILED = (64, 512)  # each takes a minute to compile
KINDS: dict[str, dict[str, object]] = {
    "eager": {"train.graphs": False, "train.compile": False},
    "graphs": {"train.graphs": True, "train.compile": False},
    "compiled": {"train.graphs": True, "train.compile": True},
}
EPOCHS, PEER_SECONDS = 50, 600  # the peer's tutorial, on an A100


class Task(NamedTuple):
    """One job: what trains, how its steps are launched, and the images of a step, in turn."""

    mode: str
    kind: str
    sizes: tuple[int, ...]


def check(hosts: str) -> None:
    """Raise UserError where there is no GPU, or where hosts are named."""
    from hvd_eurosat.cluster import device

    if hosts:
        raise UserError(f"benchmark gpu: --hosts {hosts}: it measures one GPU of this machine")
    if not device.visible()[0]:
        why = device.obstacle() or "there is no NVIDIA GPU that this process may use"
        raise UserError(f"benchmark gpu: {why}; the other subcommands measure cores, too")


def plan(images: int) -> list[Task]:
    """All jobs, those first that tell most; no step has more images than there are."""
    tasks = [
        Task(mode, kind, tuple(size for size in (COMPILED if kind == "compiled" else SIZES) if size <= images))
        for kind in ("graphs", "eager", "compiled")
        for mode in MODES
    ]
    return [task for task in tasks if task.sizes]


def measure(launcher: Launcher, settings: GpuSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "gpu" section after each job. Raises UserError where there is no GPU, or too few images."""
    check(settings.hosts)
    images = len(open_tree(settings.data.root).files("train"))
    tasks = plan(images)
    if not tasks:
        few = f"{settings.data.root} has {images} training images"
        raise UserError(f"benchmark gpu: {few}, fewer than the {SIZES[0]} of the smallest step")
    found: dict[str, Any] = {"images": images, "cases": []}
    for number, task in enumerate(tasks, start=1):
        say(f"{number} of {len(tasks)}: {task.mode}, {task.kind}")
        keys = {"modes": json.dumps([task.mode]), "sizes": json.dumps(task.sizes), **KINDS[task.kind]}
        (of,) = launcher.measured("gpu_job", 1, settings.steps, launcher.threads(1), keys)
        found |= {"GPU": of["GPU"], "precision": of["precision"], "peaks": of["peaks"]}
        found["cases"] += [case | {"mode": task.mode, "kind": task.kind} for case in of["cases"]]
        yield found


def rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The table: a case that found no room in the GPU's memory says so."""
    for case in found["cases"]:
        row = {"mode": case["mode"], "what": case["kind"], "images a step": f"{case['size']:,}"}
        if "images_per_second" not in case:
            yield row | {"images/s": "too large"} | dict.fromkeys(FIGURES, "")
            continue
        rate, fixed = case["images_per_second"], sum(case["fixed"].values())
        steps = rate / case["size"]
        figures = (
            f"{case['launches']:,.0f}",
            "" if case["busy"] is None else f"{100 * case['busy']:.0f} %",
            f"{100 * case['flops'] * steps / found['peaks']['flops']:.0f} %",
            f"{100 * case['bytes'] * steps / found['peaks']['bytes']:.0f} %" if case["kind"] != "compiled" else "",
            f"{case['peak_mb']:,.0f}",
            f"{fixed:.2f}",
            f"{EPOCHS * (found['images'] / rate + fixed):,.0f}",
        )
        yield row | {"images/s": f"{rate:,.0f}"} | dict(zip(FIGURES, figures, strict=True))


FIGURES = ("launches", "GPU busy", "of bf16", "of memory", "MB", "fixed s", f"{EPOCHS} epochs, s")
