"""Stop and resume at every step of an epoch, on as many ranks as it is started on, in one job.

Prints, on rank 0, the fingerprint of the undisturbed run and of each resumed one.
"""

from __future__ import annotations

import math

from hvd_eurosat import train
from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.errors import STOPPED
from tests.faults.conftest import fingerprint
from tests.parallel.warm import make_small


class StopAt:
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def run(world: World, config: Config, name: str, stop_at: int) -> int:
    """One run in its own directory; returns its exit status."""
    run_dir = config.run.path / name
    train.StopRequest = lambda: StopAt(stop_at)  # type: ignore[attr-defined]
    there = config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})
    return train.train(world, there)


def main(world: World, config: Config) -> None:
    """Once undisturbed; then stopped after each step, and resumed."""
    make_small()
    steps = math.ceil(80 / (config.train.batch_size * world.size))
    names = ["undisturbed", *(f"stopped-{step}" for step in range(1, steps + 1))]
    for step, name in enumerate(names):
        if step:
            assert run(world, config, name, step) == STOPPED
        assert run(world, config, name, 0) == 0
    for name in names if world.is_main else []:
        print("fingerprint", fingerprint(config.run.path / name))


if __name__ == "__main__":
    job.run(load, main)
