"""The page of a run, the comparison of runs, and the signs of life: what they say, made from the files of runs."""

from __future__ import annotations

import json
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_eurosat import report, train
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.run import comparison, examples, page, signs, status, story, svg
from hvd_eurosat.run.signs import Signs
from tests.unit.runs import CLASSES, NOW, confusion, grow_run, judged
from tests.unit.test_keys import BASE, configuration, grow_tree

VOID = {"meta", "link", "img", "br", "input", "wbr"}


class Reader(HTMLParser):
    """Checks that elements close in order; keeps the text that is seen, the addresses, and the figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.cells: dict[str, str] = {}
        self._cell = ""
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[key]) for key in ("src", "href") if key in given]
        if "cell" in str(given.get("class")):
            self._cell = str(given.get("title"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " ".join(data.split()) + "\n" if data.strip() else ""
            if self._cell:
                self.cells[self._cell] = data.strip()
                self._cell = ""


def read(folder: Path) -> Reader:
    return Reader(page.write_page(folder).read_text())


def test_a_finished_run(tmp_path: Path) -> None:
    """What was trained on what, how good it is, on which classes it fails, where its images are, how to go on."""
    html = read(grow_run(tmp_path / "first", optim__lr=0.25))
    for words in (
        "A resnet50 has learnt to tell 3 classes of images apart, from 900 images of Patches.",
        "Of 180 test images, which it had never seen, it classifies 93.33 % rightly (95 % interval 88.7 to 96.1 %).",
        "It is weakest on Pasture, of which 48 of 60 images are recognised. "
        "Most frequent mistakes: Pasture taken for River (12 of 60).",
        "recipes/finetune.toml -> runs/first",
        "imagenet weights; the BatchNorm layers and the head (the last layer) train",
        "Forest, Pasture, River",
        "node1 (1 rank), node2 (1 rank)",
        "94:5:1 by prepare, at random by seed 0 (digest abc)",
        "Epoch 3: rank 1 (node2) was 50 % slower than the others.",
        "Epoch 3: a step was skipped; loss or gradients were not finite.",
        f"evaluate --checkpoint {tmp_path}/first/checkpoints/best.json --data.root data/Patches --split test",
        f"{3:064x}",
        "optim.lr",
        "default 0.005",
    ):
        assert words in html.text, words
    assert html.cells["Pasture, taken for River"] == "12"
    assert html.cells["Forest, recognised"] == "60"
    assert "reloads itself" not in html.text
    assert (tmp_path / "first" / "index.html").stat().st_size < 2e6


def test_it_needs_no_network(tmp_path: Path) -> None:
    html = read(grow_run(tmp_path / "first"))
    assert len([address for address in html.addresses if address.startswith("data:image/jpeg")]) > 12
    assert all(address.startswith("data:") for address in html.addresses)
    text = (tmp_path / "first" / "index.html").read_text()
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^'\" )]+", text)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_run_that_goes_on(tmp_path: Path, epochs: int) -> None:
    told = {"updated": time.time(), "seconds_left": 125.0, "phase": "training", "images_per_second": 210.0}
    html = read(grow_run(tmp_path / "first", "running", epochs, told))
    assert "2 min 5 s" in html.text
    assert "reloads itself" in html.text
    assert ("No epoch is complete yet." in html.text) == (epochs == 0)
    assert ("best validation so far is 70.00 %, after epoch 2" in html.text) == (epochs == 2)
    assert ("48 of 60 images are recognised (validation after epoch 2)" in html.text) == (epochs == 2)
    assert ("no step was skipped" in html.text) == (epochs == 2)
    assert f"report page --run.dir {tmp_path / 'first'}" in html.text


def test_a_run_that_failed(tmp_path: Path) -> None:
    html = read(grow_run(tmp_path / "first", "failed", 2, {"error": "loss was not finite: try a lower <optim.lr>"}))
    assert "It failed in epoch 3 of 4, after 23 steps." in html.text
    assert "loss was not finite: try a lower <optim.lr>" in html.text
    assert "The newest checkpoint is of epoch 2, step 20. Start the same command again" in html.text


def test_a_run_that_died_without_a_word(tmp_path: Path) -> None:
    html = read(grow_run(tmp_path / "first", "running", 2))
    assert "No sign of life" in html.text
    assert "out of memory, a time limit, a lost node" in html.text
    assert "reloads itself" not in html.text


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    starts = [{"time": NOW - 900 + n, "epoch": n, "step": 10 * n, "world_size": 2} for n in (0, 1, 2)]
    html = read(grow_run(tmp_path / "first", status={"starts": starts}))
    assert "resumed 2 times" in html.text
    assert len(re.findall('class="mark"', (tmp_path / "first" / "index.html").read_text())) == 8  # in four charts


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Neither status.json nor examples."""
    folder = grow_run(tmp_path / "first")
    for name in ("status.json", "examples.json"):
        (folder / name).unlink()
    html = read(folder)
    assert "Of 180 test images" in html.text
    assert "Click an underlined number" not in html.text


