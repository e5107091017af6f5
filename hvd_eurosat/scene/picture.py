"""map.png: the scene and its classes side by side, as one would put them into a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.run.plots import INK
from hvd_eurosat.scene.grid import ground_distances
from hvd_eurosat.scene.parts import NONE
from hvd_eurosat.scene.result import Area, LandCover
from hvd_eurosat.training.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG = "map.png"
INCHES = 6.0  # the longer side of each of both pictures
DPI = 150
CELLS = 1500  # map pixels a side that a picture shows
GAMMA = 0.75  # lightens what is dark
BRIGHT = 99.0  # percent of the scene's values are within what is shown
LEAST = 0.25  # of a scale bar, of the picture's width


def write_picture(cover: LandCover, areas: Sequence[Area], out: Path) -> None:
    """map.png: the scene at the left, the classes at the right, what the colours mean, how large it is."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # $ is a letter in names of scenes and classes
        figure = _drawn(cover, [area for area in areas if area.windows])
    with replacing(out / PNG) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def _drawn(cover: LandCover, shown: Sequence[Area]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = cover.grid.height, cover.grid.width
    wide, high = INCHES * width / max(width, height), INCHES * height / max(width, height)
    figure = Figure((2 * wide + 2.6, max(high, 0.26 * len(shown) + 0.6) + 0.8), layout="compressed", dpi=DPI)
    left, right = figure.subplots(1, 2)
    left.imshow(brightened(cover.preview), extent=_extent(cover.preview.shape, cover.preview_step, 0))
    left.set_title("scene", fontsize=10)
    step = -(-max(cover.classes.shape) // CELLS)
    cells = painted(cover)[::step, ::step]
    right.imshow(cells, extent=_extent(cells.shape, cover.windows.stride * step, cover.windows.margin))
    right.set_title("land cover", fontsize=10)
    for axes in (left, right):
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], facecolor="white", aspect="equal")
        axes.spines[:].set(color=INK, linewidth=0.6)
    _legend(right, cover, shown)
    _scale_bar(left, cover)
    figure.suptitle(cover.title, fontsize=11, color=INK)
    FigureCanvasAgg(figure)
    return figure


def brightened(preview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A scene uint8 [H, W, 4] as eyes want it: its bright end at white, all bands alike."""
    there = preview[..., 3] > 0
    if not there.any():
        return preview
    white = max(1.0, float(np.percentile(preview[there][:, :3], BRIGHT)))
    table = (255 * np.clip(np.arange(256) / white, 0, 1) ** GAMMA).round().astype(np.uint8)
    return np.dstack([table[preview[..., :3]], preview[..., 3]])


def round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is no larger."""
    power = 10.0 ** math.floor(math.log10(most))
    return max((n * power for n in (2, 5) if n * power <= most), default=power)


def painted(cover: LandCover) -> NDArray[np.uint8]:
    """The classes in their colours, uint8 [rows, columns, 4]; nothing where there is none."""
    table = np.zeros((NONE + 1, 4), np.uint8)
    for number, colour in enumerate(cover.colours):
        table[number] = (*bytes.fromhex(colour[1:]), 255)
    return table[cover.classes]


def _extent(shape: tuple[int, ...], step: float, margin: float) -> tuple[float, float, float, float]:
    return margin, margin + shape[1] * step, margin + shape[0] * step, margin


def _legend(axes: Axes, cover: LandCover, areas: Sequence[Area]) -> None:
    from matplotlib.patches import Patch

    colours = dict(zip(cover.names, cover.colours, strict=True))
    handles = [
        Patch(facecolor=colours[area.name], edgecolor=INK, linewidth=0.4, label=f"{area.name}  {area.share:.1%}")
        if area.name
        else Patch(facecolor="white", edgecolor=INK, linewidth=0.4, label="no class")
        for area in areas
    ]
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9, labelspacing=0.6
    )


def _scale_bar(axes: Axes, cover: LandCover) -> None:
    """A round number of metres, near to a quarter of the width."""
    distances = ground_distances(cover.grid)
    if distances is None:
        return
    across = cover.grid.width * distances[0]
    length = round_length(LEAST * across)
    pixels, x, y = length / distances[0], 0.04 * cover.grid.width, 0.95 * cover.grid.height
    words = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    for colour, line in (("black", 5.0), ("white", 2.5)):
        axes.plot([x, x + pixels], [y, y], color=colour, linewidth=line, solid_capstyle="butt")
    outline = {"boxstyle": "round,pad=0.2", "facecolor": "black", "edgecolor": "none", "alpha": 0.55}
    axes.annotate(
        words,
        (x + pixels / 2, y),
        (0, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color="white",
        fontsize=9,
        bbox=outline,
    )
