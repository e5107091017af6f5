"""What the benchmark computes from what its jobs measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_eurosat import benchmark
from hvd_eurosat.benchmarks import project, results, scaling, step
from hvd_eurosat.benchmarks.job import Clock, Loop
from hvd_eurosat.benchmarks.project import Allreduce
from hvd_eurosat.benchmarks.settings import MODES, ProjectSettings, StepSettings
from tests.unit.conftest import Grow

FIT = Allreduce(
    cycle=0.004, latency=0.001, host=2e-9, buckets=[16_000_000, 300_000], ready=[0.3, 0.9], hides_host=False, gloo=True
)
WORK = 0.1
FASTER = 0.8
STEPS = 2
WIRES = {"4096": 1.1e-7, "1048576": 0.9e-7, "16777216": 1.0e-7}  # a link of 0.1 Gbit/s, seconds per byte by size


def rank(data: float, work: float, optimiser: float, communication: float) -> dict[str, Any]:
    """Equal steps of 128 images."""
    of = {"data": data, "step": work, "optimiser": optimiser, "communication": communication, "images": 128.0}
    once = {"validation": 3.0}
    return {
        "device": "cpu",
        "controller": "mpi",
        "modes": {mode: once | {k: [value] * STEPS for k, value in of.items()} for mode in MODES},
    }


@pytest.fixture
def data(grow: Grow) -> Path:
    """A tree with two classes."""
    return grow("data", {f"{split}/{name}": 1 for split in ("train", "valid", "test") for name in "AB"})


class Machine:
    """Jobs that take as long as the model says, on two cores, over links that carry large messages more slowly.

    Each rank is slow in another step. drift: times that jobs of so many ranks find the machine slower.
    """

    gloo = True
    slots = (1, 1, 1, 1)

    def __init__(self, link: float, drift: Mapping[int, float]) -> None:
        self.link, self.drift = link, drift
        self.fit = dataclasses.replace(FIT, wires={"0.1": WIRES})

    def room(self, cores: int) -> int:
        return 4

    def allows(self, ranks: int) -> bool:
        return ranks <= 4

    def ours(self, ranks: int, steps: int, threads: int, **keys: object) -> list[dict[str, Any]]:
        drift = self.drift[ranks]
        slow = slower(ranks) * drift
        exposed = self.fit.exposed(ranks, self.link, WORK * slow, slow)
        bytes_each = {size: FIT.host * drift + self.fit.wire(self.link, int(size)) for size in WIRES}
        times = {size: [FIT.cycle / 2 + 2 * FIT.latency + int(size) * of] for size, of in bytes_each.items()}
        results = []
        for number in range(ranks):
            one = rank(0, 0, 0, 0) | {"cycle": FIT.cycle, "messages": times}
            work = [WORK * slow * (1 if step == number % STEPS else FASTER) for step in range(STEPS)]
            waiting = [exposed + WORK * slow - seconds for seconds in work]
            for mode, of in one["modes"].items():
                apart = of | {"step": work}
                one["modes"][mode] = apart | {
                    "communication": waiting,
                    "buckets": FIT.buckets,
                    "ready": FIT.ready,
                    "apart": apart,
                }
            results.append(one)
        return results


def slower(ranks: int) -> float:
    """Where ranks share two cores."""
    return max(1.0, ranks / 2)


def test_a_section_stands_beside_the_others(tmp_path: Path) -> None:
    on_gpu = {("lockstep", 1): []}
    scaled = scaling.compare(on_gpu | {(kind, 1): [1.0] for kind in ("weak", "strong", "alone")}, 1)
    used = {"peak_pss_mb": 3, "images_mb": 2, "images_file_mb": 1}
    results.merge(tmp_path, "scaling", {"all": {"4": scaled}})
    results.merge(tmp_path, "memory", {"1": used})
    results.merge(tmp_path, "scaling", {"all": {"2": scaled}})
    expected = {"scaling": {"all": {"2": scaled}}, "memory": {"1": used}}
    assert json.loads((tmp_path / "benchmark.json").read_text()) == expected


def test_rates_ratio_and_shares() -> None:
    ours = [rank(0.01, 0.17, 0.02, 0.05), rank(0.01, 0.2, 0.02, 0.02)]
    baseline = [rank(0.1, 0.4, 0, 0)] * 2
    found = step.compare("all", {"ours": [ours], "baseline": [baseline], "strong": [ours]}, 2560)
    assert found["ours"]["median"] == pytest.approx(128 / 0.25)
    assert found["ratio"] == pytest.approx(2.0)
    assert found["epoch"]["ours"]["median"] == pytest.approx(2560 / (5 + 3))
    assert found["epoch"]["ratio"] == pytest.approx((10 + 3) / (5 + 3))
    assert found["share"] == pytest.approx({"data": 0.04, "optimiser": 0.08, "communication": 0.08, "straggling": 0.06})


def test_a_round_that_was_disturbed_does_not_count() -> None:
    rounds = [[rank(0.01, seconds, 0, 0)] for seconds in (0.31, 0.3, 3.0)]
    found = step.compare("all", dict.fromkeys(step.CONTENDERS, rounds), 2560)
    assert found["ours"]["median"] == pytest.approx(128 / 0.32)


class Bf16:
    """A launcher whose jobs find that bf16 pays."""

    ranks = launched = 2
    slots = ()
    precision = "auto"

    def __init__(self) -> None:
        self.baselines: list[tuple[str, ...]] = []

    def threads(self, ranks: int) -> int:
        return 1

    def ours(self, ranks: int, steps: int, threads: int, **keys: object) -> list[dict[str, Any]]:
        self.precision = "bf16"
        return [rank(0.01, 0.2, 0.02, 0.02) | {"precision": "bf16"}] * 2

    def baseline(self, ranks: int, steps: int, threads: int, *flags: str) -> list[dict[str, Any]]:
        self.baselines.append(flags)
        return [rank(0.1, 0.4, 0, 0)] * 2


def test_the_stronger_baseline_has_the_precision_that_ours_found(data: Path) -> None:
    launcher = Bf16()
    list(step.measure(launcher, StepSettings(data={"root": data}, steps=2), lambda _: None))
    assert launcher.baselines == [(), ("--strong=bf16",), ("--strong=bf16",), ()]


def test_numbers_of_ranks() -> None:
    assert [scaling.numbers(most) for most in (1, 2, 6)] == [[1], [1, 2], [1, 2, 4, 6]]


def test_efficiencies_are_taken_within_a_round() -> None:
    """The machine is half as fast in the second of three rounds."""
    rates = {
        ("alone", 1): [100.0, 50.0, 100.0],
        ("alone", 2): [180.0, 90.0, 180.0],
        ("lockstep", 2): [0.99, 0.94, 0.98],
        ("weak", 2): [171.0, 81.0, 180.0],
        ("strong", 2): [150.0, 70.0, 160.0],
    }
    found = scaling.compare(rates, 2)
    assert found["images_per_second"] == 171.0
    assert (found["min"], found["efficiency"], found["max"]) == pytest.approx((0.9, 0.95, 1.0))
    assert found["lockstep"] == 0.98
    assert found["plain"] == pytest.approx(0.855)
    assert found["strong"] == pytest.approx({"images_per_second": 150.0, "efficiency": 0.75})


def test_what_jobs_side_by_side_would_keep_in_lockstep() -> None:
    """Each core is slow in another step."""
    one, two = rank(0.1, 0.2, 0, 0), rank(0.1, 0.3, 0, 0)
    one["modes"]["all"]["step"][0] = 0.9
    alone = (2 / 1.3 + 2 / 0.8) / 2
    assert scaling.lockstep([one, two], "all") == pytest.approx(2 / 1.4 / alone)


def test_the_time_between_steps_is_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"))
    moments = iter([0.0, 3.0, 4.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(clock, "mark", lambda: next(moments))
    for span in ("end", "data", "step", "end", "data"):
        clock.begin(span)
    assert clock.seconds() == {"data": [1, 5], "step": [2, 0], "communication": [0, 0], "optimiser": [0, 0]}


class Turns(Loop):
    """Steps apart take a second, together two; what is between them five."""

    def __init__(self) -> None:
        self.now, self.clock = 0.0, Clock(torch.device("cpu"))
        self.clock.mark = lambda: self.now  # type: ignore[method-assign]

    def spend(self, span: str, seconds: float) -> None:
        self.clock.begin(span)
        self.now += seconds

    def apart(self) -> None:
        self.spend("data", 1)

    def _barrier(self) -> None:
        self.spend("end", 5)

    def readiness(self) -> list[float]:
        return []

    def __next__(self) -> int:
        self.spend("data", 2)
        return 128


def test_steps_apart_and_together_take_turns() -> None:
    found = Turns().in_turn(3)
    assert found["apart"]["data"] == [1, 1, 1]
    assert found["data"] == [2, 2, 2]
    assert found["images"] == [128, 128, 128]


def test_the_slowest_of_many() -> None:
    uniform = np.linspace(0, 1, 10_001)[None]
    for ranks in (1, 2, 9):
        assert project.slowest(uniform, ranks) == pytest.approx(ranks / (ranks + 1), abs=1e-3)
    assert project.slowest(np.array([[1.0, 1.0], [2.0, 2.0]]), 2) == 2.0
    assert project.slowest(np.array([[1.0, 2.0], [1.0, 2.0]]), 2) == 1.5  # slowed in the same step
    assert project.slowest(np.array([[1.0, 2.0], [1.0, 2.0]]), 4) == 1.75
    assert project.slowest(np.array([[1.0, 2.0], [1.0, 2.0]]), 1) == 1.5
    assert project.slowest(np.array([[1.0, 1.0], [2.0, 2.0]]), 1) == 1.5


def test_what_is_hidden_behind_backward() -> None:
    small = 1.5 * 300_000 * 8 / (0.95 * 1e9)  # the last bucket's, on 4 ranks over 1 Gbit/s
    large = 1.5 * 16_000_000 * 8 / (0.95 * 1e9)
    cycle, latency, host = 0.002, 0.004, 1.5 * 16_300_000 * 2e-9
    assert FIT.exposed(1, 1.0, WORK, 1.0) == 0
    assert FIT.exposed(4, 1.0, 10.0, 1.0) == pytest.approx(cycle + latency + small + host)
    assert FIT.exposed(4, 1.0, 0.0, 2.0) == pytest.approx(cycle + 2 * latency + small + large + 2 * host)
    in_part = (0.3 - 0.9) * WORK + cycle + 2 * latency + small + large + host
    assert FIT.exposed(4, 1.0, WORK, 1.0) == pytest.approx(in_part)
    on_gpu = dataclasses.replace(FIT, hides_host=True)
    assert on_gpu.exposed(4, 1.0, 10.0, 1.0) == pytest.approx(cycle + latency + small + 1.5 * 300_000 * 2e-9)
    over_mpi = Allreduce.fit([Machine(0, {2: 1}).ours(2, 1, 1)], "all", gloo=False)
    assert over_mpi.exposed(4, 1.0, 10.0, 1.0) == pytest.approx(cycle + 2 * latency + small + large + host)


def test_the_model_is_fitted_checked_and_projected(tmp_path: Path) -> None:
    settings = ProjectSettings(steps=1, run={"dir": tmp_path})
    (found,) = project.measure(Machine(0.0, {2: 1.2, 3: 1.5, 4: 1.0}), settings, print)
    for mode in MODES:
        assert found[mode]["fit"]["host"] == pytest.approx(1.2 * FIT.host)
        assert found[mode]["fit"]["latency"] == pytest.approx(FIT.latency)
        assert [point["ranks"] for point in found[mode]["points"]] == [2, 3, 4]
        assert found[mode]["error"] == pytest.approx(0, abs=1e-6)
        exposed = FIT.exposed(3, 0, 2.25 * WORK, 2.25)
        assert found[mode]["points"][1]["communication_ms"] == pytest.approx(1000 * exposed)
        many = found[mode]["projection"][-1]
        own = 2 * WORK
        assert (many["ranks"], many["link"]) == (1024, 100)
        assert many["predicted_ms"] == pytest.approx(1000 * (own + FIT.exposed(1024, 100, own, 2.0)))
    results.merge(tmp_path, "project", found)
    slow = settings.model_copy(update={"link": 0.1})
    (again,) = project.measure(Machine(0.1, {2: 1.2, 3: 0.7, 4: 1.0}), slow, print)
    assert [point["link"] for point in again["all"]["points"]] == [0, 0, 0, 0.1, 0.1, 0.1]
    assert again["all"]["error"] == pytest.approx(0, abs=1e-6)
    assert again["all"]["fit"]["wires"] == {"0.1": pytest.approx(WIRES)}
    assert Allreduce(**again["all"]["fit"]).wire(0.1, 8_912_896) == pytest.approx(0.95e-7)
    assert again["all"]["projection"] == found["all"]["projection"]
    results.draw(results.merge(tmp_path, "project", again), tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("step", "--step", "3"), "--step"),
        (("step", "--data.root", "nowhere"), "nowhere"),
        (("step", "--hosts", "a:many"), "--hosts: 'a:many' is no host: write name:slots"),
        (("scaling", "--cores", "5000"), "--cores 5000: this machine has "),
        (("project", "--hosts", "a:8,b:8"), "with one rank on each host"),
        (("project", "--hosts", "a:1"), "room for one: give --hosts node1:1,node2:1, or --train.device cpu"),
        (("project", "--link", "1"), "--hosts node1:1,node2:1"),
        (("project", "--link", "1", "--hosts", "a:1,b:1"), "fit it first, by project over MPI without --link"),
    ],
)
def test_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path, words: tuple[str, ...], error: str
) -> None:
    other = {mode: {"fit": dataclasses.asdict(FIT), "points": []} for mode in MODES}  # over Gloo
    (tmp_path / "benchmark.json").write_text(json.dumps({"project": other}))
    what, *flags = words
    assert benchmark.main([what, f"--run.dir={tmp_path}", f"--data.root={data}", *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert error in said


@pytest.mark.parametrize("content", ["{", "3", '{"project": 3}', '{"scaling": {"all": {"2": {"efficiency": 1}}}}'])
def test_damaged_results_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path, content: str
) -> None:
    (tmp_path / "benchmark.json").write_text(content)
    assert benchmark.main(["memory", f"--run.dir={tmp_path}", f"--data.root={data}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "benchmark.json") in said