def test_names_are_not_code(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a|b", "'\"&"]
    folder = grow_run(tmp_path / "<b>", status={"classes": names, "header": {"data": "<img src=x onerror=alert(1)>"}})
    text = page.write_page(folder).read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert names[0] in Reader(text).text


def test_many_classes(tmp_path: Path) -> None:
    count = 150
    folder = grow_run(tmp_path / "first")
    (folder / "examples.json").unlink()
    matrix = np.full((count, count), 1).tolist()
    test = {"event": "test", "epoch": 3, "loss": 1.0, "accuracy": 0.1, "confusion": matrix}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(test) + "\n")
    told = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(told | {"classes": [f"kind {n}" for n in range(count)]}))
    assert "Of 150 classes, the most frequent mistakes" in read(folder).text
    assert (folder / "index.html").stat().st_size < 2e6


def test_a_class_that_has_no_images_is_not_the_weakest(tmp_path: Path) -> None:
    folder = grow_run(tmp_path / "first")
    test = {"event": "test", "epoch": 3, "loss": 1.0, "accuracy": 0.9, "confusion": [[60, 0, 0], [0, 0, 0], [6, 0, 54]]}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(test) + "\n")
    html = read(folder)
    assert "It is weakest on River, of which 54 of 60 images are recognised." in html.text
    assert "none given" in html.text


def test_checkpoints_of_which_part_is_in_another_file(tmp_path: Path) -> None:
    folder = grow_run(tmp_path / "first")
    assert "beside them" not in read(folder).text
    for path in (folder / "checkpoints").glob("epoch-*.json"):
        frozen = {"file": "frozen-abc.safetensors", "size": 9, "sha256": "f" * 64}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": frozen}))
    html = read(folder)
    assert "frozen-abc.safetensors" in html.text
    assert "f" * 64 in html.text


def test_report_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grow_run(tmp_path / "first")
    assert report.main(["page", "--run.dir", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'index.html'}\n"
    assert report.main(["page", "--run.dir", str(tmp_path)]) == 2
    assert "--run.dir wants the folder of a run" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("no json\n")
    assert report.main(["page", "--run.dir", str(folder)]) == 2
    assert "metrics.jsonl is damaged in line 1" in capsys.readouterr().err


# --- what is shown of the images ---


def test_the_worst_come_first_and_no_pair_hides_another() -> None:
    values, labels, _ = judged()
    values = values.copy()
    values[0] = np.log([0.3, 0.4, 0.3])  # a forest, unsurely taken for a pasture
    chosen = examples.choose(np.exp(values.astype(np.float64)), labels)
    assert chosen[:3] == [71, 0, 70]
    wrong = [n for n in chosen if values[n].argmax() != labels[n]]
    assert sorted(wrong) == [0, *range(60, 72)]
    assert {int(labels[n]) for n in chosen if n not in wrong} == {0, 1, 2}


def test_many_large_images_leave_room(tmp_path: Path) -> None:
    values, labels, _ = judged()
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 256, 256, 3), dtype=np.uint8)
    names = [str(n) for n in range(len(labels))]
    examples.write_examples(tmp_path / "examples.json", names, values, labels, images, 1)
    assert (tmp_path / "examples.json").stat().st_size < 1.5e6


