"""map.html: the scene with its map in one file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import json
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rasterio import warp

from hvd_eurosat.scene.grid import WGS84
from hvd_eurosat.scene.picture import brightened
from hvd_eurosat.scene.result import Area, LandCover
from hvd_eurosat.training.files import write_text

HTML = "map.html"
CELLS = 1000  # windows a side that the page holds; of larger maps every second, third …
QUALITY = 85
MESH = 9  # points a side at which longitude and latitude are known; between them the page interpolates


def write_page(cover: LandCover, areas: Sequence[Area], out: Path) -> None:
    """map.html: the map over the scene, how opaque it is, what the colours mean, and what a window is on a click."""
    template = resources.files("hvd_eurosat.scene").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(_data(cover, areas)).replace("<", "\\u003c")
    page = template.replace("{{title}}", html.escape(cover.title)).replace("{{data}}", data)
    write_text(out / HTML, page)


def _data(cover: LandCover, areas: Sequence[Area]) -> dict[str, Any]:
    step = -(-max(cover.classes.shape) // CELLS)
    values = np.concatenate([cover.classes[None], cover.percents])[:, ::step, ::step]
    turn, grid = cover.grid.transform, cover.grid
    return {
        "size": [grid.width, grid.height],
        "side": cover.windows.side,
        "stride": cover.windows.stride * step,
        "margin": cover.windows.margin,
        "every": step,
        "rows": values.shape[1],
        "columns": values.shape[2],
        "values": base64.b64encode(zlib.compress(values.tobytes(), 9)).decode(),
        "preview": [length * cover.preview_step for length in cover.preview.shape[1::-1]],
        "scene": _encoded(brightened(cover.preview)),
        "crs": grid.crs.to_string() if grid.crs and grid.crs.to_epsg() else "",
        "transform": [turn.a, turn.b, turn.c, turn.d, turn.e, turn.f],
        "digits": 5 if grid.crs and grid.crs.is_geographic else 0,
        "mesh": _mesh(cover),
        "classes": [
            {"name": name, "colour": colour, "share": area.share, "hectares": area.hectares, "windows": area.windows}
            for name, colour, area in zip(cover.names, cover.colours, areas, strict=False)
        ],
    }


def _encoded(preview: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """As a data URL; WebP, for there may be holes in the scene."""
    stream = io.BytesIO()
    Image.fromarray(preview).save(stream, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _mesh(cover: LandCover) -> list[list[list[float]]]:
    """[longitude, latitude] at MESH x MESH points over the scene, corner to corner; [] where there is no CRS."""
    if cover.grid.crs is None:
        return []
    along = np.linspace(0, 1, MESH)
    columns, rows = np.meshgrid(along * cover.grid.width, along * cover.grid.height)
    turn = cover.grid.transform
    xs, ys = turn.a * columns + turn.b * rows + turn.c, turn.d * columns + turn.e * rows + turn.f
    places = np.stack(warp.transform(cover.grid.crs, WGS84, xs.ravel(), ys.ravel()), 1)
    if not np.isfinite(places).all():
        return []
    mesh: list[list[list[float]]] = places.round(6).reshape(MESH, MESH, 2).tolist()
    return mesh
