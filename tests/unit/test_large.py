"""What a million files need: links, processes, names without objects, rows read ahead; the bytes stay the same."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from hvd_eurosat.benchmarks import data as benchmark_data
from hvd_eurosat.data import copying
from hvd_eurosat.data.ahead import BATCHES, Reader, ahead
from hvd_eurosat.data.batches import Batch, Images, TrainBatches, ordered_batches
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.mixing import partners
from hvd_eurosat.data.names import Checksums, Names
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.processes import CHUNK, FEW, in_processes
from hvd_eurosat.errors import RunError
from hvd_eurosat.prepare import main
from tests.unit.conftest import Encode, Grow, Run, left, zipped

FILES = 20_000


# --- links


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.jpg")}


def test_links_are_the_source_s_own_files(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", {"A": 5, "B": 4})
    assert run(source, out="copied")[0] == 0
    status, _, said = run(source, "--link", out="linked")
    assert (status, said) == (0, f"note: the folder has 9 hard links to images of {source}\n")
    here, there = files(tmp_path / "linked"), files(source)
    assert all(path.samefile(there[name]) and not path.is_symlink() for name, path in here.items())
    for name in ("files.sha256", "manifest.json"):
        assert (tmp_path / "linked" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()


def test_a_link_to_a_link_is_one_to_the_file(tmp_path: Path, grow: Grow, run: Run) -> None:
    source = grow("photos", {"A": 3, "B": 3})
    (source / "A" / "A_1.jpg").rename(tmp_path / "elsewhere")
    (source / "A" / "A_1.jpg").symlink_to(tmp_path / "elsewhere")
    assert run(source, "--link")[0] == 0
    found = files(tmp_path / "out")["A_1.jpg"]
    assert (found.is_symlink(), found.samefile(tmp_path / "elsewhere")) == (False, True)


def test_files_of_another_file_system_are_linked_to_by_name(
    tmp_path: Path, grow: Grow, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grow("photos", {"A": 3, "B": 3})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    status, _, said = run(os.path.relpath(source), "--link")
    assert status == 0
    assert "the folder has 6 symbolic links to images of" in said
    assert all(path.readlink() == source / path.parent.name / name for name, path in files(tmp_path / "out").items())
    assert main(["--verify", str(tmp_path / "out")]) == 0


def test_what_is_changed_is_no_link(tmp_path: Path, grow: Grow, encode: Encode, run: Run) -> None:
    source = grow("photos", {"A": 3, "B": 3})
    (source / "A" / "large.jpg").write_bytes(encode(1, (80, 80)))
    status, _, said = run(source, "--link", "--resize")
    assert (status, "6 hard links" in said, "and 1 written anew" in said) == (0, True, True)
    assert (source / "A" / "large.jpg").stat().st_nlink == 1


def test_an_archive_has_nothing_to_link_to(tmp_path: Path, grow: Grow, run: Run) -> None:
    archive = zipped(tmp_path / "photos.zip", grow("photos", {"A": 3, "B": 3}))
    for source in (archive, "sample", "download"):
        status, _, said = run(source, "--link")
        assert (status, left(tmp_path)) == (2, [])
        assert said == f"error: --link is for folders, whose files stay: the images of {source} must be copied\n"


# --- processes


@pytest.fixture
def many(tmp_path: Path, encode: Encode) -> Path:
    """More images than one process works on, by a number behind the same picture; some have copies."""
    picture = encode(1)
    for number in range(FEW + CHUNK):
        path = tmp_path / "many" / "ABC"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture + bytes([number % 3, number % 100]))
    return tmp_path / "many"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("archived", [False, True])
def test_several_processes_make_the_same(tmp_path: Path, many: Path, run: Run, archived: bool) -> None:
    source = zipped(tmp_path / "many.zip", many) if archived else many
    for jobs in (1, 3):
        assert run(source, "--jobs", jobs, out=f"out{jobs}")[0] == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert main(["--verify", str(tmp_path / "out3"), "--jobs", "2"]) == 0


def test_several_processes_name_the_same_bad_files(many: Path, run: Run) -> None:
    for number in (5, 200, 300):
        next(many.rglob(f"{number}.jpg")).write_bytes(b"")
    said = [run(many, "--jobs", jobs)[2] for jobs in (1, 2)]
    assert said[0] == said[1]
    assert "3 of 320 files" in said[0]


def test_a_process_that_dies_is_one_line(tmp_path: Path, many: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_checked", lambda *_: os._exit(9))
    status, _, said = run(many, "--jobs", 2)
    assert (status, left(tmp_path)) == (1, [])
    assert said == "error: a process that was checking images died (out of memory?): give fewer --jobs\n"


def test_what_a_process_raises_is_raised_here() -> None:
    def work(numbers: range) -> None:
        if FEW in numbers:
            raise RunError(f"not {FEW}")

    with pytest.raises(RunError, match=f"not {FEW}"):
        list(in_processes(work, 2 * FEW, "working", 2))


@pytest.mark.parametrize(("count", "jobs"), [(0, 4), (7, 4), (FEW + 1, 4), (3 * FEW + 5, 1), (3 * FEW + 5, 2)])
def test_each_item_is_worked_on_once(count: int, jobs: int) -> None:
    done = list(in_processes(lambda numbers: [n * n for n in numbers], count, "squaring", jobs))
    assert sorted(n for numbers, _ in done for n in numbers) == list(range(count))
    assert all(squares == [n * n for n in numbers] for numbers, squares in done)


# --- names


def test_names_are_those_that_were_given() -> None:
    strings = ["", "Bäche/1.jpg", "a", "\udcff"]
    names = Names.of(strings)
    assert names == strings
    assert (names[1:3] == strings[1:3], names[-1], list(names)) == (True, "\udcff", strings)
    assert names.in_order(np.array([2, 0])) == ["a", ""]
    assert Names.of([]) == []


def test_checksums_are_found_by_name_in_the_order_of_folders() -> None:
    """A hyphen sorts before the slash, and so `A-b` before `A` in files.sha256."""
    paths = sorted(f"{split}/{label}/{n}.jpg" for split in SPLITS for label in ("A", "A-b", "é") for n in (1, 10, 2))
    sums = {path: hashlib.sha256(path.encode()).hexdigest() for path in paths}
    text = "".join(f"{checksum}  {path}\n" for path, checksum in sums.items()).encode()
    found = Checksums.of_lines(text).sorted()
    assert list(found) == sorted(paths, key=lambda path: path.split("/"))
    assert dict(found) == sums
    assert found.names[found.part("train")] == [path for path in found if path.startswith("train/")]
    assert "train/A/3.jpg" not in found
    assert found.respelt(str.upper)["TRAIN/A/2.JPG"] == sums["train/A/2.jpg"]
    backwards = "".join(text.decode().splitlines(True)[::-1]).encode()
    assert list(Checksums.of_lines(backwards).sorted()) == list(found)


def test_a_file_takes_few_bytes() -> None:
    """Its line of files.sha256, and two places in that."""
    lines = "".join(f"{n:064x}  train/AnnualCrop/AnnualCrop_{n:07}.jpg\n" for n in range(FILES))
    tracemalloc.start()
    text = lines.encode()
    kept = Checksums.of_lines(text).sorted()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == FILES
    assert size < 180 * FILES
    assert peak < 250 * FILES


# --- order, and reading ahead


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_order_is_that_of_distributed_sampler(epoch: int) -> None:
    images = pictures(np.zeros((50, 2, 2, 3), np.uint8))
    batches = TrainBatches(images, 10, 0, 1, seed=7)
    sampler: DistributedSampler[Any] = DistributedSampler(range(50), 1, 0, seed=batches._order_seed)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    assert [n for batch in batches.epoch(epoch) for n in batch.indices.tolist()] == list(sampler)


def pictures(pixels: np.ndarray) -> Images:
    return Images(Packed(pixels, np.zeros(len(pixels), np.int64), ()), torch.device("cpu"))


class Asked:
    """A reader that notes what was wanted."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def want(self, rows: Sequence[int]) -> None:
        self.rows += rows


