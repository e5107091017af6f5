"""Errors of Horovod, NCCL and CUDA in their own words, with the cure; and jobs that do not try for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster import device as devices
from hvd_eurosat.cluster import elastic, explanations, job, node
from hvd_eurosat.cluster.explanations import LOST, explain
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.cluster.world import Process, World
from hvd_eurosat.config.schema import Config
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import LandCoverResNet, build
from hvd_eurosat.training.memory import room_for
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from tests.unit.test_devices import OLD
from tests.unit.test_devices import machine as machine

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    "free. Process 4711 has 10.00 GiB memory in use. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


class HorovodInternalError(RuntimeError):
    """As Horovod's, which is known by its name."""


@pytest.mark.parametrize(
    ("words", "last", "cure"),
    [
        (
            "invalid usage",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            "one rank per GPU; MIG",
        ),
        (
            "invalid usage",
            "Multiple Ranks are using the same GPU/Partition. Set X=1",
            "one rank per GPU; MIG instances",
        ),
        ("unhandled system error", "Bootstrap : no socket interface found", explanations.INTERFACE),
        ("unhandled system error", "Connect to 10.0.0.1<4000> failed : Network is unreachable", explanations.INTERFACE),
        ("unhandled system error", "connect to 10.0.0.1<4000> returned Connection refused", explanations.INTERFACE),
        ("unhandled system error", "/dev/shm/nccl-x (size 33), error: No space left on device", "a larger /dev/shm: "),
        ("unhandled cuda error", "Cuda failure 'out of memory'", "smaller batches (train.batch_size, "),
        (
            "unhandled cuda error",
            "Cuda failure 'CUDA driver version is insufficient'",
            "install a driver for this torch",
        ),
        ("remote process exited or there was a network error", "", explanations.MORE),
        ("an error that is new", "", explanations.MORE),
    ],
)
def test_an_error_of_nccl(monkeypatch: pytest.MonkeyPatch, words: str, last: str, cure: str) -> None:
    monkeypatch.setattr(explanations, "last_of_nccl", lambda: last)
    said = explain(HorovodInternalError(f"ncclCommInitRank failed: {words} (run with NCCL_DEBUG=INFO for details)"))
    assert said
    assert said.startswith(f"ncclCommInitRank failed: {words}: {last and last + ': '}{cure}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "Internal error. Could not dlopen libcuda.so.",
            "Internal error. Could not dlopen libcuda.so: the driver's libcuda.so.1 is not found: docker run --gpus "
            "all, or ldconfig with its folder",
        ),
        (
            "Mismatched CPU/GPU device selection: One rank specified device CPU, but another device GPU.",
            "Mismatched CPU/GPU device selection: One rank specified device CPU, but another device GPU: all ranks on "
            "GPUs, or all on cores: --train.device cpu",
        ),
        ("cudaEventRecord failed: a new error", f"cudaEventRecord failed: a new error: {explanations.MORE}"),
        ("Horovod has been shut down. This was caused by an exception on one of the ranks or an attempt to …", LOST),
        (
            "[/tmp/build/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.0.0.2]:41514",
            f"{LOST} (Connection closed by peer [10.0.0.2]:41514)",
        ),
    ],
)
def test_an_error_of_horovod(monkeypatch: pytest.MonkeyPatch, words: str, said: str) -> None:
    monkeypatch.setattr(explanations, "last_of_nccl", lambda: "")
    assert explain(HorovodInternalError(words)) == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            f"{OUT_OF_MEMORY[: OUT_OF_MEMORY.index('. If')]}: smaller batches (train.batch_size, valid.batch_size); "
            "nvidia-smi says who else is on the GPU",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be reported elsewhere"),
            "CUDA error: no kernel image is available: this torch has no code for that GPU: install one for an older "
            "CUDA",
        ),
        (
            RuntimeError(
                "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECCUncorrectable' in x"
            ),
            "CUDA error: uncorrectable ECC error encountered: look for Xid in dmesg; leave that host out",
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),  # its traceback is wanted
        (RuntimeError("size mismatch, out of memory of mine"), None),
        (ValueError("CUDA out of memory"), None),
    ],
)
def test_an_error_of_torch(error: Exception, said: str | None) -> None:
    assert explain(error) == said


