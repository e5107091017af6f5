"""Pictures, as PNG files: of a run, of the data, of the network.

matplotlib is imported when the first picture is drawn, and drawn with through figures of its own: no window, no state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.sample import generate
from hvd_eurosat.errors import RunError
from hvd_eurosat.training.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvd_eurosat.model.resnet import LandCoverResNet

BLUE, ORANGE, GREY, INK = "#1f6fb4", "#d9730d", "#8a939b", "#20262c"
ICE, SAND, LEAF, PAPER = "#cfdbe6", "#f5b754", "#58b07c", "#f3f5f7"
IMAGE = (3, 64, 64)


def learning_curves(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs (from 1) of a metrics.jsonl's events.

    "train" events have epoch, loss, accuracy (a fraction) and learning_rate; "valid" events epoch, loss and accuracy.
    """
    train, valid = ([e for e in events if e["event"] == kind] for kind in ("train", "valid"))
    figure = _figure(12, 3.6)
    loss, accuracy, rate = figure.subplots(1, 3)
    for name, colour, points in (("train", BLUE, train), ("valid", ORANGE, valid)):
        _curve(loss, points, "loss", colour, name)
        _curve(accuracy, points, "accuracy", colour, name)
    _curve(rate, train, "learning_rate", BLUE, "learning rate")
    if valid:
        best = max(valid, key=lambda event: float(event["accuracy"]))
        percent = 100 * best["accuracy"]
        accuracy.plot(best["epoch"], percent, "o", ms=9, mfc="none", mec=ORANGE, mew=1.8)
        accuracy.axhline(percent, color=ORANGE, lw=0.8, ls=":")
        accuracy.set_title(f"accuracy (best valid {percent:.2f} %, epoch {best['epoch']})", fontsize=10)
    loss.set_title("loss (negative log-likelihood)", fontsize=10)
    rate.set_title("learning rate", fontsize=10)
    accuracy.set_ylabel("%")
    accuracy.legend(frameon=False, loc="lower right")
    loss.legend(frameon=False, loc="upper right")
    for axes in (loss, accuracy, rate):
        _plain(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    rate.set_ylim(bottom=0)
    _save(figure, path)


def _curve(axes: Axes, events: Sequence[Mapping[str, Any]], key: str, colour: str, name: str) -> None:
    scale = 100 if key == "accuracy" else 1
    points = [(event["epoch"], scale * event[key]) for event in events if key in event]
    marker = "o" if len(points) <= 60 else ""
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, ms=3, lw=1.6, label=name)


