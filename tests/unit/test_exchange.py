"""How Horovod adds up what lies on GPUs: nothing waits but the device, and all that reads a sum is behind it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster import backend, rendezvous
from hvd_eurosat.training import step
from hvd_eurosat.training.capture import WARM_UP, Captured, Graphs
from tests.unit import tape
from tests.unit.test_capture import ALONE

LAUNCHED = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"}
ELASTIC = LAUNCHED | {"HOROVOD_ELASTIC": "1"}
ASYNC, CYCLE = "HOROVOD_ENABLE_ASYNC_COMPLETION", "HOROVOD_CYCLE_TIME"


@pytest.mark.parametrize(
    ("gpus", "variables", "asynchronous", "cycle"),
    [
        (8, LAUNCHED, "1", "0.2"),
        (8, LAUNCHED | {ASYNC: "0", CYCLE: "1"}, "0", "1"),
        (8, {}, None, "1"),  # one process: there is nothing to exchange, and no cycle to hurry for
        (8, ELASTIC, None, None),  # else it would not hear of lost ranks
        (0, LAUNCHED, None, "5"),
        (0, {}, None, "5"),
    ],
)
def test_on_gpus_the_host_waits_for_no_sum(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    variables: dict[str, str],
    asynchronous: str | None,
    cycle: str | None,
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(backend, "visible", lambda: (gpus, ""))
    monkeypatch.setattr(backend, "horovod", lambda: SimpleNamespace(init=lambda: None))
    monkeypatch.setattr(rendezvous, "meet", lambda again: None)
    backend.start()
    assert (os.environ.get(ASYNC), os.environ.get(CYCLE)) == (asynchronous, cycle)


def test_over_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_RANK": "0"})
    on_gpus, on_cores = backend.defaults(True), backend.defaults(False)
    assert (on_gpus[ASYNC], on_gpus[CYCLE]) == ("1", "0.2")
    assert on_cores == backend.DEFAULTS


def test_a_step_lies_between_two_waits_of_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which alone waits for a sum: what runs aside waits for it before and is waited for after; a replay is on it."""
    tape.install(monkeypatch)
    done: list[Any] = []
    current = ["default"]

    class Stream:
        def __init__(self, *_: object) -> None:
            self.name = "aside"

        def wait_stream(self, other: Any) -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        current[0] = stream.name
        yield
        current[0] = "default"

    default = Stream()
    default.name = "default"
    for name, stand_in in {"Stream": Stream, "current_stream": lambda: default, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = tape.Tape.replay
    monkeypatch.setattr(tape.Tape, "replay", lambda graph: done.append(f"replay on {current[0]}") or replay(graph))
    captured = Captured(lambda _: done.append(f"work on {current[0]}"), Graphs(ALONE))
    for _ in range(WARM_UP + 1):
        captured(0)
    aside = ["aside waits for default", "work on aside", "default waits for aside"]
    assert done == [*WARM_UP * aside, "work on default", "replay on default"]  # the one before the last: its capture


def test_a_gpus_host_that_waits_for_a_number_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the watchdog ends the rank first for which the others wait."""
    waits: list[str] = []

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        waits.append("begins")
        yield
        waits.append("ends")

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waits.append("waits"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    findings = step._Findings(1, waiting)
    for number in range(3):
        findings.add(torch.tensor([number, 0.0]))
    assert findings.read() == [[0, 0], [1, 0]]
    assert waits == 2 * ["begins", "waits", "ends"]


def test_the_drivers_library_is_opened_by_the_name_that_it_has() -> None:
    """By the Horovod that is installed: drivers and containers have libcuda.so.1; built without CUDA it opens none."""
    found = find_spec("horovod")
    assert found
    assert found.origin
    (library,) = Path(found.origin).parent.glob("torch/mpi_lib_v2*.so")
    assert b"libcuda.so\0" not in library.read_bytes()