@pytest.mark.parametrize("mixes", [False, True])
def test_each_batch_is_wanted_before_its_turn(mixes: bool) -> None:
    images = pictures(np.zeros((200, 2, 2, 3), np.uint8))
    images.reader = asked = Asked()  # type: ignore[assignment]
    batches = TrainBatches(images, 5, 1, 2, seed=1, mixes=mixes)
    for number, batch in enumerate(batches.epoch(2, samples=20)):
        assert isinstance(batch, Batch)
        rows = [*batch.indices.tolist()]
        rows += partners(1, batch.indices, 2, 200).tolist() if mixes else []
        assert number == 0 or set(rows) <= set(asked.rows)
        assert len(asked.rows) == min(BATCHES - 1 + number, 17) * len(rows)
    asked.rows.clear()
    assert len(list(ordered_batches(images, 60))) == 4
    assert asked.rows == list(range(60, 200))


def test_every_item_is_wanted_once() -> None:
    wanted: list[int] = []
    assert list(ahead(range(30), wanted.append)) == list(range(30))
    assert wanted == list(range(1, 30))
    assert list(ahead(range(3), None)) == [0, 1, 2]


def test_rows_are_asked_for_by_their_places_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((20, 4, 4, 3), np.uint8))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length)))
    reader = Reader(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    reader.want([9, 3, 8, 17, 3])
    reader._thread.shutdown()
    assert asked == [(128 + 48 * 3, 48), (128 + 48 * 8, 96), (128 + 48 * 17, 48)]


# --- what is measured


def test_rates_of_the_data_s_way() -> None:
    def job(wait: float) -> list[dict[str, Any]]:
        parts = {"step": [0.5, 0.5], "communication": [0.0, 0.0], "optimiser": [0.0, 0.0]}
        beside = {"none": parts | {"data": [0.0, 0.0]}, "disk": parts | {"data": [wait, wait]}}
        found = {"alone": {"disk": [0.1, 0.3]}, "beside": beside, "cached": {"disk": 0.01}, "images": 64.0}
        return [{"reading": found, "images_file": 3.0}]

    found = benchmark_data.compare([job(0.5), job(0.125), job(0.125)])
    assert found["alone"]["disk"]["median"] == 320
    assert found["beside"]["none"]["median"] == 128
    assert (found["beside"]["disk"]["kept"], found["beside"]["disk"]["wait"]) == (0.8, 0.125)
    assert found["cached"] == {"disk": 0.01}
