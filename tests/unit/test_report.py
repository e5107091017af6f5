"""The pictures are drawn, and bad input is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvd_eurosat import report
from hvd_eurosat.config.reading import load
from hvd_eurosat.data import sample
from hvd_eurosat.errors import RunError
from hvd_eurosat.run import plots

EVENTS = [
    {"event": "start", "epoch": 0},
    {"event": "train", "epoch": 1, "loss": 2.1, "accuracy": 0.3, "learning_rate": 0.1, "images_per_second": 99.0},
    {"event": "valid", "epoch": 1, "loss": 1.8, "accuracy": 0.5, "confusion": [[5, 5], [5, 5]]},
    {"event": "train", "epoch": 2, "loss": 1.1, "accuracy": 0.7, "learning_rate": 0.1, "images_per_second": 99.0},
    {"event": "valid", "epoch": 2, "loss": 1.0, "accuracy": 0.75, "confusion": [[9, 1], [4, 6]]},
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Class folders with two pictures of each class in each split."""
    for split in ("train", "valid", "test"):
        for name, data in sample.generate(per_class=2):
            path = tmp_path / "data" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path / "data"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return folder


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_samples(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "samples.png"
    assert report.main(["samples", "--data.root", str(tree), "--split", "test", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert _size(out)[1] > 600
    first = out.read_bytes()
    assert report.main(["samples", "--data.root", str(tree), "--split", "test", "--out", str(out)]) == 0
    assert out.read_bytes() == first


def test_samples_names_a_damaged_image(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "train" / "Forest" / "Forest_1.jpg").write_bytes(b"no image")
    assert report.main(["samples", "--data.root", str(tree), "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Forest_1.jpg" in error
    assert not (tmp_path / "a.png").exists()


def test_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: texts.extend(t.get_text() for t in figure.axes[0].texts))
    plots.network(tmp_path / "network.png")
    for text in ("23,454,912", "53,120", "20,480", "23,528,512 in all, 73,600 of them train", "2048 × 2 × 2"):
        assert text in texts


def test_network_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "network.png"
    assert report.main(["network", "--out", str(out)]) == 0
    assert _size(out)[0] > 1000


def test_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one_cycle after a warm-up: a linear rise, then a cosine; the images reach their size in the last epoch."""
    out = tmp_path / "schedule.png"
    keys = ["--train.epochs=4", "--optim.warmup_epochs=2", "--optim.lr=0.5", "--train.start_size=32"]
    keys += ["--optim.lr_scaling=linear", "--train.batch_size=32", "--ranks=4"]
    assert report.main(["schedule", "--out", str(out), *keys]) == 0
    head, *lines, wrote = capsys.readouterr().out.splitlines()
    assert head.split() == ["epoch", "learning", "rate", "at", "its", "beginning", "and", "end", "images"]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    rates = [float(rate) for row in rows for rate in row[1:3]]
    assert rates == pytest.approx([0, 0.5, 0.5, 1, 1, 0.5, 0.5, 0], abs=1e-3)
    assert [row[3] for row in rows] == ["32x32", "48x48", "64x64", "64x64"]
    assert wrote == f"wrote {out}"
    assert _size(out)[0] > 600


def test_the_schedule_of_an_rmldnn_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {
        "num_epochs": 6,
        "data": {"input_type": "images", "input_path": "data/train"},
        "optimizer": {"type": "SGD", "lr_scheduler": {"type": "Warmup", "num_epochs": 5, "start_factor": 0.2}},
    }
    (tmp_path / "c.json").write_text(json.dumps({"neural_network": network}))
    assert report.main(["schedule", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "s.png")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [float(row[1]) for row in rows] == pytest.approx([0.002, 0.0036, 0.0052, 0.0068, 0.0084, 0.01])
    assert [row[1] for row in rows] == [row[2] for row in rows]
    assert rows[0][3:] == ["of", "their", "own", "size"]


def test_run_in_progress(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "epo')
    assert report.main(["run", "--run.dir", str(run_dir)]) == 0
    assert {path.name for path in (run_dir / "plots").iterdir()} == {"learning_curves.png", "confusion_matrix.png"}
    for path in (run_dir / "plots").iterdir():
        assert _size(path)[0] > 300


@pytest.mark.parametrize(
    ("event", "summary", "title"),
    [
        ({}, {}, "run: valid accuracy 75.00% (15/20)"),
        (
            {},
            {"test_confusion": [[3, 0], [1, 0]], "synthetic": True},
            "run (synthetic sample): test accuracy 75.00% (3/4)",
        ),
        ({"confusion": [[4, 0], [0, 4]]}, {"test_confusion": [[1, 0], [1, 0]]}, "run: test accuracy 100.00% (8/8)"),
    ],
)
def test_run_prefers_the_test(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, event: dict[str, object], summary: dict[str, object], title: str
) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "test", "epoch": 2, "loss": 1.0, "accuracy": 1.0, **event}) + "\n")
    (run_dir / "summary.json").write_text(json.dumps({"classes": ["Forest", "River"], **summary}))
    drawn = []
    monkeypatch.setattr(plots, "confusion_matrix", lambda *arguments: drawn.append(arguments))
    assert report.main(["run", "--run.dir", str(run_dir)]) == 0
    assert drawn[0][1] == ["Forest", "River"]
    assert drawn[0][3] == title


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no finished epoch"),
        ("{}\n", "damaged in line 1"),
        ("[]\n", "damaged in line 1"),
        ('{"event": "start"}\nnot json\n', "damaged in line 2"),
        ('{"event": "train", "epoch": 1, "loss": null, "accuracy": 1}\n', "damaged in line 1"),
        ('{"event": "valid", "epoch": 1, "loss": 1, "accuracy": 1, "confusion": [[1, 2]]}\n', "not square"),
        ('{"event": "valid", "epoch": 1, "loss": 1, "accuracy": 1, "confusion": "x"}\n', "confusion matrix"),
    ],
)
def test_run_refuses_bad_metrics(run_dir: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str) -> None:
    (run_dir / "metrics.jsonl").write_text(text)
    assert report.main(["run", "--run.dir", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert complaint in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--run.dir", "nowhere"], "--run.dir"),
        (["samples", "--data.root", "nowhere", "--out", "a.png"], "no data at nowhere"),
        (["network", "--out", "a.jpg"], ".png"),
        (["network", "--out", "nowhere/a.png"], "there is no folder nowhere"),
        (["schedule", "--out", "a.png", "--optim.lr", "high"], "optim.lr: Input should be a valid number"),
        (["schedule", "--out", "a.png", "--optim.schedule", "multistep"], "multistep wants optim.milestones"),
        (["schedule", "--out", "a.png", "--more"], "unrecognized arguments: --more"),
    ],
)
def test_bad_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["pie"], ["samples"], ["network", "--out", "a.png", "--more"], ["schedule", "--out", "a.png", "--ranks", "0"]],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_plots_of_odd_sizes(tmp_path: Path) -> None:
    plots.learning_curves([], tmp_path / "empty.png")
    plots.learning_curves(EVENTS[:2], tmp_path / "one.png")
    counts = np.zeros((45, 45), np.int64)
    counts[0, 0] = 1000
    plots.confusion_matrix(counts, [f"class_{i}" for i in range(45)], tmp_path / "many.png", "45 classes")
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.array([0, 0, 1])
    plots.sample_grid(images, labels, ["two", "one", "none"], tmp_path / "uneven.png", "uneven")
    for name in ("empty", "one", "many", "uneven"):
        assert _size(tmp_path / f"{name}.png")[0] > 100


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        plots.learning_curves(EVENTS, tmp_path / "missing" / "a.png")


def finished(folder: Path, seed: int, accuracy: float, *words: str) -> Path:
    """A finished run, as far as `report runs` reads it."""
    folder.mkdir()
    (folder / "config.toml").write_text(load(["--train.seed", str(seed), "--run.dir", str(folder), *words]).to_toml())
    figures = dict.fromkeys(report.FIGURES, 0.5) | {"test_accuracy": accuracy, "split": "by torchgeo's spatial lists"}
    (folder / "summary.json").write_text(json.dumps(figures))
    return folder


def test_runs_of_one_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90, 92 and 97 %: a mean of 93 and a standard deviation of the square root of 13."""
    folders = [finished(tmp_path / f"run-{seed}", seed, right) for seed, right in ((0, 0.9), (1, 0.92), (2, 0.97))]
    assert report.main(["runs", *map(str, folders)]) == 0
    head, *rows, split = capsys.readouterr().out.splitlines()
    assert split == "split: by torchgeo's spatial lists"
    assert [row.split()[0] for row in rows] == ["run-0", "run-1", "run-2", "mean", "deviation"]
    assert "test accuracy" in head
    assert rows[3].split()[2] == "93.0000"
    assert rows[4].split()[2] == "3.6056"
    assert report.main(["runs", str(folders[0])]) == 0
    assert "deviation" not in capsys.readouterr().out


def test_runs_that_are_not_alike_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (finished(tmp_path / name, 0, 0.9, *words) for name, words in (("a", ()), ("b", ("--optim.lr", "1"))))
    assert report.main(["runs", str(one), str(other)]) == 2
    assert f"error: {other} is of another configuration than {one}: optim.lr 1.0" in capsys.readouterr().err
    (one / "summary.json").unlink()
    assert report.main(["runs", str(one)]) == 2
    assert f"error: {one} is not finished" in capsys.readouterr().err
