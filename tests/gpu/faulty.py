"""`train` with a fault at its fifth step, in which steps are graphs: FAULT is "stop" or "hang"."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from hvd_eurosat.cluster import job
from hvd_eurosat.config.reading import load
from hvd_eurosat.train import train
from hvd_eurosat.training.step import Step

FIFTH = 5
A_MINUTE = 10**11  # cycles of a GPU, or so: it answers again by itself if nobody ends it


def hang() -> None:
    """The device does not answer."""
    if torch.cuda.is_available():
        torch.cuda._sleep(A_MINUTE)
    else:
        time.sleep(60)


def main() -> None:
    """As train's, until the fault."""
    call, faults = Step.__call__, {"stop": lambda: os.kill(os.getpid(), signal.SIGUSR1), "hang": hang}
    count = 0

    def stepped(step: Step, *words: Any) -> None:
        nonlocal count
        count += 1
        if count == FIFTH:
            faults[os.environ["FAULT"]]()
        call(step, *words)

    Step.__call__ = stepped
    job.run(load, train)


if __name__ == "__main__":
    main()
