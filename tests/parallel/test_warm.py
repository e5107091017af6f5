"""A warm Python's processes are as any Python's, to whoever starts them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.conftest import wait_for

SEEN = """
import json, os, resource, sys
print(json.dumps([
    sys.argv, os.getcwd(), dict(os.environ), sorted(os.sched_getaffinity(0)), resource.getrlimit(resource.RLIMIT_FSIZE),
    sys.stdin.read(), sys.path[1], sys.executable,
]))
"""
WAIT = """
import os, sys, time
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def test_it_sees_what_a_python_sees(warm: str, tmp_path: Path) -> None:
    def start(python: str) -> list[Any]:
        words = ["sh", "-c", 'ulimit -f 4000; exec "$@"', "-", python, "-c", SEEN, "a b", ""]
        environment = {"PATH": "/bin", "EMPTY": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": "/elsewhere"}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, input="words", capture_output=True, text=True, check=True
        )
        return list(json.loads(done.stdout))

    found, expected = start(warm), start(sys.executable)
    assert found[2].pop("LAUNCHER") == str(os.getpid())  # all that it sees beside
    assert (found.pop(), expected.pop()) == (warm, sys.executable)
    assert found == expected
    assert found[0] == ["-c", "a b", ""]
    assert found[4] != list(resource.getrlimit(resource.RLIMIT_FSIZE))


@pytest.mark.parametrize(
    ("program", "status", "error"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(75)", 75, ""),
        ("import sys; sys.exit('no')", 1, "no"),
        ("import atexit, os; atexit.register(os.write, 2, b'late')", 0, "late"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import torch; torch.leak = 1", 0, ""),
        ("import torch; torch.leak", 1, "AttributeError: module 'torch' has no attribute 'leak'"),
    ],
)
def test_it_ends_as_a_python_ends(warm: str, program: str, status: int, error: str) -> None:
    done = subprocess.run([warm, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert (done.stderr.splitlines() or [""])[-1] == error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_it_ends_when_it_is_told_to(warm: str, tmp_path: Path, number: signal.Signals) -> None:
    note = tmp_path / "process"
    with subprocess.Popen([warm, "-c", WAIT, note]) as process:
        wait_for(note.exists)
        process.send_signal(number)
    assert process.returncode == -number
    wait_for(lambda: not Path("/proc", note.read_text()).exists())
