"""Sums over Horovod and NCCL, for which the host does not wait: right, though they are read at once."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hvd_eurosat.cluster.explanations import INTERFACE
from tests.gpu.commands import horovodrun, needs_horovod, python
from tests.gpu.conftest import Note

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
ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", ["1", "0"])
pytestmark = needs_horovod


@pytest.mark.timeout(60)
@ASYNCHRONOUS
def test_one_rank_exchanges_with_itself(asynchronous: str, note: Note) -> None:
    """Its steps as graphs and kernel by kernel have the bits that they have without an exchange."""
    settings = {"HOROVOD_ENABLE_ASYNC_COMPLETION": asynchronous, "HOROVOD_CYCLE_TIME": "0.2"}
    done = python("-m", "tests.gpu.alone", **settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    note(f"one rank, asynchronous {asynchronous}: ms that the host waits for a sum", found["ms"])
    note(f"one rank, asynchronous {asynchronous}: of 50 sums wrong on a stream that does not wait", found["aside"])
    assert found["wrong"] == 0
    assert not found["collectives"]
    assert not found["steps"], "not the bits of steps without an exchange, as graphs (true) or kernel by kernel (false)"
    assert found["fp16"] < 0.05
    assert "no CUDA graph" not in done.stderr


@pytest.mark.timeout(60)
def test_an_error_of_nccl_is_said_in_its_words(note: Note) -> None:
    """Once: here that there is no network of the name which it was given."""
    done = python("-m", "tests.gpu.alone", NCCL_SOCKET_IFNAME="nowhere")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    note("an error of NCCL", said[0] if said else "none")
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert re.match(r"error: nccl\w+ failed: .*no socket interface", said[0])
    assert INTERFACE in said[0]


@pytest.mark.timeout(90)
@ASYNCHRONOUS
def test_two_gpus_add_up(asynchronous: str, note: Note) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two GPUs")
    done = horovodrun(2, "-c", PROGRAM, HOROVOD_ENABLE_ASYNC_COMPLETION=asynchronous)
    assert done.returncode == 0, done.stderr
    said = dict(line.rpartition(">:")[2].strip().split(": ") for line in done.stdout.splitlines() if ": " in line)
    note(f"two GPUs, asynchronous {asynchronous}: ms that the host waits for a sum", float(said["ms"]))
    assert said["wrong"] == "0"
