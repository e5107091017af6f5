"""How a rank joins its job, and the one place through which all leave it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

import torch

from hvd_eurosat.cluster import node
from hvd_eurosat.cluster.backend import horovod, start
from hvd_eurosat.cluster.elastic import elastically
from hvd_eurosat.cluster.environment import is_parallel, launched, under_mpi
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.cluster.world import Process, SharedError, World
from hvd_eurosat.config.schema import Settings
from hvd_eurosat.errors import RunError, UserError

C = TypeVar("C", bound=Settings)


def run(configure: Callable[[Sequence[str]], C], main: Callable[[World, C], int | None]) -> NoReturn:
    """Run a verb: its configuration from the command line, the same on all ranks, then `main`; the one way out.

    Statuses: 0 done, 1 failed, 2 bad usage, configuration or data, and what `main` returns on all ranks alike. When
    one rank fails alone, all end: its error is printed once and the whole job is aborted.
    """

    def job(process: Process) -> int:
        world = _world(process)
        settings = world.together(lambda: configure(sys.argv[1:]))
        world.agree("configuration", settings.flat())
        return main(world, settings) or 0

    try:
        start()
        status = elastically(job) if os.environ.get("HOROVOD_ELASTIC") == "1" else job(Process())
    except SharedError as error:
        if _rank() == 0:
            _say(f"error: {error}")
        status = error.status
    except (UserError, RunError) as error:
        _say(f"error: {error}{_where()}")
        _abort(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _abort(130)
    except OSError as error:
        _say(f"error: {error}{_where()}")
        _abort(1)
    except BaseException as error:
        if type(error).__name__ == "HorovodInternalError":  # the rank that failed has said why
            _say(f"lost the other ranks{_where()}")
        else:
            _say(f"{traceback.format_exc()}error: the run failed{_where()}")
        _abort(1)
    leave_together(status)


def _where() -> str:
    return f" (rank {_rank()} on {socket.gethostname()})" if is_parallel() else ""


def join() -> World:
    """Join the job as its launcher has laid it out, good or bad. Collective."""
    start()
    return _place(Process())


def _world(process: Process) -> World:
    """This rank's place among the others: its device and its share of the node's cores. Collective."""
    world = _place(process)
    places = [place for place in world.gather(Place.of(world.device)) if place.host == socket.gethostname()]
    world.together(lambda: node.check(places, world.size))
    if world.is_main and (warning := node.idle_cores(places)):
        _say(f"warning: {warning}")
    threads = node.threads(places)
    torch.set_num_threads(threads)
    node.keep_freed_memory()
    return replace(world, threads=threads)


def _place(process: Process) -> World:
    hvd = horovod()
    local_rank, device = hvd.local_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    return World(hvd.rank(), hvd.size(), local_rank, hvd.local_size(), device, threads=1, _process=process)


def _say(text: str) -> None:
    """A message on standard error in one write, which launchers that label each rank's words keep together."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _rank() -> int:
    if "horovod.torch" in sys.modules and horovod().is_initialized():
        return int(horovod().rank())
    rank, _ = launched()
    return rank


def leave_together(status: int) -> NoReturn:
    """Collective. Once all are here, a request to stop comes too late to count."""
    hvd = horovod()
    if hvd.size() > 1:
        hvd.barrier()  # the launcher ends every rank when the first leaves with an error
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # an exiting Python would fall back on the default, which kills
    hvd.shutdown()
    sys.exit(status)


def _abort(status: int) -> NoReturn:
    sys.stdout.flush()
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar may have hidden
    if under_mpi():
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    os._exit(status)
