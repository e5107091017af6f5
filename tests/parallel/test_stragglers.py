"""A rank that keeps the others waiting is named."""

from __future__ import annotations

import socket
from pathlib import Path

from hvd_eurosat.training.stragglers import slow_ranks
from tests.parallel.conftest import command, run, small, summary

# Of a rank whose clock goes on by 100 s while it prepares a batch: no other can be that slow by chance.
SLOW = """
import time
import types
from hvd_eurosat.training import stragglers
from hvd_eurosat.training.step import Step
late = 0
def slowly(*arguments):
    global late
    late += 100
    return prepare(*arguments)
prepare, Step._prepare = Step._prepare, slowly
stragglers.time = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
"""
TRAIN = "import runpy\nrunpy.run_module('hvd_eurosat.train', run_name='__main__', alter_sys=True)\n"


def test_slow_ranks() -> None:
    assert slow_ranks([("a", 10.0)]) == []
    assert slow_ranks([("a", 10.0), ("a", 11.0), ("b", 11.9)]) == []
    assert slow_ranks([("a", 10.0), ("a", 11.0), ("b", 15.75)]) == [{"rank": 2, "host": "b", "slower": 0.5}]
    assert slow_ranks([("a", 1.0), ("a", 1.1), ("b", 1.6)]) == []
    assert slow_ranks([("a", 20.0), ("b", 10.0)]) == [{"rank": 0, "host": "a", "slower": 1.0}]


def test_the_slow_rank_is_named(warm: str, data: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path / "run", train__epochs=2)
    job = run([*command("mpirun", 1, "train", *flags, python=warm), ":", "-np", "1", warm, "-c", SLOW + TRAIN, *flags])
    assert job.returncode == 0, job.stderr
    assert f"warning: rank 1 ({socket.gethostname()}) was " in job.stderr
    assert "% slower than the other ranks in epoch 2" in job.stderr
    named = summary(tmp_path / "run")["stragglers"]
    assert [(one["epoch"], one["rank"], one["host"]) for one in named] == [(n, 1, socket.gethostname()) for n in (1, 2)]