def test_calibration() -> None:
    drawn = svg.reliability(np.array([[0, 8, 2], [0, 4.8, 1.8], [0, 6, 1]]))
    assert re.findall("<title>(.*?)</title>", drawn) == [
        "8 images: 60.0 % sure, 75.0 % right",
        "2 images: 90.0 % sure, 50.0 % right",
    ]


def test_wilsons_interval() -> None:
    """Of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert story.Counted(correct, total).interval == pytest.approx((low, high), abs=1e-4)
    assert story.Counted(0, 0).interval == (0, 1)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.61, 0.98, [0.6, 0.7, 0.8, 0.9, 1.0]), (2, 2, [2, 2.5]), (0, 0, [0, 0.25])],
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert svg.nice_ticks(low, high) == pytest.approx(ticks)


def test_a_curve_with_holes_and_many_points() -> None:
    values = [None if n % 7 == 0 else float("%.3g" % (1 / (n + 1))) for n in range(5000)]
    drawn = str(svg.chart("Loss", range(1, 5001), [svg.Curve("training", "train", values)], "{:.3f}"))
    assert len(drawn) < 60_000
    assert "nan" not in drawn


# --- several runs ---


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        grow_run(tmp_path / name, train__seed=seed)
    grow_run(tmp_path / "far", status={"split": "by torchgeo's spatial lists (digest def)"}, train__seed=2)
    grow_run(tmp_path / "other", "running", 1, {"updated": time.time()}, optim__lr=0.25, train__seed=0)
    page.write_page(tmp_path / "a")
    assert report.main(["runs", "--out", str(tmp_path / "index.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'index.html'}\n"
    html = Reader((tmp_path / "index.html").read_text())
    assert "a/index.html" in html.addresses
    assert "b/index.html" not in html.addresses
    groups = comparison.groups([story.read_story(tmp_path / name) for name in ("a", "b", "far", "other")])
    assert [group["names"] for group in groups] == [["a", "b"]]
    assert groups[0]["test"] == {"mean": pytest.approx(168 / 180), "deviation": 0, "count": 2}
    data = json.loads(re.findall(r'id="runs-data">(.*?)</script>', (tmp_path / "index.html").read_text())[0])
    assert [config["optim.lr"] for config in data["configs"]] == ["0.005", "0.005", "0.005", "0.25"]
    assert "by torchgeo's spatial lists (digest def)" in html.text


@pytest.mark.parametrize(
    ("told", "same"), [({}, True), ({"split": "another (digest def)"}, False), ({"world_size": 4}, False)]
)
def test_runs_of_one_configuration(tmp_path: Path, told: dict[str, Any], same: bool) -> None:
    """Another split is another configuration, and so are more ranks, whose batch is larger."""
    folders = [grow_run(tmp_path / "a"), grow_run(tmp_path / "b", status=told, train__seed=1)]
    assert len(comparison.groups([story.read_story(folder) for folder in folders])) == same


def test_a_comparison_says_why_a_run_failed(tmp_path: Path) -> None:
    """And tells runs of one name apart."""
    folders = [grow_run(tmp_path / place / "run", "failed", 1, {"error": f"<{place}>"}) for place in ("a", "b")]
    text = Reader(comparison.write_comparison(folders, tmp_path / "index.html").read_text()).text
    for words in ("<a>", "<b>", str(folders[0]), str(folders[1])):
        assert words in text, words


def test_mean_and_deviation() -> None:
    assert comparison.spread([0.9, 0.92, 0.94]) == {
        "mean": pytest.approx(0.92),
        "deviation": pytest.approx(0.02),
        "count": 3,
    }
    assert comparison.spread([0.9]) == {"mean": 0.9, "deviation": 0, "count": 1}
    assert comparison.spread([]) is None


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["runs", "--out", str(tmp_path / "index.html")]) == 2
    assert "no run in" in capsys.readouterr().err


# --- signs of life ---


@pytest.mark.parametrize(
    ("state", "told", "exit_status", "words"),
    [
        ("running", {"updated": time.time() + 1e6}, 0, "running  epoch 3/4, step 23  loss 0.5000"),
        ("running", {}, 3, "stale, no sign of life for "),
        ("done", {"test_accuracy": 0.93}, 0, "done  epoch 3/4, step 30  loss 0.5000  test 93.00%"),
        ("stopped", {}, 0, "stopped"),
        ("failed", {"error": "the disk is full"}, 1, "failed: the disk is full"),
    ],
)
def test_report_status(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    told: dict[str, Any],
    exit_status: int,
    words: str,
) -> None:
    epochs = 3 if state == "done" else 2
    folder = grow_run(tmp_path / "first", state, epochs, {"loss": 0.5, **told})
    assert report.main(["status", str(folder)]) == exit_status
    assert capsys.readouterr().out.startswith(f"{folder}: {words}")


def test_the_worst_of_several_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {"a": "done", "b": "running", "c": "failed"}
    folders = [grow_run(tmp_path / name, state, 1) for name, state in states.items()]
    assert report.main(["status", *map(str, folders[:2])]) == 3
    assert report.main(["status", *map(str, folders)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert report.main(["status", str(tmp_path)]) == 2
    assert "status.json: No such file or directory" in capsys.readouterr().err


def test_last_words_of_another_rank(tmp_path: Path) -> None:
    """The first are kept: the others lost their peer."""
    folder = grow_run(tmp_path / "first", "running", 1, {"updated": time.time()})
    status.leave_failure(folder, "the disk is full (rank 3 on node2)")
    status.leave_failure(folder, "lost the other ranks (rank 1 on node1)")
    assert status.read_status(folder)["error"] == "the disk is full (rank 3 on node2)"
    assert "the disk is full (rank 3 on node2)" in read(folder).text
    status.leave_failure(tmp_path / "nowhere", "no folder")
    told = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(told | {"updated": time.time() + 100}))
    assert status.read_status(folder)["state"] == "running", "an elastic job goes on without that rank"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (125, "2 min 5 s"), (7500, "2 h 5 min"), (273600, "3 days 4 h"), (-3, "0 s")]
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert status.span(seconds) == text


FACTS = {"epoch": 1, "epochs": 4, "step": 0, "world_size": 2, "samples": 0}


def begun(folder: Path, warnings: list[str], resumed: bool = False, **keys: Any) -> Signs:
    made = Signs(folder, Config(run={"dir": folder, **keys}), warnings.append)
    made.begin(resumed, 0, **FACTS)
    return made


def test_signs_of_life(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "metrics.jsonl").write_text("")
    made = begun(tmp_path, warnings, metrics_file=tmp_path / "out" / "run.prom")
    made.tell(step=7, loss=float("nan"), ranks=[{"rank": 1, "host": 'no"de', "step_seconds": 0.25}])
    made.end(state="done", test_accuracy=0.5)
    assert warnings == []
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["step"], told["loss"], told["epoch"]) == ("done", 7, None, 1)
    assert len(told["starts"]) == 1
    metrics = (tmp_path / "out" / "run.prom").read_text()
    for line in (
        f'hvd_eurosat_state{{run="{tmp_path}",state="done"}} 1.0',
        f'hvd_eurosat_state{{run="{tmp_path}",state="running"}} 0.0',
        f'hvd_eurosat_step{{run="{tmp_path}"}} 7.0',
        f'hvd_eurosat_test_accuracy_ratio{{run="{tmp_path}"}} 0.5',
        "# TYPE hvd_eurosat_step gauge",
    ):
        assert line in metrics
    assert re.search(r'hvd_eurosat_rank_step_seconds\{.*host="no\\"de".*\} 0\.25', metrics)
    assert "hvd_eurosat_loss" not in metrics
    assert (tmp_path / "index.html").exists()
    begun(tmp_path, warnings, resumed=True).end(state="failed", error="x")
    assert len(json.loads((tmp_path / "status.json").read_text())["starts"]) == 2
    begun(tmp_path, warnings).end()
    assert len(json.loads((tmp_path / "status.json").read_text())["starts"]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "signs of life"]


def test_a_page_is_written_anew_within_a_long_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "INTERVAL", 0.01)
    monkeypatch.setattr(signs, "MOST_SECONDS", 0.02)
    drawn = threading.Semaphore(0)
    monkeypatch.setattr(signs, "write_page", lambda folder: drawn.release())
    made = begun(tmp_path, [])
    assert all(drawn.acquire(timeout=30) for _ in range(3))
    made.end(state="done")


def test_without_a_page(tmp_path: Path) -> None:
    begun(tmp_path, [], page=False).end(state="done")
    assert not (tmp_path / "index.html").exists()
    assert (tmp_path / "status.json").exists()


def test_what_cannot_be_written_is_a_warning_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "INTERVAL", 0.01)
    (tmp_path / "metrics.jsonl").write_text("")
    for name in ("status.json", "index.html"):
        (tmp_path / name).mkdir()
    warnings: list[str] = []
    made = begun(tmp_path, warnings)
    for _ in range(3):
        made.draw()
        time.sleep(0.05)
    made.end(state="done")
    assert sorted(warning.split()[0] for warning in warnings) == ["index.html", "status.json"]
    assert all(warning.endswith("; the run goes on") for warning in warnings)


def test_the_metrics_file_has_the_name_that_is_read() -> None:
    with pytest.raises(UserError, match=r"run\.metrics_file: a name that ends in \.prom is wanted"):
        load(["--run.metrics_file", "metrics.txt"])


def test_the_fixture_is_as_training_writes_it() -> None:
    values, labels, _ = judged()
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (labels, values.argmax(1)), 1)
    assert counts.tolist() == confusion()
    assert len(CLASSES) == 3


def test_a_run_whose_page_cannot_be_written_ends_as_if_it_could(
    alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for name in ("index.html", "status.json", "examples.json"):
        (run / name).mkdir(parents=True)
    keys = {"data.root": grow_tree(tmp_path / "data", 32), "run.dir": run, "model.trainable": "all"}
    assert train.train(alone, configuration(BASE | keys)) == 0
    assert (run / "summary.json").exists()
    said = capsys.readouterr().err
    assert said.count("index.html of ") == said.count("status.json of ") == said.count("without images") == 1
    assert len(said.splitlines()) == 3


def test_a_run_that_fails_says_why(alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next start forgets it."""
    keys = {"data.root": grow_tree(tmp_path / "data", 32), "run.dir": tmp_path / "run", "model.trainable": "head"}
    config = configuration(BASE | keys)

    def full(*_: object, **__: object) -> None:
        raise RunError("cannot write x: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", full)
        with pytest.raises(RunError):
            train.train(alone, config)
    told = status.read_status(tmp_path / "run")
    assert (told["error"], told["step"]) == ("cannot write x: No space left on device", 2)
    assert "cannot write x: No space left on device" in (tmp_path / "run" / "index.html").read_text()
    assert train.train(alone, config) == 0
    told = status.read_status(tmp_path / "run")
    trained = [event for event in story.read_events(tmp_path / "run" / "metrics.jsonl") if event["event"] == "train"]
    assert (told["state"], told.get("error"), told["loss"]) == ("done", None, trained[-1]["loss"])
    assert "It failed" not in (tmp_path / "run" / "index.html").read_text()
