"""Jobs that go on when ranks are lost or join."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

from hvd_eurosat.cluster import rendezvous
from hvd_eurosat.cluster.backend import horovod
from hvd_eurosat.cluster.world import Process


def elastically(job: Callable[[Process], int]) -> int:
    """The job, begun again from its last commit, without ending the process, whenever ranks are lost or join."""
    from horovod.common.elastic import State, run_fn

    class Members(State):  # type: ignore[misc]  # the state itself is the World's to keep
        def sync(self) -> None: ...

        def restore(self) -> None: ...

        def on_reset(self) -> None: ...  # it would lose the news that came since this rank asked for its place

    process = Process(elastic=True)
    process.members = Members(horovod().broadcast_object, horovod().rank)

    def regroup() -> None:
        process.watchdog.rest()  # new hosts may take their time
        process.pulse_due = None
        horovod().shutdown()
        State.on_reset(process.members)
        rendezvous.meet(again=True)
        os.environ["HOROVOD_ELASTIC"] = "0"  # Horovod would ask for a place too
        horovod().init()

    return cast(int, run_fn(lambda _: job(process), regroup)(process.members))
