"""Show data, network, schedule and runs: pictures as PNG files, pages as HTML, a run's state as a line."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.config.command import Parser
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config, schedule_epochs
from hvd_eurosat.data.images import BadImageError, read_file
from hvd_eurosat.data.inputs import Inputs
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.multispectral import read_pixels
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.run import plots, status
from hvd_eurosat.run.comparison import find_runs, write_comparison
from hvd_eurosat.run.page import write_page
from hvd_eurosat.run.story import read_events, read_summary
from hvd_eurosat.training.schedule import image_size, learning_rate

EXAMPLES_PER_CLASS = 8
POINTS_PER_EPOCH = 50
FIGURES = {  # of summary.json, and by what they are multiplied
    "best_valid_accuracy": 100,
    "test_accuracy": 100,
    "test_macro_f1": 100,
    "test_loss": 1,
    "test_calibration_error": 100,
    "seconds": 1,
}
MAY_DIFFER = ("train.seed", "data.cache_dir")
RANKS = "number of ranks of the job, for optim.lr_scaling (default 1)"

EXAMPLES = """
examples:
  what is in the data?               python -m hvd_eurosat.report samples --data.root data/sample --out samples.png
  what does the network look like?   python -m hvd_eurosat.report network --out network.png
  how will it be trained?            python -m hvd_eurosat.report schedule --config recipes/scratch.toml --out s.png
  how is the run going?              python -m hvd_eurosat.report status runs/quickstart-sample
  what did it come to?               python -m hvd_eurosat.report page --run.dir runs/quickstart-sample
  which run is best?                 python -m hvd_eurosat.report runs --out runs/index.html
  how good is it, whatever the seed? python -m hvd_eurosat.report runs runs/scratch-0 runs/scratch-1 runs/scratch-2

`report <what> --help` tells more. Training itself draws the plots of a run when it ends, and keeps its page up to date.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0 done, 1 failed, 2 bad usage or data; of `status` see there."""
    options, keys = _parse(argv)
    try:
        if options.what == "status":
            return show_status(options.runs)
        if options.what == "runs" and not options.out:
            print(runs(options.runs))
            return 0
        if options.what == "run":
            written = run(options.dir)
        elif options.what == "page":
            written = [write_page(options.dir)]
        elif options.what == "runs":
            written = [write_comparison(find_runs(options.runs or [options.out.parent]), options.out)]
        else:
            _check_out(options.out)
            if options.what == "samples":
                samples(options.root, options.split, options.out)
            elif options.what == "schedule":
                schedule(load(keys), options.ranks, options.out)
            else:
                plots.network(options.out)
            written = [options.out]
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def samples(root: Path, split: str, out: Path) -> None:
    """Draw examples of each class of a split, the same ones every time. Raises UserError."""
    tree = open_tree(root)
    inputs = tree.inputs
    files, labels = tree.files(split), tree.labels(split)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([_some(rng, np.flatnonzero(labels == c)) for c in range(len(tree.classes))])
    size = tree.image_size or 64
    images = inputs.picture(np.stack([_read(tree.path(files[i]), inputs, size) for i in chosen]))
    title = f"{_name(tree)}: examples of the {len(files):,} {split} images"
    plots.sample_grid(images, labels[chosen], tree.classes, out, title)


def schedule(config: Config, ranks: int, out: Path) -> None:
    """Draw the learning rate and the training images' size over the epochs, and print them, a line for each epoch."""
    optim, train, epochs = config.optim, config.train, schedule_epochs(config.optim, config.train)
    batch = ranks * train.batch_size
    sizes = [image_size(config.data, train, epochs, epoch) for epoch in range(train.epochs)]
    spans = [np.linspace(epoch, np.nextafter(epoch + 1, 0), POINTS_PER_EPOCH) for epoch in range(train.epochs)]
    rates = [[learning_rate(optim, epochs, batch, progress) for progress in span] for span in spans]
    print("epoch  learning rate at its beginning and end  images")
    for epoch, (rate, size) in enumerate(zip(rates, sizes, strict=True), start=1):
        print(f"{epoch:5}  {rate[0]:<18.4g}  {rate[-1]:<18.4g}  {f'{size}x{size}' if size else 'of their own size'}")
    title = f"{optim.schedule}, {train.epochs} epochs, {batch} images a step"
    plots.schedule(np.concatenate(spans), np.concatenate(rates), sizes, out, title)


