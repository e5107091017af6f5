"""A model of the step's time on P ranks, and what it says of many.

    T(P) = E[the slowest of P ranks' work] + what of the allreduce is exposed
    allreduce of n bytes = cycle / 2 + 2 latency log2(P) + 2 (P - 1) / P n (host + wire)

- Work, with its spread, is measured in steps that wait for no other rank, side by side: where ranks outnumber cores
  they share them in the one case as in the other, and with Horovod's thread, which finds nothing to do there. The
  slowest of P is taken from their distribution.
- Horovod looks for work once in a cycle, of which half passes on average. Latency and host (seconds per byte to copy
  and to add) are fitted to allreduces of several sizes on two ranks. Where links of that rate are there, wire is what
  an allreduce takes longer over them, at each size, for TCP carries large ones at another rate than small ones; else
  it is the nominal rate, of which TCP over Ethernet leaves 95 %. An allreduce that is optimal in bandwidth sends
  2 (P - 1) / P n on each link (Thakur et al. 2005), one rank to a link.
- Buckets go out one after the other, each as soon as its last gradient is there, which is measured in the steps that
  wait for no other rank, too. On CPUs what the host does for a message takes the core from the work, and is not hidden;
  a core that is shared does it as much slower as it works. MPI waits spinning, and yields to the work: there, nothing
  goes out meanwhile.

Nothing is fitted to steps in which ranks exchange gradients. They are what the model is checked against, and take turns
with those that do not, for a machine may change from one minute to the next.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.benchmarks.launcher import Launcher, Results
from hvd_eurosat.benchmarks.results import read_results
from hvd_eurosat.benchmarks.settings import MODES, ProjectSettings
from hvd_eurosat.benchmarks.step import step_seconds
from hvd_eurosat.errors import UserError

CHECKED = (2, 3, 4)
PROJECTED = [4**power for power in range(6)]
LINKS = (1.0, 10.0, 100.0)
ROUNDS = 3
GOODPUT = 0.95
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Allreduce:
    """Seconds: cycle, latency (of one message), host (per byte), wires (per byte, of links measured, by Gbit/s and by
    the bytes of an allreduce).

    buckets: bytes of each; ready: the share of a step's work after which it can go out; hides_host: as on GPUs; gloo:
    not over MPI.
    """

    cycle: float
    latency: float
    host: float
    buckets: list[int]
    ready: list[float]
    hides_host: bool
    gloo: bool
    wires: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def fit(jobs: Sequence[Results], mode: str, gloo: bool) -> Allreduce:
        """From jobs of two ranks that time messages."""
        first = jobs[0][0]
        host, fixed = fit_line(jobs)
        latency = max(0.0, fixed - first["cycle"] / 2) / 2
        on_gpu = first["device"] == "cuda"
        ready = np.mean([one["modes"][mode]["ready"] for run in jobs for one in run], axis=0)
        if not (on_gpu or gloo):
            ready[:] = ready[-1]
        buckets = first["modes"][mode]["buckets"]
        return Allreduce(first["cycle"], latency, max(0.0, host), buckets, ready.tolist(), on_gpu, gloo)

    def with_link(self, link: float, jobs: Sequence[Results]) -> Allreduce:
        """With the messages of two ranks over a link, too, which is not faster than its nominal rate."""
        fixed, nominal = self.cycle / 2 + 2 * self.latency, 8 / (link * 1e9)
        times = message_times(jobs).items()
        wire = {size: max(nominal, (seconds - fixed) / int(size) - self.host) for size, seconds in times}
        return dataclasses.replace(self, wires={**self.wires, f"{link:g}": wire})

    def wire(self, link: float, size: float) -> float:
        """Seconds per byte of an allreduce of so many bytes over a link of so many Gbit/s, or without limit (0)."""
        if measured := self.wires.get(f"{link:g}"):
            return float(np.interp(size, [int(there) for there in measured], list(measured.values())))
        return 8 / (link * 1e9 * GOODPUT) if link else 0.0

    def exposed(self, ranks: int, link: float, work: float, slower: float) -> float:
        """Seconds that a step is longer for it.

        link: Gbit/s, or 0; work: seconds of the step's own; slower: times that shared cores are slower than in the fit.
        """
        if ranks == 1:
            return 0.0
        free = taken = 0.0  # when the wire is free; what the host has taken from the work
        for size, ready in zip(self.buckets, self.ready, strict=True):
            sent = 2 * (ranks - 1) / ranks * size
            adding = self.host * slower * sent
            begin = max(free, ready * work + taken + self.cycle / 2)
            free = begin + 2 * self.latency * math.log2(ranks) + self.wire(link, size) * sent + adding
            taken += 0.0 if self.hides_host else adding
        return free - self.ready[-1] * work


def message_times(jobs: Sequence[Results]) -> dict[str, float]:
    """Seconds by the bytes of a message. Of the two ranks, the last to come to a message has not waited."""
    return {
        size: statistics.mean(
            min(both) for run in jobs for both in zip(*(r["messages"][size] for r in run), strict=True)
        )
        for size in jobs[0][0]["messages"]
    }


def fit_line(jobs: Sequence[Results]) -> tuple[float, float]:
    """Seconds per byte, and of no bytes."""
    times = message_times(jobs)
    seconds = np.array(list(times.values()))
    slope, fixed = np.polyfit([int(size) for size in times], seconds, 1, w=1 / seconds)
    return float(slope), float(fixed)


def slowest(samples: Samples, ranks: int) -> float:
    """The expected time of the slowest of some ranks: samples [ranks measured, steps] in seconds, of each one's steps.

    The ranks measured worked side by side: what slows a machine slows its ranks at about the same step, and the slowest
    there is one sample. Other machines are independent: n such groups are below t with probability F(t)^n. Of many more
    ranks than there are samples it is about the slowest sample: rarer delays are not in them.
    """
    measured = len(samples)
    if ranks <= measured:  # any of them
        weights = [math.comb(below, ranks - 1) / math.comb(measured, ranks) for below in range(measured)]
        return float((weights @ np.sort(samples, 0)).mean())
    times = np.sort(samples.max(0))
    below = np.arange(1, len(times) + 1) / len(times)
    return float(times @ np.diff(below ** (ranks / measured), prepend=0.0))


def measure(launcher: Launcher, settings: ProjectSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "project" section after each round: of each mode the fit, the points that check it, and the projection."""
    before = read_results(settings.folder).get("project", {})
    refuse(launcher, settings, before)
    for jobs in collect(launcher, settings, say):
        yield {mode: project(launcher, settings, jobs, mode, before.get(mode)) for mode in MODES}


