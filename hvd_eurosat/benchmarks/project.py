"""A model of the step's time on P ranks, and what it says of many.

    T(P) = E[the slowest of P ranks' work] + what of the allreduce is exposed
    allreduce of n bytes = cycle / 2 + 2 latency log2(P) + 2 (P - 1) / P n (host + wire)

- Work, with its spread, is measured on independent jobs of one rank, side by side as the ranks will be: where ranks
  outnumber cores they share them in the one case as in the other. The slowest of P is taken from their distribution.
- Horovod looks for work once in a cycle, of which half passes on average. Latency and host (seconds per byte to copy
  and to add) are fitted to allreduces of several sizes on two ranks. Wire is the nominal rate of the link, of which TCP
  over Ethernet leaves 95 %; an allreduce that is optimal in bandwidth sends 2 (P - 1) / P n on each link (Thakur et
  al. 2005), one rank to a link.
- All buckets but the last go out during backward, two thirds of the work. On CPUs what the host does for a message
  takes the core from the work, and is not hidden; a core that is shared does it as much slower as it works.

Nothing is fitted to steps of more than one rank. They are what the model is checked against.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.benchmarks.launcher import Launcher, Results
from hvd_eurosat.benchmarks.results import read_results
from hvd_eurosat.benchmarks.settings import MODES, ProjectSettings
from hvd_eurosat.benchmarks.step import shares, step_seconds
from hvd_eurosat.errors import UserError

CHECKED = (2, 3, 4)
PROJECTED = [4**power for power in range(6)]
LINKS = (1.0, 10.0, 100.0)
ROUNDS = 3
BACKWARD = 2 / 3
GOODPUT = 0.95
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Allreduce:
    """Seconds: cycle, latency (of one message), host (per byte). buckets: bytes of each; hides_host: as on GPUs."""

    cycle: float
    latency: float
    host: float
    buckets: list[int]
    hides_host: bool

    @staticmethod
    def fit(jobs: Sequence[Results], mode: str) -> Allreduce:
        """From the times of messages on two ranks; of the two, the last to come has not waited for the other."""
        first = jobs[0][0]
        times = [
            statistics.mean(min(both) for run in jobs for both in zip(*(r["messages"][size] for r in run), strict=True))
            for size in first["messages"]
        ]
        host, fixed = np.polyfit([int(size) for size in first["messages"]], times, 1, w=1 / np.array(times))
        latency = max(0.0, float(fixed) - first["cycle"] / 2) / 2
        buckets = first["modes"][mode]["buckets"]
        return Allreduce(first["cycle"], latency, max(0.0, float(host)), buckets, first["device"] == "cuda")

    def exposed(self, ranks: int, link: float, work: float, slower: float) -> float:
        """Seconds of a step.

        link: Gbit/s, or 0; work: seconds of the step's own; slower: times that shared cores are slower than in the fit.
        """
        if ranks == 1:
            return 0.0
        wire = 8 / (link * 1e9 * GOODPUT) if link else 0.0
        sent = [2 * (ranks - 1) / ranks * size for size in self.buckets]
        sending = [self.cycle / 2 + 2 * self.latency * np.log2(ranks) + wire * size for size in sent]
        adding = [self.host * slower * size for size in sent]
        if self.hides_host:
            sending, adding = [s + a for s, a in zip(sending, adding, strict=True)], [0.0]
        return float(sending[-1] + max(0.0, sum(sending[:-1]) - BACKWARD * work) + sum(adding))


def slowest(samples: Samples, ranks: int) -> float:
    """The expected time of the slowest of some ranks: samples [ranks measured, steps] in seconds, of each one's steps.

    From their distributions: all P are below t with probability F1(t) F2(t) ..., each as often as P has room for it.
    """
    times = np.sort(samples.ravel())
    below = np.stack([np.searchsorted(np.sort(one), times, side="right") / len(one) for one in samples])
    all_below = np.prod(below, axis=0) ** (ranks / len(samples))
    return float(np.sum(times * np.diff(all_below, prepend=0.0)))


def measure(launcher: Launcher, settings: ProjectSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """The "project" section: of each mode the fit, the points that check it, its error, and the projection."""
    before = read_results(settings.folder).get("project", {})
    if settings.link and not all("fit" in before.get(mode, {}) for mode in MODES):
        raise UserError("project --link checks a model that is there: fit it first, without --link")
    jobs = collect(launcher, settings, say)
    found = {}
    for mode in MODES:
        samples = {ranks: work(jobs[f"alone {ranks}"], mode) for ranks in alone_counts(launcher, settings)}
        old = before.get(mode, {}) if settings.link else {}
        fit = Allreduce(**old["fit"]) if old else Allreduce.fit(jobs["messages"], mode)
        points = [point for point in old.get("points", ()) if point["link"] != settings.link]
        for ranks in checked(launcher, settings):
            together = jobs[f"together {ranks}"]
            slower = float(samples[ranks].mean(1).max() / samples[2].mean(1).max())
            points.append(check(predict(fit, samples[ranks], ranks, settings.link, slower), together, mode))
        found[mode] = old | {
            "fit": dataclasses.asdict(fit),
            "points": points,
            "error": max(abs(point["error"]) for point in points),
        }
        if not settings.link:
            node = samples[launcher.room(settings.cores)]
            many = [predict(fit, node, ranks, link, 1.0) for link in LINKS for ranks in PROJECTED]
            found[mode]["projection"] = many
    return found


def check(point: Mapping[str, Any], jobs: Sequence[Results], mode: str) -> dict[str, Any]:
    """The point beside what was measured: the step's time, and the part of it in communication proper."""
    measured = 1000 * statistics.mean(t for run in jobs for t in step_seconds(run[0], mode))
    communication = measured * statistics.mean(shares([run], mode)["communication"] for run in jobs)
    error = point["predicted_ms"] / measured - 1
    return {**point, "measured_ms": measured, "communication_ms": communication, "error": error}