def run(folder: Path) -> list[Path]:
    """Draw learning_curves.png and, where they are known, confusion_matrix.png and reliability.png into folder/plots.

    The matrix is that of the "test" event or of summary.json, before the end that of the newest "valid" event.
    Returns the files written. Raises UserError where metrics.jsonl is missing, damaged or still empty.
    """
    events, summary = read_events(folder / "metrics.jsonl"), read_summary(folder / "summary.json")
    if not any(event["event"] in ("train", "valid") for event in events):
        raise UserError(f"{folder / 'metrics.jsonl'} has no finished epoch yet")
    plotted = folder / "plots"
    try:
        plotted.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {plotted}: {error.strerror}") from None
    written = [plotted / "learning_curves.png"]
    plots.learning_curves(events, written[0])
    split, counts = _confusion(events, summary, folder)
    if counts is not None:
        classes = summary.get("classes") or [f"class {c}" for c in range(len(counts))]
        if len(classes) != len(counts):
            raise UserError(f"{folder / 'summary.json'} has {len(classes)} classes for a {counts.shape} matrix")
        correct, total = int(counts.trace()), int(counts.sum())
        data = " (synthetic sample)" if summary.get("synthetic") else ""
        title = f"{folder.resolve().name}{data}: {split} accuracy {correct / max(total, 1):.2%} ({correct}/{total})"
        written.append(plotted / "confusion_matrix.png")
        plots.confusion_matrix(counts, classes, written[1], title)
    if curves := plots.reliability_curves(events):
        written.append(plotted / "reliability.png")
        plots.reliability(curves, written[-1], folder.resolve().name)
    return written


def show_status(folders: Sequence[Path]) -> int:
    """Print a line for each run; returns 0, or 1 if one failed, else 3 if one gives no sign of life any more.

    Raises UserError where there is no run.
    """
    found = [(folder, status.read_status(folder)) for folder in folders]
    print("\n".join(status.line(folder, one) for folder, one in found))
    return status.exit_status([one["state"] for _, one in found])


