"""1 to N ranks: together, and as many of one rank each, side by side on the same cores."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hvd_eurosat.benchmarks.launcher import Launcher, Results
from hvd_eurosat.benchmarks.settings import MODES, ScalingSettings
from hvd_eurosat.benchmarks.step import ROUNDS, rate, spread, step_seconds

Rates = dict[str, dict[tuple[str, int], list[float]]]


def measure(launcher: Launcher, settings: ScalingSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "scaling" section after each round: of each mode and number of ranks the rate, and efficiencies."""
    counts = numbers(launcher.room(settings.cores))
    rounds = min(ROUNDS, settings.steps)
    steps = settings.steps // rounds
    rates: Rates = {mode: defaultdict(list) for mode in MODES}
    for number in range(rounds):
        for ranks in counts if number % 2 == 0 else counts[::-1]:
            say(f"round {number + 1} of {rounds}: np {ranks}")
            share = {"train.batch_size": max(1, settings.train.batch_size // ranks)}
            weak = launcher.ours(ranks, steps, settings.cores, cores=settings.cores)
            strong = launcher.ours(ranks, steps, settings.cores, cores=settings.cores, **share) if ranks > 1 else weak
            alone = launcher.alone(ranks, steps, settings.cores) if ranks > 1 else weak
            for mode in MODES:
                rates[mode]["weak", ranks].append(rate(weak, mode))
                rates[mode]["strong", ranks].append(rate(strong, mode))
                each = statistics.mean(rate([one], mode) for one in alone)
                rates[mode]["alone", ranks].append(ranks * each)
                if len(alone) == ranks:  # none stands for the others
                    rates[mode]["lockstep", ranks].append(lockstep(alone, mode))
        yield {mode: {str(ranks): compare(rates[mode], ranks) for ranks in counts} for mode in MODES}


def numbers(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def lockstep(alone: Results, mode: str) -> float:
    """The share that jobs of one rank would keep of their rate if each waited for the slowest after every step."""
    seconds = [step_seconds(one["modes"][mode]) for one in alone]
    slowest: list[float] = [max(step) for step in zip(*seconds, strict=True)]
    return statistics.harmonic_mean([sum(one) for one in seconds]) / sum(slowest)


def compare(rates: Mapping[tuple[str, int], Sequence[float]], ranks: int) -> dict[str, Any]:
    """One number of ranks. Efficiencies are taken within each round: a machine that drifts is in both terms.

    What an efficiency is below "lockstep" is the job's cost, or the machine changed between the two; what that one is
    below 1 is how unevenly the cores work.
    """
    weak, strong, alone, in_step = (rates[kind, ranks] for kind in ("weak", "strong", "alone", "lockstep"))
    one = rates["alone", 1]
    shares = spread([together / apart for together, apart in zip(weak, alone, strict=True)])
    return {
        "images_per_second": statistics.median(weak),
        "efficiency": shares["median"],
        "min": shares["min"],
        "max": shares["max"],
        "lockstep": statistics.median(in_step) if in_step else None,
        "plain": statistics.median(w / (ranks * o) for w, o in zip(weak, one, strict=True)),
        "strong": {
            "images_per_second": statistics.median(strong),
            "efficiency": statistics.median(s / (ranks * o) for s, o in zip(strong, one, strict=True)),
        },
    }
