"""The pictures of the documents, docs/images/*.png.

    make pictures

The network and the speed need nothing. What needs more is left as it is where that is missing: the samples need
data/EuroSAT_RGB and data/sample (`prepare` makes them), the curves, the confusion matrix, the pages and the card
runs/scratch, an hour's run of recipes/scratch.toml, and the last two Chromium. All have a ground of their own, so that
they can be read on light pages and on dark ones.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from docs.browser import PROGRAM, Browser, browser, load
from hvd_eurosat import report
from hvd_eurosat.run.plots import BLUE, GREY

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SAMPLES = {"data/EuroSAT_RGB": "samples.png", "data/sample": "sample_synthetic.png"}
RUN = ROOT / "runs" / "scratch"
PLOTS = ("learning_curves.png", "confusion_matrix.png")
CARD_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2630; background: #fff; margin: 34px 44px; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin-top: 26px; } table { border-collapse: collapse; }
th, td { border: 1px solid #dfe4e7; padding: 4px 11px; text-align: left; }
thead th:empty { display: none; } code, pre { font-size: 12px; background: #eef2f4; overflow-wrap: anywhere; }
"""


def speeds(page: str) -> Iterator[tuple[str, float, float]]:
    """Machine and mode, our images/s and the example's, of each row of a page's first table."""
    table = page[page.index("|---") :].partition("\n\n")[0]
    for row in table.splitlines()[1:]:
        machine, mode, ours, example = (cell.strip() for cell in row.split("|")[1:5])
        yield f"{machine}, {mode}", float(ours), float(example)


def draw_speeds(path: Path) -> None:
    """Bars of the first table of docs/performance.md: an epoch beside Horovod's example."""
    rows = list(speeds((ROOT / "docs" / "performance.md").read_text()))
    figure = Figure((10, 0.55 * len(rows) + 0.9), layout="compressed")
    axes = figure.add_subplot()
    for place, (_, ours, example) in enumerate(rows):
        axes.barh(place - 0.19, ours, 0.36, color=BLUE, label="" if place else "ours")
        axes.barh(place + 0.19, example, 0.36, color=GREY, label="" if place else "Horovod's example")
        axes.text(ours + 3, place - 0.19, f"{ours:.1f}: {ours / example:.1f} times", va="center", fontsize=9)
        axes.text(example + 3, place + 0.19, f"{example:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * max(ours for _, ours, _ in rows))
    axes.set_xlabel("images per second, an epoch with its validation, on two cores")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_pages(made: Browser, folder: Path) -> None:
    """The page of RUN, RUN beside its neighbours, and the card of its best checkpoint."""
    import markdown

    from hvd_eurosat.config.verbs import ExportSettings
    from hvd_eurosat.export import export

    report.main(["page", "--run.dir", str(RUN)])
    shoot(made, RUN / "index.html", "page.png", 1120, 1345)
    report.main(["runs", "--out", str(folder / "runs.html"), str(RUN.parent)])
    shoot(made, folder / "runs.html", "runs.png", 1120, 760)
    best = RUN / "checkpoints" / "best.json"
    export(ExportSettings(checkpoint=best, format="safetensors", out=folder))
    card = markdown.markdown((folder / "model_card.md").read_text(), extensions=["tables", "fenced_code"])
    (folder / "card.html").write_text(f'<meta charset="utf-8"><style>{CARD_STYLE}</style>{card}')
    shoot(made, folder / "card.html", "card.png", 980, 1240)


def shoot(made: Browser, file: Path, name: str, width: int, height: int) -> None:
    """What is seen of a page, with a palette of 256 colours, as the other pictures."""
    target = IMAGES / name
    load(made, file, width, height).picture(target)
    picture = Image.open(io.BytesIO(target.read_bytes())).convert("RGB").quantize(256, kmeans=3)
    picture.save(target, "PNG", optimize=True)


def main() -> None:
    """All that can be drawn here."""
    draw_speeds(IMAGES / "performance.png")
    report.main(["network", "--out", str(IMAGES / "network.png")])
    for data, name in SAMPLES.items():
        if (ROOT / data).is_dir():
            report.main(["samples", "--data.root", str(ROOT / data), "--out", str(IMAGES / name)])
    if (RUN / "summary.json").exists():
        report.main(["run", "--run.dir", str(RUN)])
        for name in PLOTS:
            shutil.copy(RUN / "plots" / name, IMAGES)
    if (RUN / "summary.json").exists() and PROGRAM:
        with browser() as made, tempfile.TemporaryDirectory() as folder:
            draw_pages(made, Path(folder))


if __name__ == "__main__":
    main()
