"""What doctor says of a machine that is slow, or hangs."""

from __future__ import annotations

import os
import threading

import pytest

from hvd_eurosat import doctor
from hvd_eurosat.diagnosis import checks
from hvd_eurosat.diagnosis import facts as diagnosed
from tests.unit.test_devices import facts


def test_libraries_that_are_slow_to_import_are_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosed, "LIBRARIES_SECONDS", 0)
    (finding,) = checks.installation(facts(libraries=diagnosed._libraries()))
    assert finding.what == "Horovod or mpi4py cannot be imported: importing them takes more than 0 s"
    assert finding.cure.startswith("look whether this machine, or the disk that .venv is on, is busy, and try again")


def test_it_gives_up_with_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an allreduce hangs, for instance."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    with doctor.patience(0.0, "rank 0 of 2 waits"):
        assert ended.wait(60)
    assert capsys.readouterr().err == "error: rank 0 of 2 waits\n"
