"""Images per second of our training loop and of the baselines, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hvd_eurosat.benchmarks.launcher import Launcher, Results
from hvd_eurosat.benchmarks.settings import MODES, StepSettings
from hvd_eurosat.data.tree import open_tree

ROUNDS = 5
PARTS = ("data", "step", "communication", "optimiser")
CONTENDERS = ("ours", "baseline", "strong")


def measure(launcher: Launcher, settings: StepSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "step" section after each round: of each mode the contenders, their ratios and what our step is made of."""
    images = len(open_tree(settings.data.root).files("train"))
    ranks, threads = launcher.ranks, launcher.threads(max(launcher.slots, default=launcher.launched))
    rounds = min(ROUNDS, settings.steps)
    steps = settings.steps // rounds
    found: dict[str, list[Results]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        order = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
        for name in order:
            say(f"round {number + 1} of {rounds}: {name}")
            if name == "ours":
                found[name].append(launcher.ours(ranks, steps, threads, validation=True))
            else:
                flags = [f"--strong={launcher.precision}"] if name == "strong" else []
                found[name].append(launcher.baseline(ranks, steps, threads, *flags))
        of_job = {name: found["ours"][0][0][name] for name in ("device", "controller", "precision")}
        facts = {"ranks": ranks, "threads": threads, "steps": (number + 1) * steps, **of_job}
        yield {mode: compare(mode, found, images) | facts for mode in MODES}


def compare(mode: str, found: Mapping[str, Sequence[Results]], images: int) -> dict[str, Any]:
    """One mode's figures, from the results of each contender's rounds. images: of an epoch."""
    rates = {name: spread([rate(ranks, mode) for ranks in rounds]) for name, rounds in found.items()}
    epochs = {name: spread([epoch_rate(ranks, mode, images) for ranks in rounds]) for name, rounds in found.items()}
    return {
        **rates,
        **ratios(rates),
        "epoch": epochs | ratios(epochs),
        "share": shares(found["ours"], mode),
    }


def ratios(rates: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times as fast we are as either baseline."""
    ours = rates["ours"]["median"]
    return {"ratio": ours / rates["baseline"]["median"], "ratio_strong": ours / rates["strong"]["median"]}


def rate(ranks: Results, mode: str) -> float:
    """Images per second of a job, by its slowest rank."""
    images: list[float] = ranks[0]["modes"][mode]["images"]
    return sum(images) / max(sum(step_seconds(rank["modes"][mode])) for rank in ranks)


def epoch_rate(ranks: Results, mode: str, images: int) -> float:
    """Images per second of an epoch of so many, its validation included."""
    validation: float = max(rank["modes"][mode]["validation"] for rank in ranks)
    return images / (images / rate(ranks, mode) + validation)


def step_seconds(parts: Mapping[str, Any]) -> list[float]:
    """Of each step of a rank in one mode, all in all."""
    return [sum(values) for values in zip(*(parts[part] for part in PARTS if part in parts), strict=True)]


def shares(jobs: Sequence[Results], mode: str) -> dict[str, float]:
    """Of our steps' time: data, optimiser, communication proper, and straggling.

    Whoever comes last to a collective waits for nobody: its time there is communication proper. What the others are
    in it longer, on average, is straggling.
    """
    total = {"data": 0.0, "optimiser": 0.0, "communication": 0.0, "straggling": 0.0}
    whole = 0.0
    for ranks in jobs:
        parts = [rank["modes"][mode] for rank in ranks]
        whole += statistics.mean(sum(step_seconds(part)) for part in parts)
        for name in ("data", "optimiser"):
            total[name] += statistics.mean(sum(part[name]) for part in parts)
        for together in zip(*(part["communication"] for part in parts), strict=True):
            total["communication"] += min(together)
            total["straggling"] += statistics.mean(together) - min(together)
    return {name: seconds / whole for name, seconds in total.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
