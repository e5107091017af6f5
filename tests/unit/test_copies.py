"""A snapshot is the state at its step, whenever it comes. No GPU is at hand: a stand-in lets copies come late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hvd_eurosat.run.saver import Saver
from hvd_eurosat.training import copies
from hvd_eurosat.training.checkpoint import Checkpoint, holds
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.copies import NotFiniteError, copied, whole
from hvd_eurosat.training.state import TrainingState
from tests.unit.conftest import averaging

PATIENCE = 60.0  # seconds


class Device:
    """In place of a GPU: what is sent comes when it is through, which is when somebody may see it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.through = threading.Event()
        self.sent: list[tuple[Tensor, Tensor]] = []
        self.waits: list[str] = []  # names of threads
        patch.setattr(copies, "_is_far", lambda _: True)
        patch.setattr(copies, "send", self.send)
        patch.setattr(torch.cuda, "Event", lambda: self)

    def send(self, tensor: Tensor) -> Tensor:
        """Nothing yet."""
        self.sent.append((tensor, torch.zeros_like(tensor)))
        return self.sent[-1][1]

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """As of an event."""
        self.waits.append(threading.current_thread().name)
        assert self.through.wait(PATIENCE)
        for source, target in self.sent:
            target.copy_(source)


@pytest.fixture
def state(tmp_path: Path) -> TrainingState:
    """Of a head that trains, and its average."""
    return averaging(tmp_path, "bn+head")


def train(state: TrainingState) -> None:
    """A step that changes all that does."""
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    state.optimiser.step()
    state.statistics.flat.add_(1)
    state.sums.total.add_(1)
    assert state.average is not None
    state.average.update(torch.tensor(False))
    state.step, state.samples = state.step + 1, state.samples + 1


def snapshot(state: TrainingState) -> Checkpoint:
    saved = state.snapshot()
    assert saved is not None
    return saved


def test_what_is_saved_is_the_state_at_that_step(
    state: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a few pieces, for which only the thread that writes them waits."""
    train(state)
    wanted = snapshot(state)
    device = Device(monkeypatch)
    saved = snapshot(state)
    kinds = ["float32 of weights beside their average", "float32", "int64", "float64", "whether they are finite"]
    assert len(device.sent) == len(kinds)
    saver = Saver(CheckpointFolder(tmp_path, keep=1), stop_at_once=True, report=print)
    saver.save(saved)
    train(state)
    assert saver.is_busy
    device.through.set()
    saver.wait()
    assert len(device.waits) == 1
    assert device.waits != [threading.main_thread().name]
    monkeypatch.undo()
    assert holds(tmp_path / f"{wanted.name}.pt", wanted)
    assert not torch.equal(snapshot(state).model["fc.weight"], wanted.model["fc.weight"])


def test_each_tensor_has_memory_of_its_own(state: TrainingState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an elastic job would send a whole piece with each of them. What does not train is not copied again."""
    train(state)
    device = Device(monkeypatch)
    device.through.set()
    first, second = whole(snapshot(state)), whole(snapshot(state))
    tensors = [leaf for leaf in tree_leaves(vars(first)) if isinstance(leaf, Tensor)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert first.arrival is None
    for name in first.model:
        assert (first.model[name].data_ptr() == second.model[name].data_ptr()) == (name in first.frozen)


@pytest.mark.parametrize("where", ["weights", "average"])
def test_weights_that_are_not_finite_end_the_run(
    state: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """At once where the host sees them, or else with the next save; nothing is written."""
    train(state)
    assert state.average is not None
    weights = {"weights": state.model.fc.weight.detach(), "average": state.average.weights["fc.weight"]}
    weights[where][0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"not finite any more: try a lower optim\.lr"):
        state.snapshot()
    Device(monkeypatch).through.set()
    saver = Saver(CheckpointFolder(tmp_path, keep=1), stop_at_once=False, report=print)
    saver.save(snapshot(state))
    with pytest.raises(NotFiniteError):
        saver.wait()
    assert not list(tmp_path.glob("epoch-*"))


@pytest.mark.parametrize(("piece", "pieces"), [(copies.PIECE, 3), (600, 4)])
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.to(memory_format=torch.channels_last), lambda t: t[1:]])
def test_copies_are_as_they_were(
    form: Callable[[Tensor], Tensor], piece: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, shapes and memory formats, in the same nest, in pieces for which a GPU has room."""
    monkeypatch.setattr(copies, "PIECE", piece)
    one = form(torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5))
    value: dict[Any, Any] = {3: [one, torch.tensor(7), torch.ones(99)], "x": {"y": 0.5, "z": (1, 2)}, "n": one.double()}
    device = Device(monkeypatch)
    found = copied(value)
    device.through.set()
    device.synchronize()
    assert len(device.sent) == pieces
    assert found.keys() == value.keys()
    assert (found["x"], found[3][1]) == (value["x"], 7)
    for mine, theirs in ((found[3][0], one), (found["n"], one.double())):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