def confusion_matrix(counts: NDArray[np.integer[Any]], classes: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix. counts: int [C, C], rows are the true classes; colour is the share of the row."""
    from matplotlib.colors import PowerNorm  # so that rare confusions show

    count = len(classes)
    cell = 0.62 if count <= 15 else 0.3
    side, font = cell * count + 2.8, 9 if count <= 15 else 5.5
    figure = _figure(side, side)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.4 else INK
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=font, color=ink)
    axes.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=max(font, 6.5))
    axes.set_yticks(range(count), classes, fontsize=max(font, 6.5))
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11, pad=12)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02, aspect=15, ticks=[0, 0.1, 0.5, 1], format="{x:.0%}")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _save(figure, path)


def reliability(curves: Mapping[str, NDArray[np.float64]], path: Path, title: str) -> None:
    """Draw how often answers are right against the probability that they state, and how many there are.

    curves: by name, training.scores.reliability's sums, [3, bins].
    """
    figure = _figure(5.4, 6.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":")
    for (name, (number, probability, correct)), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=False):
        there = number > 0
        stated, right = (100 * sums[there] / number[there] for sums in (probability, correct))
        error = 100 * np.abs(correct - probability).sum() / number.sum()
        above.plot(stated, right, "o-", color=colour, ms=4, lw=1.6, label=f"{name}: {error:.2f} % off")
        edges = np.linspace(0, 100, len(number) + 1)
        below.stairs(100 * number / number.sum(), edges, color=colour, lw=1.4)
    above.set_title(title, fontsize=10)
    above.set_ylabel("right, %")
    above.legend(frameon=False, loc="upper left")
    below.set_ylabel("answers, %")
    below.set_yscale("log")
    below.set_xlabel("stated probability, %")
    for axes in (above, below):
        _plain(axes)
    _save(figure, path)


def reliability_curves(events: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """What `reliability` draws of metrics.jsonl's events: of the test and what the temperature did, or of the

    newest validation.
    """
    found = [event for event in events if "reliability" in event]
    if not found:
        return {}
    newest, curves = found[-1], {}
    if "valid_reliability" in newest:
        before, after = newest["valid_reliability"]
        curves = {"valid, without temperature": np.array(before), "valid": np.array(after)}
    return {**curves, newest["event"]: np.array(newest["reliability"])}


def sample_grid(
    images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str], path: Path, title: str
) -> None:
    """Draw examples, a row for each class. images: uint8 [N, S, S, 3]; labels: int64 [N], indices into classes."""
    rows = [images[labels == c] for c in range(len(classes))]
    columns, size = max(len(row) for row in rows), images.shape[1]
    gap = max(1, size // 20)
    sheet = np.full((len(rows) * (size + gap) - gap, columns * (size + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (size + gap), j * (size + gap)
            sheet[y : y + size, x : x + size] = picture
    figure = _figure(0.85 * columns + 2, 0.85 * len(rows) + 0.6)
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([i * (size + gap) + size / 2 for i in range(len(rows))], classes, fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    _save(figure, path)


def schedule(
    progress: NDArray[np.float64], rates: NDArray[np.float64], sizes: Sequence[int], path: Path, title: str
) -> None:
    """Draw a schedule. rates: float64 [N], at `progress` (in epochs, float64 [N]); sizes: of the images, in pixels, of
    each epoch.
    """
    figure = _figure(8, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(progress, rates, color=BLUE, lw=1.6)
    below.stairs(sizes, color=ORANGE, lw=1.6, baseline=None)
    above.set_title(title, fontsize=10)
    above.set_ylabel("learning rate")
    below.set_ylabel("pixels")
    below.set_xlabel("epochs done")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        _plain(axes)
        axes.set_ylim(bottom=0)
    _save(figure, path)


# --- the network ---


@dataclass(frozen=True)
class _Stage:
    """A part of the network: its residual blocks, the shape [C, H, W] of its output, its layers' parameters."""

    title: str
    blocks: int
    shape: tuple[int, ...]
    convolutions: int
    batch_norms: int


def network(path: Path) -> None:
    """Draw the modified ResNet-50 for 64x64 RGB input and ten classes, in bn+head mode. All figures are the model's."""
    import torch

    from hvd_eurosat.model.resnet import LandCoverResNet, count_parameters

    with torch.device("meta"):  # shapes and counts need no memory
        model = LandCoverResNet("resnet50", 10, "bn+head")
    stages = _stages(model)
    total, trainable = count_parameters(model)
    figure = _figure(13, 6.6)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 130), ylim=(0, 66), aspect="equal")
    axes.axis("off")
    axes.text(4, 62, "The modified ResNet-50", fontsize=15, weight="bold", color=INK, va="center")
    axes.text(4, 58.4, "64 × 64 RGB patches, ten classes; mode bn+head", fontsize=10, color=GREY, va="center")
    _draw_flow(axes, stages, model.fc.in_features, model.fc.out_features)
    _draw_block(axes)
    frozen, norms = sum(s.convolutions for s in stages), sum(s.batch_norms for s in stages)
    _draw_legend(axes, frozen, norms, model.fc.weight.numel(), f"{total:,} in all, {trainable:,} of them train")
    _save(figure, path)


def _stages(model: LandCoverResNet) -> list[_Stage]:
    import torch
    from torch import nn

    x = torch.empty(1, *IMAGE, device="meta")
    parts = [("stem", nn.Sequential(model.conv1, model.bn1, model.maxpool))]
    parts += [(f"stage {n}", getattr(model, f"layer{n}")) for n in (1, 2, 3, 4)]
    stages = []
    for title, part in parts:
        x = part(x)
        sizes = [(p.ndim, p.numel()) for p in part.parameters()]
        convolutions, norms = (sum(n for ndim, n in sizes if (ndim == 4) == is_conv) for is_conv in (True, False))
        blocks = 0 if title == "stem" else len(part)
        stages.append(_Stage(title, blocks, tuple(x.shape[1:]), convolutions, norms))
    return stages


def _draw_flow(axes: Axes, stages: Sequence[_Stage], features: int, classes: int) -> None:
    y, x, gap = 40.0, 4.0, 5.3
    axes.imshow(_patch(), extent=(x, x + 11, y - 5.5, y + 5.5), zorder=2)
    _caption(axes, x + 5.5, "input", f"{IMAGE[0]} × {IMAGE[1]} × {IMAGE[2]}", "in convolutions\nin BatchNorm")
    x += 11
    for stage in stages:
        x = start = _arrow(axes, x, y, gap)
        height = 4 + 2.2 * np.log2(stage.shape[1])
        for pair in range(3 * stage.blocks or 1):
            x += 0.5 if pair and pair % 3 == 0 else 0
            _box(axes, (x, y, 0.8, height), ICE)
            _box(axes, (x + 0.8, y, 0.35, height), SAND)
            x += 1.15
        what = f"{stage.title}\n{stage.blocks} blocks" if stage.blocks else f"{stage.title}\n7×7, max pool"
        shape = " × ".join(str(n) for n in stage.shape)
        _caption(axes, (start + x) / 2, what, shape, f"{stage.convolutions:,}\n{stage.batch_norms:,}")
    ends = (
        (GREY, "pool\naverage", f"{features}", ""),
        (LEAF, "dense\nno bias", f"{features} → {classes}", f"{features * classes:,}"),
        (GREY, "output\nlog-softmax", f"{classes}", ""),
    )
    for colour, title, shape, counts in ends:
        x = _arrow(axes, x, y, gap)
        _box(axes, (x, y, 2.4, 6), colour)
        _caption(axes, x + 1.2, title, shape, counts)
        x += 2.4