def test_the_document_has_them_as_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., None]
) -> None:
    """docs/gpu.md; those of the watchdog, of elastic jobs and of memory are compared by the tests of these."""
    said = []
    for there in (
        {"files": 8, "usable": 0, "reason": OLD, "driver": "535.104.05"},
        {"files": 8, "usable": 0, "chosen": "9"},
        {"files": 8, "usable": 0, "reason": "CUDA unknown error"},
    ):
        machine(**there)
        said.append(str(devices.obstacle()))
    machine(files=1, usable=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(UserError) as raised:
        devices.choose("auto", 0)
    said.append(str(raised.value))
    gpu, instance, cores = (Place("a", frozenset(range(8)), *where) for where in (("G1", "0"), ("G2", "0"), ()))
    for places in ([gpu, gpu], [gpu, instance]):
        with pytest.raises(UserError) as raised:
            node.check(places, 2)
        said.append(str(raised.value))
    said += [str(node.alike([gpu, cores])), *node.warnings([gpu] * 8)]
    for last in ("Bootstrap : no socket interface found", "/dev/shm/nccl-x, error: No space left on device"):
        monkeypatch.setattr(explanations, "last_of_nccl", lambda last=last: last)
        said.append(str(explain(HorovodInternalError("ncclCommInitRank failed: unhandled system error"))))
    monkeypatch.setattr(explanations, "last_of_nccl", lambda: "")
    words = "ncclAllReduce failed: remote process exited or there was a network error"
    said.append(str(explain(HorovodInternalError(words))))

    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    section = " ".join(text.split("## The likeliest errors")[1].split("\n## ")[0].split())
    printed = re.findall(r"\| `([^`]+)` \|", section) + re.findall(r": `([^`]+)`, and the doctor", section)
    patterns = [".*".join(map(re.escape, words.split("…"))) for words in printed]
    unmatched = [
        words
        for words, pattern in zip(printed, patterns, strict=True)
        if not any(re.search(pattern, one) for one in said)
    ]
    assert {words.split("…")[0] for words in unmatched} == {
        "CUDA out of memory. Tried to allocate ",
        "rank 3 of 16 (",
        "the ranks failed 5 times without a commit between: ",
    }
    assert all(any(re.search(pattern, one) for pattern in patterns) for one in said)


def test_nccl_tells_what_its_status_does_not() -> None:
    """The pinned NCCL itself, which needs no GPU to find that there is no such interface."""
    program = """if True:
        import ctypes, torch
        from hvd_eurosat.cluster.explanations import explain
        nccl = ctypes.CDLL("libnccl.so.2")
        nccl.ncclGetErrorString.restype = ctypes.c_char_p
        status = nccl.ncclGetUniqueId(ctypes.create_string_buffer(128))
        HorovodInternalError = type("HorovodInternalError", (RuntimeError,), {})
        words = f"ncclGetUniqueId failed: {nccl.ncclGetErrorString(status).decode()}"
        print(explain(HorovodInternalError(words)))
    """
    environment = {**os.environ, "NCCL_SOCKET_IFNAME": "nope0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "no socket interface found" in done.stdout
    assert "launch/mpirun.sh --interface" in done.stdout


def test_rank_0_speaks_first() -> None:
    """It ends the others within seconds; where it does not see the error, one of them says it."""
    turns = [job._turn(rank) for rank in range(512)]
    assert turns[0] == 0
    assert 2 < turns[1] < turns[2] < max(turns) < 10


class Held:
    """Refers to itself, as a Step does."""

    def __init__(self) -> None:
        self.itself = self


def fail_elastically(monkeypatch: pytest.MonkeyPatch, commits: bool) -> tuple[int, int]:
    """Status and attempts of a job whose ranks cannot come together, or do so after nine losses.

    Each attempt finds all that the one before it had gone.
    """
    horovod = SimpleNamespace(broadcast_object=None, rank=lambda: 0, shutdown=lambda: None, init=lambda: None)
    monkeypatch.setattr(elastic, "horovod", lambda: horovod)
    monkeypatch.setattr("hvd_eurosat.cluster.rendezvous.meet", lambda again: None)
    manager = SimpleNamespace(init=lambda: None, register_listener=lambda _: None, remove_listener=lambda _: None)
    monkeypatch.setattr("horovod.common.elastic.notification_manager", manager)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    attempts: list[weakref.ref[Held]] = []

    def train(process: Process) -> int:
        from horovod.common.exceptions import HorovodInternalError

        assert not any(held() for held in attempts)
        here = Held()
        attempts.append(weakref.ref(here))
        if commits:
            process.committed = object()
        if len(attempts) < 10:
            raise HorovodInternalError("ncclCommInitRank failed: internal error")
        return 0

    return elastic.elastically(train), len(attempts)


def test_an_elastic_job_does_not_try_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        RunError, match=r"failed 5 times without a commit between: ncclCommInitRank failed: internal err"
    ):
        fail_elastically(monkeypatch, commits=False)
    assert capsys.readouterr().err.count("regrouping: ncclCommInitRank failed: internal error: ") == 4


def test_an_elastic_job_that_gets_on_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fail_elastically(monkeypatch, commits=True) == (0, 10)


@pytest.mark.parametrize(("most", "advice"), [(5, "4 fits"), (0, "and so is 1")])
def test_out_of_memory_says_which_batch_fits(monkeypatch: pytest.MonkeyPatch, most: int, advice: str) -> None:
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    model = build("resnet18", 3, "head", seed=0)
    tree: Any = None
    step = Step(TrainingState(world, Config(), tree, model, Precision("fp32")), world, Config(), None)
    forward = LandCoverResNet.forward

    def limited(self: LandCoverResNet, images: torch.Tensor) -> torch.Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return forward(self, images)

    monkeypatch.setattr(LandCoverResNet, "forward", limited)
    with pytest.raises(RunError) as raised, room_for(step, 16):
        model(torch.zeros(16, 3, 64, 64))
    assert str(raised.value) == (
        f"CUDA out of memory. Tried to allocate 2.00 GiB: train.batch_size 16 is too large, {advice}; nvidia-smi says "
        "who else is on the GPU"
    )
