"""A land-cover map of whole scenes: rasters, areas, polygons, a picture and a page to click on.

python -m hvd_eurosat.map --checkpoint runs/finetune/checkpoints/best.json --scene scene.tif --out maps/scene
"""

from __future__ import annotations

from hvd_eurosat.cluster.command_line import answer
from hvd_eurosat.config import verbs

if __name__ == "__main__":
    answer(verbs.map_scenes)  # before the imports below, which take seconds

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.signals import StopRequest
from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.verbs import MapSettings
from hvd_eurosat.errors import STOPPED, Stopped, UserError
from hvd_eurosat.run.display import Display
from hvd_eurosat.scene.mapping import Mapper, map_blocks
from hvd_eurosat.scene.parts import Parts
from hvd_eurosat.scene.plan import Plan, make_plan, scenes_in
from hvd_eurosat.scene.products import write_products
from hvd_eurosat.scene.result import Area
from hvd_eurosat.scene.source import Scene, SceneOptions, open_scene
from hvd_eurosat.scene.windows import cache_bytes
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.precision import precision_of
from hvd_eurosat.training.stragglers import slow_ranks

WRITING_PATIENCE = 10  # times watchdog_seconds


def main(world: World, settings: MapSettings) -> int:
    """Map the scenes one after the other, each over all ranks. Returns the job's exit status."""
    world.watch(settings.watchdog_seconds)
    stop, display = StopRequest(), Display(world.is_main)
    saved = world.on_main(lambda: checkpoint.load(settings.checkpoint))
    precision = precision_of(settings.precision, saved.precision)
    views = saved.views(settings.views)
    temperature = 1.0 if settings.raw else saved.temperature(views)
    model = saved.build_model(world.device).eval()
    network = Mapper(model, saved.data, precision, views, saved, world.device, temperature)
    scenes = world.on_main(lambda: scenes_in(settings))
    failed = 0
    for out, paths in scenes.items():
        try:
            map_scene(world, network, settings, paths, out, display, stop)
        except Stopped:
            display.say(f"stopped: the same command goes on with what is missing in {out}")
            return STOPPED
        except SharedError as error:
            if len(scenes) == 1:
                raise
            display.fail(f"{error}; the other scenes are mapped")
            failed += 1
    if failed:
        display.fail(f"{failed} of {len(scenes)} scenes could not be mapped")
    return 1 if failed else 0


def map_scene(
    world: World,
    network: Mapper,
    settings: MapSettings,
    paths: Sequence[str],
    out: Path,
    display: Display,
    stop: Callable[[], bool],
) -> None:
    """One scene into one folder, or what is missing there of its map. Collective. Raises Stopped on all ranks."""
    began = time.perf_counter()
    world.tick(f"opening {paths[0]}")
    said = settings.bands, settings.offset, settings.stretch, settings.resolution, settings.mask
    options = SceneOptions(*said, cache_bytes(settings.memory))
    with world.together(lambda: open_scene(paths, network.saved.wants, options)) as scene:
        asked = network.saved, network.precision.name, settings, paths, world.device
        plan = world.together(lambda: make_plan(scene, *asked))
        world.agree("scene", plan.work)
        parts = Parts(out)
        try:
            if not world.on_main(lambda: parts.begin(plan.work, world.tick)):
                display.say(f"the map in {out} is finished")
                return
            for warning in scene.warnings:
                display.warn(warning)
            windows = map_windows(world, network, scene, plan, parts, display, stop)

            def run() -> dict[str, Any]:
                known = {"ranks": world.size, "device": world.device.type, "windows": windows}
                return {**known, "seconds": time.perf_counter() - began}

            world.tick("writing the map", WRITING_PATIENCE)
            known = world.on_main(lambda: write_products(scene, network.saved, plan, parts, settings, run, world.tick))
            display.say(summary(known, plan, out, network.precision.name, run()))
        finally:
            parts.close()


def map_windows(
    world: World, network: Mapper, scene: Scene, plan: Plan, parts: Parts, display: Display, stop: Callable[[], bool]
) -> int:
    """All blocks that are not there yet, by whichever rank is free; returns their windows. Collective.

    Raises Stopped on all ranks, and SharedError where the scene cannot be read.
    """
    todo, done = world.on_main(lambda: parts.missing(len(plan.blocks))), 0
    there = len(plan.blocks) - len(todo)
    display.start(scene.name, len(todo), "block")

    def progress() -> None:
        world.tick()
        if display.is_due():
            display.show(parts.done() - there, f"of {plan.block_windows:,} windows")

    try:
        while todo:
            world.tick(f"mapping {scene.name}")
            work = partial(map_blocks, world, network, scene, plan, parts, todo, stop, progress)
            done += stragglers_named(world, share(world, work), display)
            if world.sum(torch.tensor(float(stop()))) > 0:
                raise Stopped
            world.on_main(parts.release)
            todo = world.on_main(lambda: parts.missing(len(plan.blocks)))  # a job that was killed may claim to the last
    except SharedError:
        world.on_main(parts.discard)
        raise
    finally:
        display.end()
    return done


def share(world: World, work: Callable[[], tuple[int, float]]) -> tuple[int, float]:
    """As World.together does, but no rank waits for another's pulse before all are done. Collective."""
    done, error = (0, 0.0), None
    try:
        done = work()
    except UserError as raised:
        error = str(raised)
    if errors := [one for one in world.gather(error) if one]:
        raise SharedError(errors[0])
    return done


def stragglers_named(world: World, work: tuple[int, float], display: Display) -> int:
    """Warn of ranks that took much longer for a window than the others; returns the windows of all. Collective."""
    ranks = world.gather((socket.gethostname(), *work))
    total = sum(windows for _, windows, _ in ranks)
    if all(windows for _, windows, _ in ranks):
        alike = [(host, seconds / windows * total / len(ranks)) for host, windows, seconds in ranks]
        for slow in slow_ranks(alike):
            display.warn(f"rank {slow['rank']} ({slow['host']}) was {slow['slower']:.0%} slower than the other ranks")
    return total


def summary(known: Sequence[Area], plan: Plan, out: Path, precision: str, run: Mapping[str, Any]) -> str:
    """The classes that there are, by their area, and what was done."""
    there = sorted((area for area in known if area.name and area.windows), key=lambda area: -(area.share or 0))
    width = max((len(area.name or "") for area in there), default=0)
    lines = [f"{'class':<{width}}   share      hectares  confidence"] if there else []
    for area in there:
        hectares = "" if area.hectares is None else f"{area.hectares:,.0f}"
        lines.append(f"{area.name:<{width}}  {area.share:6.1%}  {hectares:>12}  {area.confidence or 0:9.0f}%")
    rows, columns = plan.windows.shape
    rate = f"{run['windows'] / run['seconds']:,.0f} windows/s"
    return "\n".join([*lines, f"{rows:,} x {columns:,} windows in {out}, {precision}, {rate}"])


if __name__ == "__main__":
    job.run(verbs.map_scenes, main)
