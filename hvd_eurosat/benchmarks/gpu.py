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
RUN = "train"  # the kind of a job that is a whole run, and no steps alone
EPOCHS = 50
RUNS = (("bn+head", 64), ("bn+head", 512), ("head", 512))
PEER_SIZE, PEER_IMAGES, PEER_SECONDS = 64, 25_380, 600  # its tutorial: as many epochs of EuroSAT, bn+head, on an A100
COLUMNS = ("images/s", "launches", "GPU busy", "of bf16", "of memory", "MB", "fixed s", f"{EPOCHS} epochs, s")


class Task(NamedTuple):
    """One job: what trains, how its steps are launched, and the images of a step, in turn; or one run for each size."""

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
    tasks[len(MODES) : len(MODES)] = [Task(mode, RUN, (size,) if size <= images else ()) for mode, size in RUNS]
    return [task for task in tasks if task.sizes]


def measure(launcher: Launcher, settings: GpuSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "gpu" section after each job. Raises UserError where there is no GPU, or too few images."""
    check(settings.hosts)
    images = len(open_tree(settings.data.root).files("train"))
    tasks = plan(images)
    if not tasks:
        few = f"{settings.data.root} has {images} training images"
        raise UserError(f"benchmark gpu: {few}, fewer than the {SIZES[0]} of the smallest step")
    found: dict[str, Any] = {"images": images, "cases": [], "runs": []}
    for number, task in enumerate(tasks, start=1):
        say(f"{number} of {len(tasks)}: {task.mode}, {task.kind}")
        if task.kind == RUN:
            fitting = {(case["mode"], case["size"]) for case in found["cases"] if "images_per_second" in case}
            found["runs"] += [run(launcher, task.mode, size) for size in task.sizes if (task.mode, size) in fitting]
            yield found
            continue
        keys = {"modes": json.dumps([task.mode]), "sizes": json.dumps(task.sizes), "train.epochs": EPOCHS}
        (of,) = launcher.measured("gpu_job", 1, settings.steps, launcher.threads(1), keys | KINDS[task.kind])
        found |= {"GPU": of["GPU"], "precision": of["precision"], "peaks": of["peaks"]}
        found["cases"] += [case | {"mode": task.mode, "kind": task.kind} for case in of["cases"]]
        yield found


def run(launcher: Launcher, mode: str, size: int) -> dict[str, Any]:
    """A whole run of `train`: what trains, images a step, epochs, and its seconds."""
    keys = {"model.trainable": mode, "train.batch_size": size, "train.epochs": EPOCHS, **KINDS["graphs"]}
    return {"mode": mode, "size": size, "epochs": EPOCHS, "seconds": launcher.trained(keys)}


def rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The table: steps, of which those that found no room in the GPU's memory say so; whole runs; and the peer's."""
    for case in found["cases"]:
        row = _row(case["mode"], case["kind"], case["size"])
        if "images_per_second" not in case:
            yield row | {"images/s": "too large"}
            continue
        yield row | _launched(case) | _bounds(case, found["peaks"])
        if kept := case.get("kept"):
            yield row | {"what": f"{case['kind']}, kept"} | _launched(kept)
    for of in found["runs"]:
        seconds, beside = of["seconds"]["all"], of["seconds"]["all"] - of["seconds"]["training"]
        row = _row(of["mode"], RUN, of["size"]) | {"fixed s": f"{beside / of['epochs']:.2f}"}
        yield row | _whole(of["epochs"] * found["images"], seconds)
    yield _row("bn+head", "rmldnn on an A100", PEER_SIZE) | _whole(EPOCHS * PEER_IMAGES, PEER_SECONDS)


def _row(mode: str, what: str, size: int) -> dict[str, str]:
    return {"mode": mode, "what": what, "batch": f"{size:,}"} | dict.fromkeys(COLUMNS, "")


def _launched(case: Mapping[str, Any]) -> dict[str, str]:
    return {
        "images/s": f"{case['images_per_second']:,.0f}",
        "launches": f"{case['launches']:,.0f}",
        "GPU busy": "" if case["busy"] is None else f"{100 * case['busy']:.0f} %",
    }


def _bounds(case: Mapping[str, Any], peaks: Mapping[str, float]) -> dict[str, str]:
    steps = case["images_per_second"] / case["size"]
    compiled = case["kind"] == "compiled"  # fewer bytes than kernel by kernel
    return {
        "of bf16": f"{100 * case['flops'] * steps / peaks['flops']:.0f} %",
        "of memory": "" if compiled else f"{100 * case['bytes'] * steps / peaks['bytes']:.0f} %",
        "MB": f"{case['peak_mb']:,.0f}",
        "fixed s": f"{sum(case['fixed'].values()):.2f}",
    }


def _whole(images: int, seconds: float) -> dict[str, str]:
    return {"images/s": f"{images / seconds:,.0f}", COLUMNS[-1]: f"{seconds:,.0f}"}
