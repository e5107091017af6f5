"""One job at a time in a run directory, on a file system with locks and on one without."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd_eurosat.config.reading import load
from hvd_eurosat.errors import UserError
from hvd_eurosat.prepare import main
from hvd_eurosat.run.directory import RunDirectory
from hvd_eurosat.training import lock
from hvd_eurosat.training.lock import HELD, STALE_SECONDS, FolderLock
from tests.unit.conftest import Grow


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre mounted without flock, some FUSE, and NFS whose lock service does not answer."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)


class Clock:
    """Seconds that pass while somebody waits; `meanwhile` happens in each wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None
        here = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        for module in ("hvd_eurosat.training.lock", "hvd_eurosat.run.directory"):
            monkeypatch.setattr(f"{module}.time", here)

    def sleep(self, seconds: float) -> None:
        """They have passed."""
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def opened(folder: Path, said: list[str]) -> RunDirectory:
    return RunDirectory(load(["--run.dir", str(folder)]), said.append, 0.0, lambda: None)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_it_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    directory = opened(tmp_path, said)
    (text,) = said
    assert text.startswith(f"{tmp_path} is on a file system without locks (")
    assert (tmp_path / HELD).read_text().startswith(f"process {os.getpid()} on ")
    directory.close()
    assert not (tmp_path / HELD).exists()
    opened(tmp_path, []).close()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_living_job_keeps_its_directory(tmp_path: Path, clock: Clock) -> None:
    beats = iter(range(1, 10**6))
    clock.meanwhile = lambda: (tmp_path / HELD).write_text(f"process 7 on b, its mark, {next(beats)}\n")
    clock.meanwhile()
    with pytest.raises(UserError, match=r"in use by another job \(process 7 on b\): wait, or give another"):
        opened(tmp_path, [])
    assert clock.now >= STALE_SECONDS, "it was looked at for so long"
    assert (tmp_path / HELD).read_text().startswith("process 7 on b")


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_dead_jobs_directory_is_taken(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / HELD).write_text("process 7 on b, its mark, 3\n")
    directory = opened(tmp_path, [])
    assert STALE_SECONDS <= clock.now < STALE_SECONDS + 5
    assert (tmp_path / HELD).read_text().startswith(f"process {os.getpid()} on ")
    directory.close()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_of_two_that_waited_has_it(tmp_path: Path, clock: Clock) -> None:
    """The other removed this one's file for the dead one's."""
    (tmp_path / HELD).write_text("process 7 on b, its mark, 3\n")
    waiting = FolderLock(tmp_path, lambda _: None)
    assert not waiting.try_take()
    clock.now += STALE_SECONDS
    clock.meanwhile = lambda: (tmp_path / HELD).write_text("process 8 on c, its mark, 0\n")
    assert not waiting.try_take()
    waiting.close()
    assert (tmp_path / HELD).read_text().startswith("process 8 on c")


@pytest.mark.usefixtures("no_locks")
def test_a_job_without_locks_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    folder = tmp_path / "run"
    folder.mkdir()
    held = FolderLock(folder, lambda _: None)
    assert held.try_take()
    first = (folder / HELD).read_text()
    while (folder / HELD).read_text() == first:
        pass
    folder.rename(tmp_path / "run.1")  # which another run sets aside
    held.close()
    assert not (tmp_path / "run.1" / HELD).exists()


def test_another_error_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=f"run.dir {tmp_path}: Input/output error"):
        opened(tmp_path, [])


@pytest.mark.usefixtures("no_locks")
def test_prepare_without_locks_removes_nothing_of_another(
    tmp_path: Path, grow: Grow, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / ".data.partial-0123abcd"
    other.mkdir()
    source = grow("source", {"Forest": 3, "River": 3})
    assert main(["--source", str(source), "--out", str(tmp_path / "data")]) == 0
    assert other.exists()
    assert f"warning: {other} stays: remove it if no other prepare is writing it" in capsys.readouterr().err