def runs(folders: Sequence[Path]) -> str:
    """A table of finished runs of one configuration, and the mean and standard deviation of each figure.

    Seeds and folders may differ. Raises UserError for a run that is not finished, or is of another configuration.
    """
    if not folders:
        raise UserError("which runs? Give their folders, or --out for a page of all")
    first, *others = [_configuration(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UserError(f"{folder} is of another configuration than {folders[0]}: {key} {other.get(key)!r}")
    found = [read_summary(folder / "summary.json") for folder in folders]
    rows = []
    for folder, summary in zip(folders, found, strict=True):
        if missing := [key for key in FIGURES if key not in summary]:
            raise UserError(f"{folder} is not finished: its summary.json has no {missing[0]}")
        rows.append((folder.name, [float(summary[key]) * scale for key, scale in FIGURES.items()]))
    columns = list(zip(*(figures for _, figures in rows), strict=True))
    rows.append(("mean", [statistics.mean(column) for column in columns]))
    if len(folders) > 1:
        rows.append(("deviation", [statistics.stdev(column) for column in columns]))
    width = max(len(name) for name, _ in rows)
    heads = " ".join(f"{key.replace('_', ' '):>22}" for key in FIGURES)
    lines = [f"{name:<{width}} " + " ".join(f"{figure:>22.4f}" for figure in figures) for name, figures in rows]
    splits = dict.fromkeys(str(summary["split"]) for summary in found if "split" in summary)
    return "\n".join([f"{'':<{width}} {heads}", *lines, *(f"split: {split}" for split in splits)])


def _configuration(folder: Path) -> dict[str, object]:
    """What of a run's configuration may not differ between runs that are averaged."""
    flat = load(["--config", str(folder / "config.toml")]).flat()
    return {key: value for key, value in flat.items() if not key.startswith("run.") and key not in MAY_DIFFER}


def positive(text: str) -> int:
    """A number from 1 on. Raises ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _name(tree: Tree) -> str:
    return "synthetic sample" if tree.synthetic else tree.root.resolve().name


def _some(rng: np.random.Generator, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.sort(rng.permutation(indices)[:EXAMPLES_PER_CLASS])


def _read(path: Path, inputs: Inputs, size: int) -> NDArray[Any]:
    try:
        return read_pixels(read_file(path), inputs, None, size)
    except BadImageError as error:
        raise UserError(f"{path}: {error}") from None


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a name that ends in .png is wanted")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")


def _confusion(
    events: Sequence[dict[str, Any]], summary: dict[str, Any], folder: Path
) -> tuple[str, NDArray[np.int64] | None]:
    found = [("valid", e["confusion"]) for e in events if e["event"] == "valid" and "confusion" in e]
    found += [("test", summary["test_confusion"])] if "test_confusion" in summary else []
    found += [("test", e["confusion"]) for e in events if e["event"] == "test" and "confusion" in e]
    if not found:
        return "", None
    split, rows = found[-1]
    try:
        counts = np.array(rows, dtype=np.int64)
    except (ValueError, TypeError):
        raise UserError(f"{folder}: its {split} confusion matrix is damaged") from None
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise UserError(f"{folder}: its {split} confusion matrix is not square")
    return split, counts


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left of the words: of `schedule` the keys of a configuration."""
    parser = Parser(prog="python -m hvd_eurosat.report", description=__doc__, epilog=EXAMPLES)
    verbs = parser.add_subparsers(dest="what", metavar="samples|network|schedule|run|page|runs|status", required=True)

    def verb(name: str, does: str, more: str) -> Parser:
        text = f"{does[0].upper()}{does[1:]}. {more}"
        return verbs.add_parser(name, help=does, description=text, formatter_class=argparse.HelpFormatter)

    sample = verb(
        "samples",
        f"draw {EXAMPLES_PER_CLASS} examples of each class",
        "Look at the data before training on it; the same data give the same picture.",
    )
    sample.add_argument(
        "--data.root", dest="root", metavar="DIR", type=Path, required=True, help="folder with train/ valid/ test/"
    )
    sample.add_argument("--split", choices=SPLITS, default="train", help="which of them (default train)")
    net = verb(
        "network",
        "draw the modified ResNet-50",
        "Shapes for 64x64 images, and which parameters train in mode bn+head.",
    )
    rates = verb(
        "schedule",
        "draw the learning rate and the size of the images over the epochs",
        "It takes --config and every other key of train (train --help), and prints the epochs as a table.",
    )
    rates.add_argument("--ranks", type=positive, metavar="N", default=1, help=RANKS)
    for picture in (sample, net, rates):
        picture.add_argument("--out", metavar="PNG", type=Path, required=True, help="the file to write")
    of_run = verb(
        "run",
        "draw a run's learning curves, confusion matrix and reliability",
        "From its metrics.jsonl and summary.json into its plots/; also while it runs.",
    )
    page = verb(
        "page", "write a run's page, index.html", "From the files of the run, as training does after every epoch."
    )
    for of_one in (of_run, page):
        of_one.add_argument("--run.dir", dest="dir", metavar="DIR", type=Path, required=True, help="folder of the run")
    runs = verb(
        "runs",
        "compare runs: as a table here, or on a page",
        "Here: mean and standard deviation over finished runs of one configuration, whose seeds may differ. On the "
        "page: any runs, sorted as you like.",
    )
    runs.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="folders of runs; for a page, or of such (default: --out's)"
    )
    runs.add_argument("--out", metavar="HTML", type=Path, help="the page, such as runs/index.html")
    state = verb(
        "status",
        "say in a line whether a run is alive",
        "Exits with 0 (running, done, stopped on request), 1 (failed), 3 (no sign of life for a minute), 2 (no run).",
    )
    state.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs")
    options, left = parser.parse_known_args(argv)
    if left and options.what != "schedule":
        verbs.choices[options.what].error(f"unrecognized arguments: {' '.join(left)}")
    return options, left


if __name__ == "__main__":
    sys.exit(main())
