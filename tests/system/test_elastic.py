"""launch/elastic.sh over three hosts, one of which is lost and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.parallel.conftest import command, events, make_data, run, small, summary
from tests.system.hosts import Host
from tests.system.image import ROOT

pytestmark = pytest.mark.timeout(1200)  # four trainings
STEPS = 15  # of an epoch
PATIENCE = 300  # seconds, for what docs/reliability.md gives its times of


class Told(NamedTuple):
    """A step that a rank has made."""

    time: float
    rank: int
    ranks: int
    step: int


class Elastic:
    """A job of launch/elastic.sh on hosts a, b and c, which tells of its steps (stepwise.py)."""

    def __init__(self, hosts: dict[str, Host], ssh: Path, folder: Path, flags: list[str]) -> None:
        self._steps = folder / "steps"
        self._output = folder / "output"
        (folder / "hosts.txt").write_text("a:1\nb:1\nc:1\n")
        words = [str(ROOT / "launch" / "elastic.sh"), "--hostfile", str(folder / "hosts.txt"), "--interface", "eth0"]
        job = [sys.executable, "-m", "tests.system.stepwise", *flags]
        path = f"{ssh}:{os.environ['PATH']}"
        with self._output.open("w") as output:
            self.launcher = subprocess.Popen(
                hosts["a"].command([*words, "--min-np", "2", *job]),
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "STEPS": str(self._steps)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What it said so far."""
        return self._output.read_text()

    def steps(self) -> list[Told]:
        """All steps of all ranks so far."""
        lines = [line.split() for line in self._steps.read_text().splitlines()] if self._steps.exists() else []
        return [Told(float(line[0]), *map(int, line[1:])) for line in lines]

    def seconds_until(self, happens: Callable[[Told], bool]) -> float:
        """How long it takes until a step is made that is so."""
        began = time.time()
        while time.time() < began + PATIENCE:
            for told in self.steps():
                if told.time > began and happens(told):
                    return told.time - began
            assert self.launcher.poll() is None, self.output
            time.sleep(0.1)
        raise AssertionError(f"not within {PATIENCE} s:\n{self.output}")

    def hurry(self) -> None:
        """From here on no step is slow."""
        self._steps.with_name("steps.fast").touch()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 training, 60 validation and 60 test images of the synthetic sample."""
    return make_data(tmp_path_factory.mktemp("elastic"), seed=0, per_class=30)


def flags(data: Path, run_dir: Path, ranks: int = 3, seed: int = 0) -> list[str]:
    """Of a run of 15 steps an epoch on three ranks, or on others which share the same batch."""
    keys = {
        "data__image_size": 32,
        "train__epochs": 20,
        "train__batch_size": 12 // ranks,
        "train__seed": seed,
        "optim__lr": 0.02,
    }
    return small(data, run_dir, model__trainable="head", optim__schedule="one_cycle", **keys)


@pytest.fixture
def elastic(hosts: dict[str, Host], data: Path, tmp_path: Path) -> Iterator[Elastic]:
    """The job; the hosts' links are up afterwards, and nothing runs there."""
    job = Elastic(hosts, next(tmp_path.parent.glob("hosts*/bin")), tmp_path, flags(data, tmp_path / "run"))
    yield job
    for host in hosts.values():
        host.run(["ip", "link", "set", "eth0", "up"])
    left = {name: host.processes() for name, host in hosts.items()}
    for host in hosts.values():
        host.kill_all()
    job.launcher.wait()
    assert not any(left.values()), left


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[list[float]]]:
    """The validation accuracies of runs that nothing happens to, while the others wait."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def train() -> list[float]:
        for seed in range(3):
            job = run(command("python", 1, "train", *flags(data, folder / str(seed), 1, seed)), timeout=900)
            assert job.returncode == 0, job.stderr
        return [summary(folder / str(seed))["valid_accuracy"] for seed in range(3)]

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train)


def test_a_host_is_lost_and_comes_back(
    elastic: Elastic, hosts: dict[str, Host], tmp_path: Path, undisturbed: Future[list[float]]
) -> None:
    elastic.seconds_until(lambda told: told.ranks == 3 and told.step >= 40)
    hosts["c"].run(["ip", "link", "set", "eth0", "down"])
    before = max(told.step for told in elastic.steps())
    hosts["c"].kill_all()
    lost = elastic.seconds_until(lambda told: told.ranks == 2)
    first = next(told.step for told in elastic.steps() if told.ranks == 2)
    assert before - first < STEPS  # every epoch is committed, if nothing before
    elastic.seconds_until(lambda told: told.step >= first + 30)
    hosts["c"].run(["ip", "link", "set", "eth0", "up"])
    back = elastic.seconds_until(lambda told: told.ranks == 3)
    elastic.hurry()
    assert elastic.launcher.wait(PATIENCE) == 0, elastic.output
    print(f"a host is lost: two ranks train after {lost:.0f} s; it is back: three do after {back:.0f} s")
    assert [event["epoch"] for event in events(tmp_path / "run", "train")] == list(range(1, 21))
    accuracy, others = summary(tmp_path / "run")["valid_accuracy"], undisturbed.result()
    print(f"validation accuracy {accuracy:.3f}, undisturbed {others}")
    spread = max(0.1, max(others) - min(others))  # six of 60 images: three runs do not show all that chance does
    assert min(others) - spread <= accuracy <= max(others) + spread
