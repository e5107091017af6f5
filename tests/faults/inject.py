"""Training runs with faults in them, one after another in one job: FAULTS, and train's own arguments.

FAULTS is JSON: of each run's directory "rank call_number function action", or "". The fault happens on `rank` just
before the call_number-th call of `function` (module:qualified.name). It is a real one: the process stops, dies, sleeps,
sends itself or its launcher a signal, or its numbers go wrong. When it happened is in <run directory>.fault, and the
samples of each step, a line for each rank, in <run directory>.samples.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.watchdog import ENDING_GRACE
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.train import train
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.step import Step
from tests.parallel.warm import make_small
from tests.waiting import now

HOURS = 10_000
SLOW = "tc qdisc add dev eth0 root tbf rate 1mbit burst 32kbit latency 400ms"


def send(process: int, number: signal.Signals) -> None:
    """A signal, which takes a moment to go through a launcher."""
    os.kill(process, number)
    time.sleep(0.5)


def flip(step: Step, *_: object, module: str = "fc") -> None:
    """One bit of one weight of this rank."""
    weight = step._state.model.get_parameter(f"{module}.weight").detach()
    weight.as_strided((1,), (1,)).view(torch.int32)[0] ^= 1


def nan_loss(step: Step, *_: object) -> None:
    """The loss of the coming step is nan on this rank alone."""
    network = step._network
    step._network = lambda images: (setattr(step, "_network", network), network(images) * float("nan"))[1]


def run_dir() -> Path:
    """Of the run in progress."""
    return Path(os.environ["RUN_DIR"])


def fill(*_: object, for_good: bool = False) -> None:
    """Another's file takes all the room that the first save has left; for one save, or for good."""
    while not (run_dir() / "checkpoints" / "best.json").exists():
        time.sleep(0.1)
    other = run_dir().with_name("other")
    with contextlib.suppress(OSError), other.open("wb") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    if not for_good:
        report = Saver._save

        def saved(saver: Saver, state: Checkpoint) -> None:
            report(saver, state)
            other.unlink(missing_ok=True)

        Saver._save = saved  # type: ignore[method-assign]


def network(*words: str) -> None:
    """Change this rank's host's link to the others."""
    subprocess.run(words, check=True)


class AtTheVeryEnd:
    """Sends its process a signal when Python, having given back its signal handlers, clears the modules."""

    def __init__(self) -> None:
        self._say = functools.partial(os.write, 2, b"at the very end\n")
        self._signal = functools.partial(os.kill, os.getpid(), signal.SIGUSR1)

    def __del__(self) -> None:
        self._say()
        self._signal()


def happens() -> None:
    """The fault, now."""
    run_dir().with_suffix(".fault").write_text(json.dumps(now()))


def launcher() -> int:
    """The process that started this rank, or asked for it (tests/parallel/warm.py)."""
    return int(os.environ.get("LAUNCHER", os.getppid()))


def linger(*_: object, before: float, after: float) -> None:
    """Work slowly; after `before` seconds all ranks are told to end, as by srun, and `after` later the work is done."""
    time.sleep(before)
    happens()
    for rank in psutil.Process(launcher()).children():
        rank.terminate()
    time.sleep(after)


def fail(*_: object) -> None:
    """An error that nobody foresaw."""
    raise ValueError("planted")


ACTIONS: dict[str, Callable[..., object]] = {
    "fail": fail,
    "exit": lambda *_: sys.exit(0),
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda *_: (
        os.kill(os.getpid(), signal.SIGSTOP),
        time.sleep(HOURS),
    ),  # is woken for its stacks
    "sleep": lambda *_: time.sleep(HOURS),
    "gil": lambda *_: [ctypes.PyDLL(None).usleep(10**6) for _ in iter(int, 1)],  # keeps the GIL asleep, for ever
    "usr1": lambda *_: send(os.getpid(), signal.SIGUSR1),
    "term": lambda *_: send(os.getpid(), signal.SIGTERM),
    "usr1-at-the-very-end": lambda *_: globals().update(last=AtTheVeryEnd()),
    "usr1-launcher": lambda *_: send(launcher(), signal.SIGUSR1),
    "term-launcher": lambda *_: send(launcher(), signal.SIGTERM),
    "kill-launcher": lambda *_: send(launcher(), signal.SIGKILL),
    "term-launcher-and-sleep": lambda *_: (send(launcher(), signal.SIGTERM), time.sleep(HOURS)),
    "term-all-and-write-slowly": functools.partial(linger, before=0.0, after=2 * ENDING_GRACE),
    "term-all-later-and-write-slowly": functools.partial(linger, before=4.0, after=2 * ENDING_GRACE),
    "work-slowly-and-term-all": functools.partial(linger, before=ENDING_GRACE + 1, after=1.0),
    "fill": fill,
    "fill-for-good": functools.partial(fill, for_good=True),
    "remove": lambda *_: shutil.rmtree(run_dir()),
    "cut": lambda *_: network("ip", "link", "set", "eth0", "down"),
    "slow-link": lambda *_: network(*SLOW.split()),
    "nan": nan_loss,
    "flip": flip,
    "flip-frozen": functools.partial(flip, module="conv1"),
}


def plant(call_number: str, function: str, action: str) -> None:
    """Put the fault into the code of this rank."""
    module_name, _, path = function.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, owner)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def faulty(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call_number):
            happens()
            ACTIONS[action](*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, faulty)


def tell_samples() -> None:
    """From here on the indices of the samples of every step are written down."""
    step = Step.__call__

    @functools.wraps(step)
    def told(self: Step, batch: Batch, *arguments: Any) -> None:
        step(self, batch, *arguments)
        with run_dir().with_suffix(".samples").open("a") as file:
            print(*batch.indices[batch.weights > 0].tolist(), file=file)

    Step.__call__ = told  # type: ignore[method-assign]


def main(world: World, config: Config) -> int:
    """train, run after run, each with its fault, until one does not end with 0."""
    tell_samples()
    make_small()
    for directory, fault in json.loads(os.environ["FAULTS"]).items():
        os.environ["RUN_DIR"] = directory
        rank, *what = fault.split() or [""]
        if rank == str(world.rank) and not run_dir().with_suffix(".fault").exists():  # elastic jobs come here again
            plant(*what)
        run = config.run.model_copy(update={"dir": run_dir()})
        if status := train(world, config.model_copy(update={"run": run})):
            return status
    return 0


if __name__ == "__main__":
    job.run(load, main)
