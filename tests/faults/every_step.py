"""Stop and resume at every step of an epoch, on as many ranks as it is started on, in one job.

Prints, on rank 0, the fingerprint of the undisturbed run and of each resumed one.
"""

from __future__ import annotations

from hvd_eurosat import cluster, train
from hvd_eurosat.config import Config, load
from hvd_eurosat.errors import STOPPED
from tests.faults.conftest import fingerprint


class StopAt:
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def run(world: cluster.World, config: Config, name: str, stop_at: int) -> int:
    """One run in its own directory; returns its exit status."""
    run_dir = config.run.path / name
    train.StopRequest = lambda: StopAt(stop_at)  # type: ignore[assignment, misc]
    there = config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})
    return train.train(world, there)


def main(world: cluster.World, config: Config) -> None:
    """Once undisturbed; then stopped after each step, and resumed."""
    assert run(world, config, "undisturbed", 0) == 0
    steps = 0
    while run(world, config, f"stopped-{steps + 1}", steps + 1) == STOPPED:
        steps += 1
        assert run(world, config, f"stopped-{steps}", 0) == 0
    if world.is_main:
        for name in ["undisturbed", *(f"stopped-{step}" for step in range(1, steps + 1))]:
            print("fingerprint", fingerprint(config.run.path / name))


if __name__ == "__main__":
    cluster.run(load, main)
