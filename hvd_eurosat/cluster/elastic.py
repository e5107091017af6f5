"""Jobs that go on when ranks are lost or join."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import cast

from hvd_eurosat.cluster import rendezvous
from hvd_eurosat.cluster.backend import horovod
from hvd_eurosat.cluster.explanations import LOST, explain, say
from hvd_eurosat.cluster.world import Process
from hvd_eurosat.errors import RunError

FAILURES = 5  # in a row, without a commit between: what keeps the ranks apart is then not a lost host


def elastically(job: Callable[[Process], int]) -> int:
    """The job, begun again from its last commit, without ending the process, whenever ranks are lost or join.

    Raises RunError after FAILURES in a row.
    """
    from horovod.common.elastic import State, run_fn
    from horovod.common.exceptions import HorovodInternalError

    class Members(State):  # type: ignore[misc]  # the state itself is the World's to keep
        def sync(self) -> None: ...

        def restore(self) -> None: ...

        def on_reset(self) -> None: ...  # it would lose the news that came since this rank asked for its place

    process, failures, last = Process(), 0, None
    process.members = Members(horovod().broadcast_object, horovod().rank)

    def regroup() -> None:
        process.watchdog.rest()  # new hosts may take their time
        process.pulse_due = None
        gc.collect()  # what the lost attempt held: its step refers to itself, and to all that it keeps
        horovod().shutdown()
        State.on_reset(process.members)
        rendezvous.meet(again=True)
        os.environ["HOROVOD_ELASTIC"] = "0"  # Horovod would ask for a place too
        horovod().init()

    def attempt(_: object) -> int:
        nonlocal failures, last
        try:
            return job(process)
        except HorovodInternalError as error:
            failures, last = failures + 1 if process.committed is last else 1, process.committed
            why = explain(error) or str(error)
            if failures == FAILURES:
                raise RunError(f"the ranks failed {FAILURES} times without a commit between: {why}") from None
            if os.environ["HOROVOD_RANK"] == "0" or not why.startswith(LOST):
                say(f"regrouping: {why}")
            raise

    return cast(int, run_fn(attempt, regroup)(process.members))
