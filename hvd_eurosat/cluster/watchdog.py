"""A companion process for every rank, which ends it when it makes no progress.

A thread of the rank could not: a stopped process, or one whose native code holds the GIL, silences its own threads.
The rank notes its progress in shared memory; the companion, which runs this file, looks at it twice a second. Python
passes signals on to it at once (signal.set_wakeup_fd), even while the rank is blocked in native code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

LOOK_SECONDS = 0.5
WAITING_GRACE = 3.0  # the rank that others wait for is ended, and so named, before them
ENDING_GRACE = 3.0  # after SIGTERM: the rank that this one waits for may be gone
SIGNAL_GRACE = 1.0  # launchers pass the same signal on twice
STACKS = signal.SIGQUIT


PATH_ROOM = 400
BEAT = struct.Struct(f"dd?100s200s{PATH_ROOM}s")


class Beat(NamedTuple):
    """What a rank notes: when (time.monotonic), the limit (s; 0: none), whether it waits, its name and phase.

    words: the file for the reason of its end; "" for none.
    """

    time: float
    limit: float
    waits: bool
    name: bytes
    phase: bytes
    words: bytes


class Watchdog:
    """The rank's side. Nothing is watched before `start`."""

    def __init__(self) -> None:
        self._patient = False
        self._memory: mmap.mmap | None = None
        self._limit, self._name = 0.0, ""
        self._phase, self._patience, self._words = "starting", 1.0, b""

    def last_words(self, path: str) -> None:
        """Where to leave, as JSON, why this process was ended, unless another has left its own words there before."""
        words = os.fsencode(os.path.abspath(path))
        self._words = words if len(words) <= PATH_ROOM else b""
        self.beat()

    def start(self, seconds: float, name: str, launched: bool, patient: bool) -> None:
        """Watch this process: end it after `seconds` without a beat, or when its launcher dies (if it has one).

        patient: not while it waits for others, because it will hear that they are gone (elastic jobs on CPUs).
        Called again, it gives this process another name.
        """
        self._limit, self._name, self._patient = seconds, name, patient
        if self._memory:
            return
        file = os.memfd_create("beats")
        os.ftruncate(file, BEAT.size)
        self._memory = mmap.mmap(file, BEAT.size)
        faulthandler.register(STACKS, all_threads=True)
        program = [sys.executable, "-I", "-S", __file__]
        arguments = [file, os.getpid(), os.getppid() if launched else 0]
        companion = subprocess.Popen(
            [*program, *map(str, arguments)], stdin=subprocess.PIPE, pass_fds=[file], start_new_session=True
        )
        os.close(file)
        self._companion = companion
        if companion.stdin:  # its end tells the companion that this process is gone
            os.set_blocking(companion.stdin.fileno(), False)
            signal.set_wakeup_fd(companion.stdin.fileno(), warn_on_full_buffer=False)
        self.beat()

    def beat(self, phase: str | None = None, patience: float = 1.0, waits: bool = False) -> None:
        """Progress was made; from here on this process is in `phase`, which may take `patience` times the limit."""
        if phase:
            self._phase, self._patience = phase, patience
        self._note(self._limit * self._patience, waits)

    def rest(self) -> None:
        """Nothing is expected until the next beat."""
        self._note(0.0, waits=False)

    def _note(self, limit: float, waits: bool) -> None:
        if self._memory:
            beat = Beat(time.monotonic(), limit, waits, self._name.encode(), self._phase.encode(), self._words)
            self._memory[: BEAT.size] = BEAT.pack(*beat)  # pack_into clears it first, which the companion may see

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this process waits for the other ranks."""
        if self._patient:
            self.rest()
        else:
            self.beat(waits=True)
        yield
        self.beat()


def _watch(memory: mmap.mmap, rank: int, launcher: int) -> None:
    """The companion's side: returns when the rank has ended."""
    signals: list[tuple[float, int]] = []
    while True:
        ready, _, _ = select.select([0], [], [], LOOK_SECONDS)
        if ready:
            received = os.read(0, 64)
            if not received:
                return
            signals += [(time.monotonic(), number) for number in received if number in (signal.SIGTERM, signal.SIGUSR1)]
        beat = Beat(*BEAT.unpack_from(memory))
        parent = _parent(rank)
        if parent is None:
            return
        orphaned = launcher not in (0, parent)
        reason = "lost its launcher" if orphaned else _reason(beat, signals)
        if reason is not None:
            _end(rank, f"error: {_text(beat.name)} {reason}" if reason else "", stacks="threads" in reason)
            if reason:  # only now, for a disk that hangs must not keep the rank alive
                _leave_words(beat.words.rstrip(bytes(1)), f"{_text(beat.name)} {reason.partition(';')[0]}")
            return


def _reason(beat: Beat, signals: list[tuple[float, int]]) -> str | None:
    """Why the rank must be ended, if it must; "" where others have said why."""
    idle = time.monotonic() - beat.time
    if signals and signals[-1][0] - signals[0][0] > SIGNAL_GRACE:
        return "was told twice to stop"
    told = next((when for when, number in signals if number == signal.SIGTERM), math.inf)
    if beat.waits and time.monotonic() - max(beat.time, told) > ENDING_GRACE:
        return ""
    if beat.limit and idle > beat.limit + (WAITING_GRACE if beat.waits else 0):
        did = "waited for the other ranks" if beat.waits else "made no progress"
        return f"{did} for {int(idle)} s in {_text(beat.phase)}; its threads:"
    return None


def _text(padded: bytes) -> str:
    return padded.rstrip(bytes(1)).decode(errors="replace")


def _leave_words(path: bytes, reason: str) -> None:
    with contextlib.suppress(OSError):  # there already, or no disk to write on
        if path:
            with open(path, "x") as file:
                json.dump({"error": reason, "time": time.time()}, file)


def _end(rank: int, message: str, stacks: bool) -> None:
    if message:
        with contextlib.suppress(OSError):  # the launcher that would read it may be gone
            os.write(2, f"{message}\n".encode())
    with contextlib.suppress(ProcessLookupError):
        if stacks:
            os.kill(rank, STACKS)
            os.kill(rank, signal.SIGCONT)  # a stopped process shows its stacks too
            time.sleep(1)
        os.kill(rank, signal.SIGKILL)


def _parent(process: int) -> int | None:
    """None: it has ended."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


if __name__ == "__main__":
    _file, _rank, _launcher = map(int, sys.argv[1:4])
    _watch(mmap.mmap(_file, BEAT.size), _rank, _launcher)
