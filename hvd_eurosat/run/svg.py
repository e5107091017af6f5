"""Inline SVG for the page of a run. Colours are classes, which the page's style gives for light and for dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
MOST_POINTS = 300  # of a curve: more cannot be told apart on a screen


class Curve(NamedTuple):
    """A line of a chart. kind: its class, train or valid; values: one for each x, None where there is none."""

    name: str
    kind: str
    values: Sequence[float | None]


class Mark(NamedTuple):
    """A vertical line, or with `y` a ring."""

    x: float
    text: str
    y: float | None = None


def chart(
    title: str,
    x: Sequence[float],
    curves: Sequence[Curve],
    form: str,
    marks: Sequence[Mark] = (),
    least: float | None = None,
) -> Markup:
    """Curves over epochs, whose values show under the pointer (data-chart is the page's script's).

    form: of the values, as for str.format; x: ascending, not empty; least: of the values shown, theirs if None.
    """
    x, curves = _thinned(x, curves)
    flat = [value for curve in curves for value in curve.values if value is not None]
    flat += [] if least is None else [least]
    ticks = nice_ticks(min(flat, default=0.0), max(flat, default=1.0))
    low, high = min([*flat, ticks[0]], default=0.0), max([*flat, ticks[-1]], default=1.0)
    first, last = min(x[0], 1), max(x[-1], x[0] + 1)

    def across(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first), 1)

    def up(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    parts = [_grid(ticks, up, form), _epochs(first, last, across)]
    parts += [_mark(mark, across, up) for mark in marks if mark.y is None]
    parts += [_curve(x, curve, across, up) for curve in curves]
    parts += [_mark(mark, across, up) for mark in marks if mark.y is not None]
    shown = [
        {"name": c.name, "kind": c.kind, "y": [v if v is None else up(v) for v in c.values],
         "text": [v if v is None else written(v, form) for v in c.values]}
        for c in curves
    ]  # fmt: skip
    data = {"epochs": list(x), "x": [across(value) for value in x], "curves": shown}
    return _svg("chart", title, Markup("").join(parts), data)


def _svg(kind: str, title: str, content: Markup, data: Any) -> Markup:
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}" data-chart="{}">')
    return head.format(kind, WIDTH, HEIGHT, title, json.dumps(data)) + content + Markup("</svg>")


def _thinned(x: Sequence[float], curves: Sequence[Curve]) -> tuple[Sequence[float], list[Curve]]:
    """At most MOST_POINTS of them, the last among them."""
    step = math.ceil(len(x) / MOST_POINTS)
    kept = [n for n in range(len(x)) if (len(x) - 1 - n) % step == 0]
    return [x[n] for n in kept], [c._replace(values=[c.values[n] for n in kept]) for c in curves]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, some `count` of them, that span low to high."""
    span = high - low if high > low else abs(high) or 1.0
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def _grid(ticks: Sequence[float], up: Any, form: str) -> Markup:
    line = Markup('<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    names = [f"{100 * tick:g} %" if "%" in form else f"{tick:g}" for tick in ticks]
    places = [(LEFT, up(tick), WIDTH - RIGHT, LEFT - 7, up(tick) + 4) for tick in ticks]
    return Markup("").join(line.format(*place, name) for place, name in zip(places, names, strict=True))


def written(value: float, form: str) -> str:
    """A value in its form, with a space before the sign of percent."""
    return form.format(value).replace("%", " %")


def _epochs(first: float, last: float, across: Any) -> Markup:
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{:g}</text>')
    ticks = [tick for tick in nice_ticks(first, last, 6) if tick == int(tick) and first <= tick <= last]
    return Markup("").join(text.format(across(tick), HEIGHT - 9, tick) for tick in ticks)


def _curve(x: Sequence[float], curve: Curve, across: Any, up: Any) -> Markup:
    points = [(across(at), up(value)) for at, value in zip(x, curve.values, strict=True) if value is not None]
    path = Markup('<path class="curve {}" d="M{}"/>').format(
        curve.kind, "L".join(f"{px:g} {py:g}" for px, py in points)
    )
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>')
    dots = [dot.format(curve.kind, *point) for point in points] if len(points) <= 40 else []
    return Markup("").join([path, *dots]) if points else Markup("")


def _mark(mark: Mark, across: Any, up: Any) -> Markup:
    if mark.y is None:
        line = Markup('<path class="mark" d="M{} {}V{}"><title>{}</title></path>')
        return line.format(across(mark.x), TOP, HEIGHT - BOTTOM, mark.text)
    ring = Markup('<circle class="ring" cx="{}" cy="{}" r="6"><title>{}</title></circle>')
    return ring.format(across(mark.x), up(mark.y), mark.text)


def spark(values: Sequence[float], label: str) -> Markup:
    """A small curve for a row of a table."""
    width, height = 110.0, 28.0
    low, high = min(values), max(values)
    values = values[:: math.ceil(len(values) / 100)]
    steps, room = max(len(values) - 1, 1), (high - low) or 1.0
    ups = [3 + (height - 6) * (high - value) / room for value in values]
    points = [f"{2 + (width - 4) * n / steps:.1f} {up:.1f}" for n, up in enumerate(ups)]
    svg = Markup('<svg class="spark" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"><path d="M{}"/></svg>')
    return svg.format(width, height, label, "L".join(points))


def reliability(sums: NDArray[np.float64]) -> Markup:
    """How often the network is right where it is so sure: a bar for each bin, the diagonal where both agree.

    sums: training.scores.reliability's, [3, bins].
    """
    side, left, foot = 300, 44, 34
    room, width = side - left - 8, (side - left - 8) / sums.shape[1]
    top = side - foot - room
    line = Markup('<path class="grid" d="M{} {}h{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{} %</text>')
    foot_text = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{} %</text>')
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        up = top + room * (1 - share)
        parts.append(line.format(left, up, room, left - 6, up + 4, round(100 * share)))
        parts.append(foot_text.format(left + room * share, side - foot + 18, round(100 * share)))
    bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    for n, (images, probabilities, correct) in enumerate(sums.T):
        if images:
            height = room * correct / images
            sure, right = written(probabilities / images, "{:.1%}"), written(correct / images, "{:.1%}")
            text = f"{images:,.0f} images: {sure} sure, {right} right"
            parts.append(bar.format(left + n * width + 1, top + room - height, width - 2, height, text))
    parts.append(Markup('<path class="diagonal" d="M{} {}L{} {}"/>').format(left, top + room, left + room, top))
    head = Markup('<svg class="reliability" viewBox="0 0 {} {}" role="img" aria-label="reliability diagram">')
    return head.format(side, side) + Markup("").join(parts) + Markup("</svg>")
