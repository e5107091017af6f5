"""When the state is kept: by rank 0's clock, by steps, at the end of epochs; and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster.world import Process, World
from hvd_eurosat.config.reading import load
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.run import timer
from hvd_eurosat.run.journal import COMMIT_SECONDS, Journal
from hvd_eurosat.run.timer import Timer
from hvd_eurosat.training import step
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.copies import NotFiniteError
from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.state import TrainingState
from tests.reference.product import Recorder
from tests.unit.test_capture import configuration, same, train

LAG = 2  # of the host behind the device, where there is one


class Clock:
    """In place of time.monotonic."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of all timers."""
    stand_in = Clock()
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=stand_in))
    return stand_in


def test_a_timer_rings_once(clock: Clock) -> None:
    ten, never = Timer(10), Timer(0)
    rings = []
    for clock.now in (9, 10, 11, 19, 20, 45, 46):
        rings.append(ten.rings())
    assert rings == [False, True, False, False, True, True, False]
    clock.now = 54
    ten.start()
    clock.now = 63
    assert not ten.rings()
    assert not never.rings()


@pytest.mark.parametrize("lag", [0, LAG])
def test_all_ranks_keep_the_state_when_one_asks(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the same step, even if they read what they agreed on later; and they train on as if nobody had."""

    class Late(step._Findings):
        def __init__(self, _: int, waiting: Any) -> None:
            super().__init__(lag, waiting)

        def add(self, numbers: torch.Tensor) -> None:
            self._queue.append((numbers.clone(), None))

    monkeypatch.setattr(step, "_Findings", Late)
    config = configuration(train__ema=0.9)
    plain = train(config, ranks=2, images=13)
    asks: Iterator[bool] = iter([False] * 2 + [True] + [False] * 100)  # of one rank: the other has asked nothing
    asked: list[object] = []
    kept: list[tuple[int, int]] = []
    snapshot = TrainingState.snapshot

    def wants(recorder: Recorder) -> bool:
        asked.append(recorder)
        return recorder is asked[0] and next(asks)

    def taken(state: TrainingState) -> Checkpoint | None:
        kept.append((state._world.rank, state.step))
        return snapshot(state)

    monkeypatch.setattr(Recorder, "wants_state", wants)
    monkeypatch.setattr(Recorder, "keep", lambda *_: None, raising=False)
    monkeypatch.setattr(TrainingState, "snapshot", taken)
    same(train(config, ranks=2, images=13), plain)
    assert sorted(kept) == [(rank, at) for rank in (0, 1) for at in (3 + lag, 8)]  # the last is the test's own


@dataclasses.dataclass
class Busy:
    """A Saver that still writes the checkpoint before."""

    saved: list[int] = dataclasses.field(default_factory=list)  # steps
    is_busy: bool = True

    def wait(self, *_: object) -> None:
        self.is_busy = False

    def save(self, state: Checkpoint) -> None:
        self.saved.append(state.step)

    def close(self) -> None: ...


def state_at(step: int, samples: int = 0) -> Checkpoint:
    """After epoch 1 and so many samples."""
    empty = torch.zeros(1)
    return Checkpoint({}, [], {}, empty, empty, 1, samples, step, {}, [], "", "fp32")


Begin = Callable[..., tuple[Journal, Busy]]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """A journal after epoch 1, whose accuracy was 0.5, with its saver."""
    monkeypatch.setattr(Tree, "files", lambda *_: [])
    begun = []

    def one(*words: str, process: Process | None = None, device: str = "cpu") -> tuple[Journal, Busy]:
        config = load(["--run.dir", str(tmp_path / "run"), "--train.epochs", "3", "--run.page", "false", *words])
        tree = Tree(tmp_path, ("a", "b"), "d", synthetic=False, image_size=64, checksums=Checksums.of({}))
        journal = Journal(World(0, 1, 0, 1, torch.device(device), 1, process or Process()), config, tree)
        history = [{"event": kind, "epoch": 1, "step": 1, "accuracy": 0.5} for kind in ("train", "valid")]
        start = dataclasses.replace(state_at(1), history=history)
        journal.begin(start, {}, start)
        begun.append(journal)
        saver: Any = Busy()
        journal._saver = saver
        journal.begin_epoch(2, 1)
        return journal, saver

    yield one
    for journal in begun:
        journal.close()


@pytest.mark.parametrize(
    ("device", "words", "epoch", "correct", "saved"),
    [
        ("cpu", (), 2, 1, [5]),
        ("cuda", (), 2, 1, []),
        ("cuda", (), 2, 2, [5]),  # the best
        ("cuda", (), 3, 1, [5]),  # the last
        ("cuda", ("--run.numbered_checkpoints", "HERE"), 2, 1, [5]),
        ("cuda", ("--run.numbered_checkpoints", "HERE", "--run.checkpoint_interval", "3"), 2, 1, []),
    ],
)
def test_an_epochs_checkpoint_is_left_out_while_another_is_written(
    begin: Begin, tmp_path: Path, device: str, words: tuple[str, ...], epoch: int, correct: int, saved: list[int]
) -> None:
    """On GPUs, unless it is needed: then the ranks wait, as on cores."""
    journal, saver = begin(*(str(tmp_path) if word == "HERE" else word for word in words), device=device)
    journal.trained(4, [])
    confusion = torch.tensor([[correct, 2 - correct], [1, 0]])
    sums = Sums(World(0, 1, 0, 1, torch.device("cpu"), 1))
    journal.validated(epoch, 5, 0.1, sums, Evaluation(0.1, confusion, torch.ones(3, 15)))
    journal.save(dataclasses.replace(state_at(5), epoch=epoch))
    assert saver.saved == saved
    if not words:
        assert journal._files is not None
        assert journal._files.history()[-1]["event"] == "checkpoint"  # the history does not depend on the disk


def test_a_checkpoint_within_an_epoch_by_the_clock_and_by_steps(begin: Begin, clock: Clock) -> None:
    journal, saver = begin("--run.checkpoint_seconds", "60", "--run.checkpoint_steps", "4")
    saver.is_busy = False
    clock.now = 59
    assert not journal.wants_state()
    journal.keep(state_at(4, samples=1))
    clock.now = 118  # since then the last checkpoint is not old enough
    assert not journal.wants_state()
    clock.now = 119
    assert [journal.wants_state(), journal.wants_state()] == [True, False]
    journal.keep(state_at(5, samples=2))
    saver.is_busy = True
    journal.keep(state_at(8, samples=3))
    saver.is_busy = False
    journal.keep(state_at(9, samples=4))
    assert saver.saved == [4, 5]
    assert not journal._save_is_due


def test_an_elastic_job_commits_by_the_clock(begin: Begin, clock: Clock) -> None:
    """Without a checkpoint on the disk."""
    process = Process()
    process.members = SimpleNamespace(check_host_updates=lambda: None)
    journal, saver = begin("--run.checkpoint_seconds", "0", process=process)
    clock.now = COMMIT_SECONDS
    assert [journal.wants_state(), journal.wants_state()] == [True, False]
    journal.keep(state_at(7, samples=1))
    assert process.committed.step == 7
    assert [event["event"] for event in process.committed.history][:2] == ["train", "valid"]
    assert saver.saved == []


def test_a_checkpoint_that_the_clock_asked_for_comes_when_it_can(begin: Begin, clock: Clock) -> None:
    """One that was left out stays due; one that came meanwhile will do."""
    journal, saver = begin("--run.checkpoint_seconds", "60")
    clock.now = 60
    assert journal.wants_state()
    journal.keep(state_at(4, samples=1))
    saver.is_busy = False
    journal.keep(state_at(5, samples=2))
    clock.now = 120
    assert journal.wants_state()
    journal.save(dataclasses.replace(state_at(6), epoch=2))
    journal.keep(state_at(7, samples=1))
    assert saver.saved == [5, 6]


def test_a_state_that_nobody_writes_is_looked_at(begin: Begin) -> None:
    """From a GPU it is not known to be finite before it is there."""
    journal, _ = begin(device="cuda")
    arrival = SimpleNamespace(event=SimpleNamespace(synchronize=lambda: None), numbers=torch.zeros(2))
    with pytest.raises(NotFiniteError):
        journal.save(dataclasses.replace(state_at(4, samples=1), arrival=arrival))
