"""All that a finished map is: rasters, areas, polygons, picture, page; and last map.json, which says so."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rasterio

from hvd_eurosat import __version__
from hvd_eurosat.config.verbs import MapSettings
from hvd_eurosat.scene.grid import ground_distances
from hvd_eurosat.scene.page import write_page
from hvd_eurosat.scene.parts import DONE, Parts
from hvd_eurosat.scene.picture import write_picture
from hvd_eurosat.scene.plan import Plan
from hvd_eurosat.scene.rasters import write_rasters
from hvd_eurosat.scene.result import Area, LandCover, areas, assemble
from hvd_eurosat.scene.source import Scene
from hvd_eurosat.scene.vectors import write_polygons
from hvd_eurosat.training.checkpoint import VERSIONS, Checkpoint
from hvd_eurosat.training.files import write_text
from hvd_eurosat.weights.stored import named

CSV = "areas.csv"
OF_THE_JOB = ("out", "memory", "watchdog_seconds")  # not of the map: these may differ for the same map


def write_products(
    scene: Scene,
    saved: Checkpoint,
    plan: Plan,
    parts: Parts,
    settings: MapSettings,
    run: Callable[[], dict[str, Any]],
    tick: Callable[[], None],
) -> list[Area]:
    """Everything in the map's folder, map.json last; then the parts go. run: what map.json has of this job so far.

    Returns the area of each class. Raises RunError where it cannot be written; the parts are there still.
    """
    cover = land_cover(scene, saved, plan, parts, settings)
    known = areas(cover)
    write_rasters(cover, parts.out, parts.folder, settings.probabilities)
    tick()
    write_areas(known, parts.out)
    with ThreadPoolExecutor(1) as beside:  # the network is done: there are cores to spare
        picture = beside.submit(write_picture, cover, known, parts.out)
        write_page(cover, known, parts.out)  # first: its encoders leave Python free for the picture's imports
        write_polygons(cover, parts.out, settings.min_area)
        tick()
        picture.result()
    tick()
    told = document(scene, saved, cover, known, plan, settings)
    job = {key: value for key, value in settings.flat().items() if key in OF_THE_JOB}
    told["run"] = {**job, **run(), "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_text(parts.out / DONE, json.dumps(told, indent=2) + "\n")
    parts.finish()
    return known


def land_cover(scene: Scene, saved: Checkpoint, plan: Plan, parts: Parts, settings: MapSettings) -> LandCover:
    """The map, of its parts."""
    classes, percents, preview = assemble(parts, plan.blocks, plan.windows, len(saved.classes))
    tags = {
        "CHECKPOINT": str(named(settings.checkpoint)),
        "CHECKPOINT_SHA256": plan.digest,
        "SCENE": scene.name,
        "WINDOW": str(plan.windows.side),
        "STRIDE": str(plan.windows.stride),
        "TIFFTAG_SOFTWARE": f"hvd_eurosat {__version__}",
    }
    names, title = tuple(saved.classes), title_of(scene, plan)
    return LandCover(title, names, scene.grid, plan.windows, classes, percents, preview, plan.preview_step, tags)


def title_of(scene: Scene, plan: Plan) -> str:
    """What a picture of the map is headed."""
    side, stride, distances = plan.windows.side, plan.windows.stride, ground_distances(scene.grid)
    if distances is None:
        return f"{scene.name}: land cover, a window of {side} pixels every {stride}"
    metres = (distances[0] + distances[1]) / 2
    return f"{scene.name}: land cover, a window of {side * metres:,.0f} m every {stride * metres:,.0f} m"


def write_areas(known: Sequence[Area], out: Path) -> None:
    """areas.csv: a line for each class, and one for what has none."""
    rows = [
        (
            area.name or "no class",
            area.windows,
            "" if area.hectares is None else f"{area.hectares:.2f}",
            "" if area.share is None else f"{area.share:.6f}",
            "" if area.confidence is None else f"{area.confidence / 100:.4f}",
        )
        for area in known
    ]
    table = io.StringIO()
    header = ("class", "windows", "hectares", "share", "mean_confidence")
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_text(out / CSV, table.getvalue())


def document(
    scene: Scene, saved: Checkpoint, cover: LandCover, known: Sequence[Area], plan: Plan, settings: MapSettings
) -> dict[str, Any]:
    """How the map came about, the same for the same map."""
    grid = scene.grid
    return {
        "title": cover.title,
        "classes": list(cover.names),
        "areas": [asdict(area) for area in known],
        "checkpoint": {
            "file": cover.tags["CHECKPOINT"],
            "sha256": plan.digest,
            "epoch": saved.epoch,
            "valid_accuracy": saved.metric,
        },
        "scene": {
            "path": scene.path,
            "bands": list(scene.bands),
            "crs": grid.crs.to_string() if grid.crs else None,
            "transform": list(grid.transform[:6]),
            "width": grid.width,
            "height": grid.height,
            "warnings": list(scene.warnings),
        },
        "map": {
            "transform": list(cover.transform[:6]),
            "width": cover.classes.shape[1],
            "height": cover.classes.shape[0],
            "window": plan.windows.side,
            "stride": plan.windows.stride,
        },
        "settings": {key: value for key, value in settings.flat().items() if key not in OF_THE_JOB},
        "versions": {**VERSIONS, "rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__},
        "work": plan.work,
    }
