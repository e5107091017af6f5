"""What was measured: merged into benchmark.json, as tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from hvd_eurosat.benchmarks import gpu
from hvd_eurosat.config.jsonfile import read_json
from hvd_eurosat.errors import UserError
from hvd_eurosat.training.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTE = "projected: computed by the model, not measured"


def merge(folder: Path, section: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Put a section's findings beside the other sections of benchmark.json; returns all. Raises UserError, RunError."""
    everything = read_results(folder) | {section: found}
    write_text(folder / "benchmark.json", json.dumps(everything, indent=2) + "\n")
    return everything


def read_results(folder: Path) -> dict[str, Any]:
    """benchmark.json, empty where it is not there yet. Raises UserError."""
    path = folder / "benchmark.json"
    found = read_json(path, "results") if path.exists() else {}
    try:
        for section, of in found.items():
            list(ROWS[section](of))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error!r}): move it away") from error
    return dict(found)


def show(section: str, found: Mapping[str, Any]) -> None:
    """A section's table on standard output."""
    table = Table(title=section, title_justify="left", box=box.SIMPLE_HEAD)
    for number, row in enumerate(ROWS[section](found)):
        if number == 0:
            for name in row:
                table.add_column(name, justify="left" if name in ("mode", "what") else "right")
        table.add_row(*row.values())
    if section == "project":
        table.caption = NOTE
    Console(force_terminal=False, width=130).print(table)


def _step_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for mode, of in found.items():
        for name in ("ours", "baseline", "strong"):
            rates, share = of[name], of["share"] if name == "ours" else {}
            yield {
                "mode": mode,
                "what": name,
                "images/s": f"{rates['median']:,.1f} ({rates['min']:,.1f} to {rates['max']:,.1f})",
                "ours is": f"{of['ours']['median'] / rates['median']:.2f}x",
                "epoch": f"{of['epoch'][name]['median']:,.1f}",
                "there": f"{of['epoch']['ours']['median'] / of['epoch'][name]['median']:.2f}x",
                **{part: _percent(share.get(part)) for part in ("data", "optimiser", "communication", "straggling")},
            }


def _scaling_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for mode, points in found.items():
        for ranks, of in points.items():
            yield {
                "mode": mode,
                "ranks": ranks,
                "images/s": f"{of['images_per_second']:,.1f}",
                "of as many alone": f"{_percent(of['efficiency'])} ({100 * of['min']:.1f} to {100 * of['max']:.1f})",
                "alone, in lockstep": _percent(of["lockstep"]),
                "of N x one rank": _percent(of["plain"]),
                "strong: images/s": f"{of['strong']['images_per_second']:,.1f}",
                "efficiency": _percent(of["strong"]["efficiency"]),
            }


def _project_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for mode, of in found.items():
        for point in of["points"]:
            yield _projected(mode, "checked", point) | {
                "measured ms": f"{point['measured_ms']:,.1f}",
                "communication ms": f"{point['communication_ms']:,.1f}",
                "error": f"{100 * point['error']:+.1f} %",
            }
        for point in of.get("projection", ()):
            yield _projected(mode, "projected", point) | {"measured ms": "", "communication ms": "", "error": ""}


def _projected(mode: str, what: str, point: Mapping[str, Any]) -> dict[str, str]:
    return {
        "mode": mode,
        "what": what,
        "ranks": f"{point['ranks']:,}",
        "Gbit/s": f"{point['link']:g}" if point["link"] else "as fitted",
        "step ms": f"{point['predicted_ms']:,.1f}",
        "efficiency": _percent(point["efficiency"]),
    }


def _memory_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for ranks, of in found.items():
        yield {
            "ranks": ranks,
            "peak MB of a rank": f"{of['peak_pss_mb']:,.0f}",
            "of its GPU": f"{of['peak_gpu_mb']:,.0f}" if of.get("peak_gpu_mb") else "none",
            "packed images, MB of all ranks": f"{of['images_mb']:,.0f}",
            "their file, MB": f"{of['images_file_mb']:,.0f}",
        }


def _data_rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for mode, of in found.items():
        for place, rate in of["alone"].items():
            yield _of_data(mode, f"alone, from {place}", rate) | {"was in memory": _percent(of["cached"][place])}
        for place, rate in of["beside"].items():
            what = "beside a step, one batch" if place == "none" else f"beside a step, from {place}"
            yield _of_data(mode, what, rate) | {
                "of one batch": _percent(rate["kept"]),
                "wait in a step, ms": f"{1000 * rate['wait']:,.2f}",
            }


