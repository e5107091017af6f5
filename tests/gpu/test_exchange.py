"""Sums over two GPUs, for which the host does not wait: right, though they are read at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import Note

ROOT = Path(__file__).parents[2]
# Each sum is asked for long before its numbers are there, and read as soon as the host has it.
PROGRAM = """
import time
import torch
from hvd_eurosat.cluster import job
from hvd_eurosat.config.schema import Config

def main(world, settings):
    gpu = world.device.type == "cuda"
    values, found, waited = torch.zeros(2**20, device=world.device), [], 0.0
    for number in range(100):
        if gpu:
            torch.cuda._sleep(10**7)
        values.fill_(number + world.rank)
        began = time.perf_counter()
        world.finish_sum(world.start_sum(values, "sum"))
        waited += time.perf_counter() - began
        found.append(values.clone())
    wanted = torch.tensor([2.0 * number + 1 for number in range(100)], device=world.device)
    wrong = int((torch.stack(found) != wanted[:, None]).any(1).sum())
    if world.is_main:
        print(f"wrong: {wrong}")
        print(f"ms: {10 * waited:.3f}")

job.run(lambda _: Config(), main)
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("asynchronous", ["1", "0"])
def test_sums_are_right_without_waiting(asynchronous: str, note: Note) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two GPUs")
    horovodrun = Path(sys.executable).parent / "horovodrun"
    if not horovodrun.exists():
        pytest.skip("it takes Horovod")
    words = [horovodrun, "--gloo", "-np", "2", "-H", "localhost:2", sys.executable, "-c", PROGRAM]
    variables = {**os.environ, "HOROVOD_ENABLE_ASYNC_COMPLETION": asynchronous}
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.rpartition(">:")[2].strip().split(": ") for line in done.stdout.splitlines() if ": " in line)
    note(f"two GPUs, asynchronous {asynchronous}: ms that the host waits for a sum", float(said["ms"]))
    assert said["wrong"] == "0"