def checked(launcher: Launcher, settings: ProjectSettings) -> list[int]:
    """Numbers of ranks whose steps check the model."""
    limit = launcher.room(settings.cores) if settings.hosts else max(CHECKED)
    return [ranks for ranks in CHECKED if ranks <= limit]


def alone_counts(launcher: Launcher, settings: ProjectSettings) -> list[int]:
    """How many jobs of one rank are measured side by side: as many as are checked, and a machine full."""
    return sorted({2, *checked(launcher, settings), launcher.room(settings.cores)})


def collect(launcher: Launcher, settings: ProjectSettings, say: Callable[[str], None]) -> dict[str, list[Results]]:
    """The results of each kind of job, in each round."""
    rounds = min(ROUNDS, settings.steps)
    steps, cores = settings.steps // rounds, settings.cores
    jobs: dict[str, list[Results]] = defaultdict(list)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        if not settings.link:
            jobs["messages"].append(launcher.ours(2, 1, cores, cores=cores, messages=True))
        for ranks in alone_counts(launcher, settings):
            jobs[f"alone {ranks}"].append(launcher.alone(ranks, steps, cores))
        for ranks in checked(launcher, settings):
            jobs[f"together {ranks}"].append(launcher.ours(ranks, steps, cores, cores=cores))
    return jobs


def work(jobs: Sequence[Results], mode: str) -> Samples:
    """Seconds [ranks, steps] of every step of the jobs of one rank, over all rounds."""
    return np.array([[t for run in jobs for t in step_seconds(run[n], mode)] for n in range(len(jobs[0]))])


def predict(fit: Allreduce, samples: Samples, ranks: int, link: float, slower: float) -> dict[str, Any]:
    """A point: the step's time in ms and its efficiency, the share of it that one rank alone would take."""
    mean = float(samples.mean())
    seconds = slowest(samples, ranks) + fit.exposed(ranks, link, mean, slower)
    return {"ranks": ranks, "link": link, "predicted_ms": 1000 * seconds, "efficiency": mean / seconds}
