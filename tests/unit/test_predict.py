"""predict and evaluate on many files: what is bad is named, all of it, and what is left out is counted and listed."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_eurosat import evaluate, predict
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Model
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import build
from tests.unit.conftest import Encode, Grow, saved_checkpoint

CLASSES = ["Forest", "Lake", "River"]
Asked = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, narrow_resnet18: None) -> Path:
    model, kind = build("resnet18", 3, "all", seed=0), Model(arch="resnet18", trainable="all")
    return saved_checkpoint(tmp_path_factory.mktemp("saved") / "epoch-0003.pt", model, CLASSES, kind)


@pytest.fixture
def asked(saved: Path, tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str]) -> Asked:
    """asked(verb, *arguments): status, stdout and stderr, with --out tmp_path/out."""

    def ask(verb: Any, *arguments: object) -> tuple[int, str, str]:
        words = ["--checkpoint", str(saved), "--out", str(tmp_path / "out"), *map(str, arguments)]
        settings = verbs.predict(words) if verb is predict else verbs.evaluate(words)
        status = verb.main(alone, settings)
        return status, *capsys.readouterr()

    return ask


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def images(grow: Grow, encode: Encode) -> Path:
    """Five good files and three bad ones, of which one has no image's name."""
    root = grow("images", {"Forest": 3, "River": 2})
    (root / "Forest" / "cut.jpg").write_bytes(encode(1)[:-400])
    (root / "River" / "grey.png").write_bytes(encode(2, kind="PNG", mode="L"))
    (root / "River" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("verb", [predict, evaluate])
def test_all_bad_files_are_named_and_nothing_is_left(asked: Asked, images: Path, tmp_path: Path, verb: Any) -> None:
    with pytest.raises(UserError) as error:
        asked(verb, "--input", images, "--out", tmp_path / "deep" / "er")
    said = str(error.value)
    assert said.startswith("3 of 8 files of the input cannot be used (--skip-bad leaves them out):")
    for name in ("Forest/cut.jpg: it does not decode", "River/grey.png: mode L", "River/notes.txt: not a readable"):
        assert f"{images}/{name}" in said
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("verb", [predict, evaluate])
def test_bad_files_are_skipped_and_listed(asked: Asked, images: Path, tmp_path: Path, verb: Any) -> None:
    """The good ones are answered as without them, and names join all that is written."""
    status, said, warned = asked(verb, "--input", images, "--skip-bad")
    assert (status, "5 predictions" in said) == (0, True)
    assert "warning: 3 of 8 files cannot be used and are left out" in warned
    skipped = table(tmp_path / "out" / "skipped.csv")
    assert [row["name"] for row in skipped] == ["Forest/cut.jpg", "River/grey.png", "River/notes.txt"]
    assert [row["file"] for row in skipped] == [str(images / row["name"]) for row in skipped]
    assert "mode L" in skipped[1]["reason"]
    rows = table(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 5
    with h5py.File(tmp_path / "out" / "output_1.h5") as file:
        found = {row["name"]: file[row["name"]][()] for row in rows}
    for row in rows:
        assert row["class"] == CLASSES[int(found[row["name"]].argmax())]
    if verb is evaluate:
        assert said.splitlines()[-1].endswith("/5)")
    assert asked(verb, "--input", images, "--skip-bad", "--strict")[0] == 3
    for row in skipped:
        Path(row["file"]).unlink()
    assert asked(verb, "--input", images, "--skip-bad", "--strict")[0] == 0
    assert not (tmp_path / "out" / "skipped.csv").exists()
    with h5py.File(tmp_path / "out" / "output_1.h5") as file:
        for name, values in found.items():
            assert np.allclose(file[name][()], values, atol=1e-5)


def test_where_all_files_are_bad(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for n in range(2):
        (tmp_path / "bad" / f"{n}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 2 files of the input cannot be used"):
        asked(predict, "--input", tmp_path / "bad", "--skip-bad")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_folders_is_a_tree(asked: Asked, images: Path, encode: Encode, tmp_path: Path) -> None:
    """An image beside the class folders is refused as elsewhere; what is named itself may lie anywhere."""
    (images / "lost.jpg").write_bytes(encode(9))
    with pytest.raises(UserError) as error:
        asked(predict, "--input", images)
    lost = f"{images}: lost.jpg lies outside the class folders: move it into one, or elsewhere"
    assert str(error.value) == f"{lost}; or name images and folders themselves: --input a.png b/, or --list FILE"
    asked(predict, "--input", images / "lost.jpg", images / "Forest", "--skip-bad")
    names = [row["name"] for row in table(tmp_path / "out" / "predictions.csv")]
    assert names == ["Forest_1.jpg", "Forest_2.jpg", "Forest_3.jpg", "lost.jpg"]
    (tmp_path / "words").mkdir()
    (images / "River" / "notes.txt").rename(tmp_path / "words" / "notes.txt")
    with pytest.raises(UserError, match=r"has no images .*: notes\.txt$"):  # naming it would not help
        asked(predict, "--input", tmp_path / "words")


@pytest.mark.parametrize("verb", [predict, evaluate])
def test_an_image_that_is_linked_into_two_classes(asked: Asked, grow: Grow, tmp_path: Path, verb: Any) -> None:
    root = grow("linked", {"Forest": 2, "River": 1})
    (root / "River" / "hard.jpg").hardlink_to(root / "Forest" / "Forest_1.jpg")
    (root / "River" / "soft.jpg").symlink_to("River_1.jpg")  # twice in one class
    with pytest.raises(UserError) as error:
        asked(verb, "--input", root)
    for one, other in (("Forest/Forest_1.jpg", "River/hard.jpg"), ("River/hard.jpg", "Forest/Forest_1.jpg")):
        assert f"{root}/{one}: the same image as {other} of another class" in str(error.value)
    asked(verb, "--input", root, "--skip-bad")
    assert [row["name"] for row in table(tmp_path / "out" / "skipped.csv")] == ["Forest/Forest_1.jpg", "River/hard.jpg"]
    names = [row["name"] for row in table(tmp_path / "out" / "predictions.csv")]
    assert names == ["Forest/Forest_2.jpg", "River/River_1.jpg", "River/soft.jpg"]


def test_flags_that_do_not_fit(saved: Path, asked: Asked, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--strict goes with --skip-bad"):
        asked(predict, "--input", images, "--strict")
    with pytest.raises(UserError, match="--input or --list is required"):
        asked(predict)
    with pytest.raises(UserError, match="--top 4: the checkpoint knows 3 classes"):
        asked(predict, "--input", images, "--top", 4)
    with pytest.raises(UserError, match="--skip-bad goes with --input"):
        asked(evaluate, "--data.root", tmp_path, "--skip-bad")


def test_the_likeliest_classes(asked: Asked, images: Path, tmp_path: Path) -> None:
    asked(predict, "--input", images, "--skip-bad", "--top", 3)
    rows = table(tmp_path / "out" / "predictions.csv")
    assert list(rows[0]) == [
        "name",
        "file",
        "class",
        "probability",
        "class_2",
        "probability_2",
        "class_3",
        "probability_3",
    ]
    for row in rows:
        chances = [float(row[f"probability{place}"]) for place in ("", "_2", "_3")]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert {row["class"], row["class_2"], row["class_3"]} == set(CLASSES)


@pytest.mark.parametrize("stdin", [False, True])
def test_a_list_of_files(
    asked: Asked, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: bool
) -> None:
    """Their lines join the predictions by `file`, and the names of both files are one, as HDF5 lists them."""
    lines = [
        str(images / "River" / "River_1.jpg"),
        str(images / "Forest" / "Forest_1.jpg"),
        os.path.relpath(images / "no.jpg"),
    ]
    text = "\n".join([lines[0], "", *lines[1:], ""])
    (tmp_path / "list.txt").write_text(text, encoding="utf-8-sig")  # as editors of Windows do
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    asked(predict, "--list", "-" if stdin else tmp_path / "list.txt", "--skip-bad")
    rows = table(tmp_path / "out" / "predictions.csv")
    assert sorted(row["file"] for row in rows) == sorted(lines[:2])
    assert [row["name"] for row in table(tmp_path / "out" / "skipped.csv")] == lines[2:]
    found: list[str] = []
    with h5py.File(tmp_path / "out" / "output_1.h5") as file:
        file.visititems(lambda name, found_here: found.append(name) if isinstance(found_here, h5py.Dataset) else None)
    assert [row["name"] for row in rows] == found == sorted(line.removeprefix("/") for line in lines[:2])


def test_two_lines_of_one_name(asked: Asked, images: Path, tmp_path: Path) -> None:
    file = str(images / "Forest" / "Forest_1.jpg")
    (tmp_path / "list.txt").write_text(f"{file}\n{file[1:]}\n")
    with pytest.raises(UserError, match=f"both {file} and {file[1:]} would be {file[1:]} among the predictions"):
        asked(predict, "--list", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(f"{file}\n{file}\n")
    with pytest.raises(UserError, match=f"{file} is named twice: name it once"):
        asked(predict, "--list", tmp_path / "list.txt")


def test_a_folder_in_a_list(asked: Asked, images: Path, tmp_path: Path) -> None:
    """`find patches` lists them, too."""
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(images.rglob("*"))))
    with pytest.raises(UserError, match=r"--list: \S+ is a folder: list files \(find \S+ -type f\), or give --input"):
        asked(predict, "--list", tmp_path / "list.txt")


def test_litter_in_a_list(asked: Asked, images: Path, tmp_path: Path) -> None:
    """A thumbnail, as `find` lists it; but a hidden folder around the images was named by their user."""
    (images / "Forest" / "@eaDir").mkdir()
    (images / "Forest" / "Forest_1.jpg").rename(images / "Forest" / "@eaDir" / "Forest_1.jpg")
    images.rename(hidden := tmp_path / ".images")
    files = sorted(path for path in (hidden / "Forest").rglob("*") if path.is_file())
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in files))
    said = asked(predict, "--list", tmp_path / "list.txt", "--skip-bad")[2]
    assert "note: the input: left out files and folders that are no data: 1 @eaDir\n" in said
    assert [row["file"] for row in table(tmp_path / "out" / "predictions.csv")] == list(map(str, files[1:3]))
    (tmp_path / "list.txt").write_text(f"{files[0]}\n")
    with pytest.raises(UserError, match=r"no image is left; the input: left out .* 1 @eaDir"):
        asked(predict, "--list", tmp_path / "list.txt")


def test_lists_that_cannot_be_read(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--list .*nowhere: No such file"):
        asked(predict, "--list", tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(UserError, match="it names no files"):
        asked(predict, "--list", tmp_path / "empty")
    (tmp_path / "wide").write_text("a.jpg\n", encoding="utf-16")
    with pytest.raises(UserError, match="is no text in UTF-8 with a path on each line"):
        asked(predict, "--list", tmp_path / "wide")


def test_a_scene_is_warned_about(asked: Asked, encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for n, side in enumerate((64, 200, 256, 300)):
        (folder / f"{n}.jpg").write_bytes(encode(n, (side, side + 10)))
    warned = asked(predict, "--input", folder)[2]
    assert "warning: 2 of 4 images are far larger than what the network learnt from" in warned
    assert f"squeezed to 64x64 pixels: {folder / '2.jpg'} has 256x266" in warned


def test_what_a_shell_gives_in_place_of_a_star(asked: Asked, images: Path, tmp_path: Path) -> None:
    (images / "Thumbs.db").write_bytes(b"")
    (images / "@eaDir" / "x.jpg").mkdir(parents=True)
    (images / "@eaDir" / "y.jpg").write_bytes(b"")
    said = asked(predict, "--input", *sorted(images.iterdir()), images / "@eaDir" / "y.jpg", "--skip-bad")[2]
    assert "note: the input: left out files and folders that are no data: 2 @eaDir, 1 Thumbs.db\n" in said


def test_evaluate_of_a_split_tree_says_which(asked: Asked, grow: Grow) -> None:
    counts = {f"RGB/{split}/{label}": 1 for split in ("Train", "Val", "Test") for label in ("Forest", "River")}
    data = grow("data", counts)
    root = data / "RGB"
    with pytest.raises(UserError, match=f"is split: give one of {root}/Test, {root}/Train, {root}/Val"):
        asked(evaluate, "--input", data)
    assert asked(evaluate, "--input", root / "Test")[1].splitlines()[-1].startswith("Test accuracy: ")
    assert asked(evaluate, "--input", root / "Test" / "Forest")[0] == 0  # no classes, no accuracy
