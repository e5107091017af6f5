"""Real jobs under real launchers, on a small synthetic data set."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvd_eurosat import prepare
from hvd_eurosat.data.sample import generate

HANGS = 480.0  # seconds, in which any job here is done on the busiest machine, and below pytest's own limit
WARM = Path(__file__).with_name("warm.py")
BIN = Path(sys.executable).parent
THREE = "localhost:1,127.0.0.1:1,127.1:1"  # this host by three names, for Horovod leaves out the host of a lost rank
MEMORY_ALONE = ("--mca", "btl", "self,vader")  # between ranks: the end of Open MPI's TCP takes a second
LAUNCHERS = {
    "mpirun": ["mpirun", *MEMORY_ALONE, "--bind-to", "none", "--oversubscribe", "-np"],
    "horovodrun": ["horovodrun", "-np"],
    "gloo": ["horovodrun", "--gloo", "--network-interface", "lo", "-np"],
}
LAUNCHERS["elastic"] = [*LAUNCHERS["gloo"], "1", "--min-np", "1", "-H", THREE, "--max-np"]
TRAINED = {"model__trainable": "all", "train__epochs": 2, "valid__batch_size": 8}
Job = subprocess.CompletedProcess[str]
Launch = Callable[..., Job]


def under(launcher: str, ranks: int, python: str, *words: object) -> list[str]:
    """What a Python is told as `ranks` ranks under a launcher, which lies beside it; "python" is none."""
    program = [python, *map(str, words)]
    if launcher == "python":
        return program
    name, *options = LAUNCHERS[launcher]
    return [str(Path(python).with_name(name)), *options, str(ranks), *program]


def command(launcher: str, ranks: int, verb: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """A verb as `ranks` ranks under a launcher."""
    return under(launcher, ranks, python, "-m", f"hvd_eurosat.{verb}", *arguments)


def unlabelled(text: str) -> str:
    """Without the labels of ranks, which launchers put even between a line and its end."""
    return re.sub(r"\[[\d,]+\]<std(out|err)>:", "", text)


def variables(**more: str) -> dict[str, str]:
    """The environment of jobs of one thread a rank."""
    allow_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **allow_root, **more}


def run(arguments: list[str], timeout: float = HANGS, **environment: str) -> Job:
    """The finished job, one thread a rank, without launchers' labels."""
    env = variables(**environment)
    job = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    job.stdout, job.stderr = map(unlabelled, (job.stdout, job.stderr))
    return job


def wait_for(condition: Callable[[], object], seconds: float = HANGS, pause: float = 0.1) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)


def survivors(run_dir: Path) -> list[int]:
    """Processes that still have this run's directory on their command line."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(run_dir).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@contextmanager
def warm_python() -> Iterator[str]:
    """A Python for ranks, which starts them already imported (warm.py); the launchers beside it start by it, too."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{name}/ranks")  # a short name, which sockets need, in a folder of this user alone
        listener.listen(64)
        python = Path(name, "python")
        client = shlex.join([sys.executable, "-I", "-S", str(WARM), f"{name}/ranks"])
        python.write_text(
            f'#!/bin/sh\ncase $1 in -[mc]) exec {client} "$@" ;; esac\nexec {shlex.quote(sys.executable)} "$@"\n'
        )
        python.chmod(0o755)
        shutil.copy(BIN / "horovodrun", name)
        Path(name, "mpirun").symlink_to(BIN / "mpirun")
        words = [sys.executable, "-m", "tests.parallel.warm", "serve", str(listener.fileno())]
        with subprocess.Popen(
            words, env=variables(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()]
        ):
            listener.close()
            yield str(python)  # and then its standard input ends, and with it the server


@pytest.fixture(scope="session")
def warm(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of `warm_python`, for all tests but those of the start itself; pytest's workers share one (tests/conftest.py)."""
    if shared := getattr(request.config, "workerinput", {}).get("warm"):
        yield shared
    else:
        with warm_python() as python:
            yield python


@pytest.fixture(scope="session")
def launch(warm: str) -> Launch:
    """launch(launcher, ranks, verb, *arguments): the finished job, of warm ranks."""

    def start(launcher: str, ranks: int, verb: str, *arguments: object, **environment: str) -> Job:
        return run(command(launcher, ranks, verb, *arguments, python=warm), **environment)

    return start


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training, 20 validation and 20 test images of the synthetic sample."""
    return make_data(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(scope="session")
def trained(launch: Launch, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, all weights trained on 2 ranks."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    job = launch("mpirun", 2, "train", *small(data, run_dir, **TRAINED))
    assert job.returncode == 0, job.stderr
    return run_dir


def make_data(folder: Path, seed: int, per_class: int = 12) -> Path:
    """A prepared data set below `folder`."""
    for name, image in generate(per_class=per_class, seed=seed):
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    arguments = ["--source", str(folder / "source"), "--out", str(folder / "data"), "--ratios", "60,20,20"]
    assert prepare.main(arguments) == 0
    return folder / "data"


SMALL = ("--model.arch", "resnet18", "--train.precision", "fp32", "--optim.schedule", "constant", "--optim.lr", "0.01")


def small(data: Path, run_dir: Path, **keys: object) -> list[str]:
    """Flags for a run of seconds; section__key=value adds more."""
    shown = {"data__root": data, "data__image_size": 32, "run__dir": run_dir}
    flags = {**shown, "model__weights": "none", "train__batch_size": 10, "valid__batch_size": 10, **keys}
    return [*SMALL, *(word for key, value in flags.items() for word in (f"--{key.replace('__', '.')}", str(value)))]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in metrics.jsonl."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return dict(json.loads((run_dir / "summary.json").read_text()))


def checkpoint_file(run_dir: Path, name: str = "last.json") -> Path:
    """The checkpoint that last.json or best.json names."""
    return run_dir / "checkpoints" / json.loads((run_dir / "checkpoints" / name).read_text())["file"]
