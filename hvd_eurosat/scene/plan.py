"""How a scene is mapped, the same on all ranks, and by what a map is known again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hvd_eurosat import __version__
from hvd_eurosat.config.schema import Data
from hvd_eurosat.config.verbs import MapSettings
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.bands import without_band
from hvd_eurosat.scene.finding import split_scenes
from hvd_eurosat.scene.parts import NONE, Work
from hvd_eurosat.scene.source import Scene
from hvd_eurosat.scene.windows import Block, Windows, block_rows, blocks, check
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.weights.stored import named, read_record

PREVIEW = 1200  # pixels a side, about


@dataclass(frozen=True)
class Plan:
    """How a scene is mapped.

    max_masked: share of a window's pixels; preview_step: scene pixels along a pixel of its preview; digest: of the
    checkpoint; work: what must be the same for a map that was begun to go on.
    """

    windows: Windows
    blocks: list[Block]
    max_masked: float
    batch_size: int
    preview_step: int
    digest: str
    work: Work

    @property
    def block_windows(self) -> int:
        """Windows in a block, but for the last."""
        return (self.blocks[0].end - self.blocks[0].first) * self.windows.shape[1]


def make_plan(
    scene: Scene,
    saved: Checkpoint,
    precision: str,
    settings: MapSettings,
    paths: Sequence[str],
    device: torch.device,
) -> Plan:
    """Raises UserError where the scene cannot be mapped so."""
    if len(saved.classes) >= NONE:
        raise UserError(f"the checkpoint has {len(saved.classes)} classes, and a map has room for {NONE - 1}")
    side = window_side(saved.data, saved.image_side)
    windows = check(scene.grid, side, settings.stride or side, scene.path)
    width = len(scene.bands) * np.dtype(scene.grey.dtype).itemsize
    rows = block_rows(windows, width, len(saved.classes), scene.rows_per_block, settings.memory, scene.path)
    batch_size = saved.batch_size(settings.batch_size, device)
    digest = read_record(named(settings.checkpoint)).content.sha256
    size, changed = fingerprint(paths, settings.out)
    work = {
        "checkpoint": digest,
        "scene": scene.name,
        "size of the scene": size,
        "time of the scene": changed,
        "grid": [scene.grid.width, scene.grid.height, *scene.grid.transform[:6]],
        "reading": scene.rule,
        "stride": windows.stride,
        "rows of windows in a block (--memory)": rows,
        **{key: getattr(settings, key) for key in ("max_masked", "mask", "resolution", "probabilities", "min_area")},
        "batch_size": batch_size,
        "precision": precision,
        "views": saved.views(settings.views),
        "temperature": 1.0 if settings.raw else saved.temperature(saved.views(settings.views)),
        "version": __version__,
    }
    step = -(-max(windows.height, windows.width) // PREVIEW)
    known = json.loads(json.dumps(work, default=str))
    return Plan(windows, blocks(windows, rows), settings.max_masked, batch_size, step, digest, known)


def window_side(data: Data, image_side: int | None) -> int:
    """Pixels of a scene that the network looks at: what of the training images' files it was shown."""
    file = data.resize or image_side or data.image_size
    shown = data.center_crop or file
    return round(shown * (image_side or file) / file)


def fingerprint(paths: Sequence[str], out: Path) -> tuple[int, int]:
    """Bytes in a scene's files, and when the last of them was changed (ns). out: the map's folder, if it lies there."""
    files = [Path(path) for path in paths]
    files += [inner for path in files if path.is_dir() for inner in path.rglob("*")]
    own = out.resolve()
    known = [file.stat() for file in files if file.is_file() and own not in file.resolve().parents]
    return sum(one.st_size for one in known), max((one.st_mtime_ns for one in known), default=0)


def scenes_in(settings: MapSettings) -> dict[Path, tuple[str, ...]]:
    """The paths of each scene by the folder of its map. Raises UserError where two would have the same."""
    names = [str(path) for path in settings.scene]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--scene names {twice[0]} twice")
    split = split_scenes(names, settings.bands)
    if len(split) == 1:
        return {settings.out: split[0]}
    found: dict[Path, tuple[str, ...]] = {}
    for paths in split:
        out = settings.out / _name(paths)
        if out in found:
            raise UserError(f"both {found[out][0]} and {paths[0]} would be mapped in {out}: map them one by one")
        found[out] = paths
    if settings.out.is_dir():
        other = sorted(path.name for path in settings.out.iterdir() if path not in found)
        if other:
            raise UserError(f"--out {settings.out} holds what is no map of these ({other[0]}): give a new folder")
    return found


def _name(paths: Sequence[str]) -> str:
    first = Path(paths[0])
    name = first.name.removesuffix(".zip").removesuffix(".SAFE") if first.suffix in (".zip", ".SAFE") else first.stem
    return name if len(paths) == 1 else without_band(name) or first.resolve().parent.name
