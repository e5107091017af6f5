"""Images per second of the way of the data: alone, from memory and from a cold disk, and beside a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hvd_eurosat.benchmarks.launcher import Launcher, Results
from hvd_eurosat.benchmarks.settings import DataSettings
from hvd_eurosat.benchmarks.step import spread, step_seconds

ROUNDS = 3


def measure(launcher: Launcher, settings: DataSettings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The "data" section after each round: by what trains, the rates and how many there are in memory."""
    mode = settings.model.trainable
    ranks, threads = launcher.ranks, launcher.threads(max(launcher.slots, default=launcher.launched))
    rounds = min(ROUNDS, settings.steps)
    jobs: list[Results] = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        jobs.append(launcher.ours(ranks, settings.steps // rounds, threads, reading=True, modes=f'["{mode}"]'))
        yield {mode: compare(jobs)}


def compare(jobs: Sequence[Results]) -> dict[str, Any]:
    """From the results of each round: of each place the data come from, rates and shares."""
    first = jobs[0][0]["reading"]
    found: dict[str, Any] = {"ranks": len(jobs[0]), "images_file_mb": jobs[0][0]["images_file"], "beside": {}}
    found["alone"] = {place: spread([_alone(job, place) for job in jobs]) for place in first["alone"]}
    rates = {place: [_beside(job, place) for job in jobs] for place in first["beside"]}
    for place, each in rates.items():
        kept = [rate / fed for rate, fed in zip(each, rates["none"], strict=True)]  # within a round
        waits = [max(statistics.mean(rank["reading"]["beside"][place]["data"]) for rank in job) for job in jobs]
        found["beside"][place] = spread(each) | {"kept": statistics.median(kept), "wait": statistics.median(waits)}
    found["cached"] = {p: max(rank["reading"]["cached"][p] for job in jobs for rank in job) for p in first["cached"]}
    return found


def _alone(job: Results, place: str) -> float:
    seconds = [rank["reading"]["alone"][place] for rank in job]
    return float(job[0]["reading"]["images"] * len(seconds[0]) / max(map(sum, seconds)))


def _beside(job: Results, place: str) -> float:
    seconds = [step_seconds(rank["reading"]["beside"][place]) for rank in job]
    return float(job[0]["reading"]["images"] * len(seconds[0]) / max(map(sum, seconds)))