def _patch() -> NDArray[np.uint8]:
    from PIL import Image

    _, encoded = next(generate(per_class=1, seed=3))
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _caption(axes: Axes, x: float, title: str, shape: str, counts: str) -> None:
    """Above a part its name (bold) and a remark; below it the output's shape and the parameters."""
    name, _, remark = title.partition("\n")
    axes.text(x, 52.2, name, ha="center", va="center", fontsize=10, weight="bold", color=INK)
    axes.text(x, 49.6, remark, ha="center", va="center", fontsize=9, color=GREY)
    axes.text(x, 30.2, shape, ha="center", va="center", fontsize=9.5, color=INK)
    axes.text(x, 28.2, counts, ha="center", va="top", fontsize=8.5, color=GREY, linespacing=1.3)


def _draw_block(axes: Axes) -> None:
    x, y = 4.0, 10.0
    axes.text(x, 20.5, "one block: a bottleneck with a shortcut", fontsize=10, weight="bold", color=INK, va="center")
    start = x
    for kernel, is_last in (("1×1", False), ("3×3", False), ("1×1", True)):
        x = _arrow(axes, x, y, 4)
        _box(axes, (x, y, 7, 6), ICE, f"{kernel}\nconv")
        _box(axes, (x + 7, y, 4.4, 6), SAND, "BN")
        x += 11.4
        if not is_last:
            _box(axes, (x + 0.6, y, 5, 6), PAPER, "ReLU")
            x += 5.6
    end = _arrow(axes, x, y, 3) + 1.6
    axes.text(end, y, "+", ha="center", va="center", fontsize=14, color=INK)
    axes.plot([start + 1.5, start + 1.5, end, end], [y, 16.5, 16.5, y + 1.6], color=INK, lw=1.1)
    _box(axes, (end + 1.8, y, 5, 6), PAPER, "ReLU")
    note = "the first block of a stage has a 1×1 convolution and BN in its shortcut"
    axes.text(4, 4, note, fontsize=8.5, color=GREY, va="center")


def _draw_legend(axes: Axes, frozen: int, norms: int, head: int, total: str) -> None:
    lines = (
        (ICE, f"{frozen:,}", "convolutions: frozen"),
        (SAND, f"{norms:,}", "BatchNorm: trains"),
        (LEAF, f"{head:,}", "dense layer: trains"),
    )
    axes.text(84, 20.5, "parameters", fontsize=10, weight="bold", color=INK, va="center")
    for y, (colour, count, what) in zip((16.4, 12.9, 9.4), lines, strict=True):
        _box(axes, (84, y, 2.6, 2.2), colour)
        axes.text(100, y, count, ha="right", va="center", fontsize=10, color=INK)
        axes.text(101.5, y, what, va="center", fontsize=10, color=INK)
    axes.plot([84, 124], [7, 7], color=GREY, lw=0.8)
    axes.text(84, 4.6, total, fontsize=10, color=INK, va="center")


def _box(axes: Axes, place: tuple[float, float, float, float], colour: str, text: str = "") -> None:
    """A rectangle. place: left edge, middle (in height), width, height."""
    from matplotlib.patches import Rectangle

    x, middle, width, height = place
    edge = INK if width > 1 else "none"
    axes.add_patch(
        Rectangle((x, middle - height / 2), width, height, facecolor=colour, edgecolor=edge, lw=0.6, zorder=2)
    )
    axes.text(x + width / 2, middle, text, ha="center", va="center", fontsize=8.5, color=INK)


def _arrow(axes: Axes, x: float, y: float, length: float) -> float:
    """An arrow to the right; returns where the next thing begins."""
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x + length - 0.5, y), (x + 0.5, y), arrowprops=style)
    return x + length


# --- figures ---


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, for files only."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="compressed")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.25, lw=0.6)


def _save(figure: Figure, path: Path) -> None:
    """Write the figure with a palette of 256 colours: a third of the bytes, and looks the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(120)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, kmeans=3)
    try:
        with replacing(path) as file:
            picture.save(file, "PNG", optimize=True)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None
