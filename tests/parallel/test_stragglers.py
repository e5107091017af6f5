"""A rank that keeps the others waiting is named."""

from __future__ import annotations

import socket
from pathlib import Path

from hvd_eurosat.training.stragglers import slow_ranks
from tests.parallel.conftest import command, run, small, summary

SLOW = """
import time
from hvd_eurosat.training.step import Step
prepare = Step._prepare
Step._prepare = lambda *arguments: time.sleep(0.5) or prepare(*arguments)
"""


def test_slow_ranks() -> None:
    assert slow_ranks([("a", 10.0)]) == []
    assert slow_ranks([("a", 10.0), ("a", 11.0), ("b", 11.9)]) == []
    assert slow_ranks([("a", 10.0), ("a", 11.0), ("b", 15.75)]) == [{"rank": 2, "host": "b", "slower": 0.5}]
    assert slow_ranks([("a", 1.0), ("a", 1.1), ("b", 1.6)]) == []
    assert slow_ranks([("a", 20.0), ("b", 10.0)]) == [{"rank": 0, "host": "a", "slower": 1.0}]


def test_the_slow_rank_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    flags = small(data, tmp_path / "run", train__epochs=2)
    one, slow = command("mpirun", 1, "train", *flags), command("python", 1, "train", *flags)
    job = run([*one, ":", "-np", "1", "env", f"PYTHONPATH={tmp_path}", *slow])
    assert job.returncode == 0, job.stderr
    assert f"warning: rank 1 ({socket.gethostname()}) was " in job.stderr
    assert "% slower than the other ranks in epoch 2" in job.stderr
    named = summary(tmp_path / "run")["stragglers"]
    assert [(one["epoch"], one["rank"], one["host"]) for one in named] == [(n, 1, socket.gethostname()) for n in (1, 2)]