def _of_data(mode: str, what: str, rate: Mapping[str, float]) -> dict[str, str]:
    rates = f"{rate['median']:,.1f} ({rate['min']:,.1f} to {rate['max']:,.1f})"
    return {
        "mode": mode,
        "what": what,
        "images/s": rates,
        "of one batch": "",
        "wait in a step, ms": "",
        "was in memory": "",
    }


ROWS = {
    "data": _data_rows,
    "gpu": gpu.rows,
    "step": _step_rows,
    "scaling": _scaling_rows,
    "project": _project_rows,
    "memory": _memory_rows,
}


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def draw(everything: Mapping[str, Any], path: Path) -> None:
    """A picture with a panel for each section that there is, at least one."""
    from matplotlib.figure import Figure

    there = {name: panel for name, panel in PANELS.items() if name in everything}
    figure = Figure((5 * len(there), 4), layout="constrained")
    panels = figure.subplots(1, len(there), squeeze=False)[0]
    for axes, (name, panel) in zip(panels, there.items(), strict=True):
        panel(axes, everything[name])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_step(axes: Axes, found: Mapping[str, Any]) -> None:
    for offset, name in enumerate(("ours", "strong", "baseline")):
        rates = [of[name] for of in found.values()]
        middle = [r["median"] for r in rates]
        ends = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
        axes.bar([i + 0.27 * offset for i in range(len(rates))], middle, 0.25, yerr=ends, capsize=3, label=name)
    axes.set_xticks([i + 0.27 for i in range(len(found))], list(found))
    axes.set_title("training step, images/s (bars: min to max)", fontsize=10)


def _draw_scaling(axes: Axes, found: Mapping[str, Any]) -> None:
    for mode, points in found.items():
        of = sorted((int(ranks), point) for ranks, point in points.items())
        ranks = [r for r, _ in of]
        axes.set_xticks(ranks)
        axes.plot(ranks, [100 * p["efficiency"] for _, p in of], "o-", label=f"{mode}, weak")
        axes.plot(ranks, [100 * p["strong"]["efficiency"] for _, p in of], "o:", label=f"{mode}, strong")
    axes.set_xlabel("ranks")
    axes.set_title("scaling efficiency, %", fontsize=10)


def _draw_project(axes: Axes, found: Mapping[str, Any]) -> None:
    for mode, of in found.items():
        for link in sorted({point["link"] for point in of.get("projection", ())}):
            line = [point for point in of["projection"] if point["link"] == link]
            efficiency = [100 * point["efficiency"] for point in line]
            axes.plot([p["ranks"] for p in line], efficiency, label=f"{mode}, {link:g} Gbit/s")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("ranks")
    axes.set_title(f"efficiency, % ({NOTE})", fontsize=8)


def _draw_gpu(axes: Axes, found: Mapping[str, Any]) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in found["cases"]:
        if "images_per_second" in case:
            lines.setdefault((case["mode"], case["kind"]), []).append((case["size"], case["images_per_second"]))
    for (mode, kind), points in lines.items():
        axes.plot([size for size, _ in points], [rate for _, rate in points], "o-", label=f"{mode}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images a step")
    axes.set_title(f"{found.get('GPU', 'GPU')}, images/s", fontsize=10)


def _draw_memory(axes: Axes, found: Mapping[str, Any]) -> None:
    axes.bar(list(found), [of["peak_pss_mb"] for of in found.values()], 0.5, label="a rank's peak")
    images = [of["images_mb"] / int(ranks) for ranks, of in found.items()]
    axes.bar(list(found), images, 0.5, label="its share of the packed images")
    axes.set_xlabel("ranks")
    axes.set_title("proportional set size, MB", fontsize=10)


def _draw_data(axes: Axes, found: Mapping[str, Any]) -> None:
    for offset, place in enumerate(("memory", "disk")):
        there = [(n, of["beside"][place]) for n, of in enumerate(found.values()) if place in of["beside"]]
        axes.bar([n + 0.4 * offset for n, _ in there], [100 * of["kept"] for _, of in there], 0.35, label=place)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_title("data beside a step, % of its rate with one batch", fontsize=9)


PANELS = {
    "data": _draw_data,
    "gpu": _draw_gpu,
    "step": _draw_step,
    "scaling": _draw_scaling,
    "project": _draw_project,
    "memory": _draw_memory,
}