def refuse(launcher: Launcher, settings: ProjectSettings, before: Mapping[str, Any]) -> None:
    """Raise UserError for what cannot be measured."""
    if not launcher.allows(2):
        way_out = "give --hosts node1:1,node2:1, or --train.device cpu"
        raise UserError(f"project times messages between two ranks, and there is room for one: {way_out}")
    if any(slots > 1 for slots in launcher.slots):
        raise UserError("project measures links, with one rank on each host: --hosts node1:1,node2:1")
    if settings.link and not launcher.slots:
        raise UserError("--link tells the rate of the hosts' links: --hosts node1:1,node2:1")
    fitted = [before.get(mode, {}).get("fit", {}).get("gloo") for mode in MODES]
    if settings.link and fitted != [launcher.gloo] * len(MODES):
        over = "Gloo" if launcher.gloo else "MPI"
        raise UserError(f"--link only checks a model: fit it first, by project over {over} without --link")


def project(
    launcher: Launcher, settings: ProjectSettings, jobs: Mapping[int, Sequence[Results]], mode: str, old: Any
) -> dict[str, Any]:
    """One mode's. old: what an earlier call found, which a call with a link adds to."""
    points = []
    if settings.link:
        fit = Allreduce(**old["fit"]).with_link(settings.link, jobs[2])
        points = [point for point in old["points"] if point["link"] != settings.link]
    else:
        fit = Allreduce.fit(jobs[2], mode, launcher.gloo)
    samples = {ranks: collate(runs, mode, lambda of: step_seconds(of["apart"])) for ranks, runs in jobs.items()}
    slower = {ranks: float(times.mean(1).max() / samples[2].mean(1).max()) for ranks, times in samples.items()}
    for ranks in sorted(jobs.keys() - {1}):
        point = predict(fit, samples[ranks], ranks, settings.link, slower[ranks])
        points.append(check(point, jobs[ranks], mode))
    node = launcher.room(settings.cores)
    return {
        "fit": dataclasses.asdict(fit),
        "points": points,
        "error": max(abs(point["error"]) for point in points),
        "projection": [predict(fit, samples[node], ranks, link, slower[node]) for link in LINKS for ranks in PROJECTED],
    }


def check(point: Mapping[str, Any], jobs: Sequence[Results], mode: str) -> dict[str, Any]:
    """The point beside what was measured: the step's time, and the part of it in communication proper."""
    measured = 1000 * float(collate(jobs, mode, step_seconds).max(0).mean())
    communication = 1000 * float(collate(jobs, mode, lambda of: of["communication"]).min(0).mean())
    error = point["predicted_ms"] / measured - 1
    return {**point, "measured_ms": measured, "communication_ms": communication, "error": error}


def collect(
    launcher: Launcher, settings: ProjectSettings, say: Callable[[str], None]
) -> Iterator[Mapping[int, Sequence[Results]]]:
    """After each round, by the number of ranks, the jobs of the rounds so far: those to check, and a machine full."""
    rounds = min(ROUNDS, settings.steps)
    steps, cores = settings.steps // rounds, settings.cores
    jobs: dict[int, list[Results]] = defaultdict(list)
    for number in range(rounds):
        for ranks in sorted({*filter(launcher.allows, CHECKED), launcher.room(cores)}):
            say(f"round {number + 1} of {rounds}: np {ranks}")
            jobs[ranks].append(launcher.ours(ranks, steps, cores, cores=cores, apart=True, messages=ranks == 2))
        yield jobs


def collate(jobs: Sequence[Results], mode: str, seconds: Callable[[Mapping[str, Any]], Sequence[float]]) -> Samples:
    """Seconds [ranks, steps], over all rounds. seconds: of each step, in what a rank measured in the mode."""
    ranks = range(len(jobs[0]))
    return np.array([[time for run in jobs for time in seconds(run[rank]["modes"][mode])] for rank in ranks])


def predict(fit: Allreduce, samples: Samples, ranks: int, link: float, slower: float) -> dict[str, Any]:
    """A point: the step's time in ms and its efficiency, the share of it that a rank's own work takes on average."""
    own = slowest(samples, ranks)
    seconds = own + fit.exposed(ranks, link, own, slower)
    return {"ranks": ranks, "link": link, "predicted_ms": 1000 * seconds, "efficiency": float(samples.mean()) / seconds}
