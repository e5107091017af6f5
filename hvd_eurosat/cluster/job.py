"""How a rank joins its job, and the one place through which all leave it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

import torch

from hvd_eurosat.cluster import device as devices
from hvd_eurosat.cluster import node
from hvd_eurosat.cluster.backend import horovod, start
from hvd_eurosat.cluster.elastic import elastically
from hvd_eurosat.cluster.environment import is_parallel, launched, under_mpi
from hvd_eurosat.cluster.explanations import LOST, explain, say
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.cluster.world import Process, SharedError, World
from hvd_eurosat.config.schema import Settings
from hvd_eurosat.errors import RunError, UserError

C = TypeVar("C", bound=Settings)

COMPILERS = 8  # at a time, of a rank whose network is compiled


def run(configure: Callable[[Sequence[str]], C], main: Callable[[World, C], int | None]) -> NoReturn:
    """Run a verb: its configuration from the command line, the same on all ranks, then `main`; the one way out.

    Statuses: 0 done, 1 failed, 2 bad usage, configuration or data, and what `main` returns on all ranks alike. When
    one rank fails alone, all end: its error is printed once and the whole job is aborted.
    """

    def job(process: Process) -> int:
        world = _world(process)
        settings = world.together(lambda: configure(sys.argv[1:]))
        world.agree("configuration", settings.flat())
        return main(_placed(world, settings.device), settings) or 0

    try:
        start()
        status = elastically(job) if os.environ.get("HOROVOD_ELASTIC") == "1" else job(Process())
    except SharedError as error:
        if _rank() == 0:
            say(f"error: {error}")
        status = error.status
    except UserError as error:
        say(f"error: {error}{_where()}")
        _abort(2)
    except KeyboardInterrupt:
        _abort(130)
    except BaseException as error:
        _fail(error)
    leave_together(status)


def _fail(error: BaseException) -> NoReturn:
    """Say what this rank failed of, and end the job."""
    line = str(error) if isinstance(error, RunError | OSError) else explain(error)
    if line is None:
        say(f"{traceback.format_exc()}error: the run failed{_where()}")
    elif line.startswith(LOST):
        say(f"{line}{_where()}")
    else:
        if not isinstance(error, OSError):
            time.sleep(_turn(_rank()))
        say(f"error: {line}{_where()}")
    _abort(1)


def _turn(rank: int) -> float:
    """Seconds: what all ranks run into at once, such as a GPU's memory, rank 0 says, and ends the others meanwhile."""
    return 0.0 if rank == 0 else 3.0 + min(rank, 20) / 4


def _where() -> str:
    return f" (rank {_rank()} on {socket.gethostname()})" if is_parallel() else ""


def join() -> World:
    """Join the job as its launcher has laid it out, good or bad, on the CPU. Collective."""
    start()
    return _world(Process())


def on_gpus(world: World) -> tuple[World, str | None, str]:
    """On its GPU, if every rank has its own, else still on the CPU; this one's GPU, and what ails it. Collective."""
    device, place, trouble = world.device, Place.of(world.device), ""
    try:
        device = devices.choose("auto", world.local_rank)
        place = Place.of(device)
    except (UserError, RuntimeError) as error:
        trouble = explain(error) or str(error)
    cards = [(other.host, other.card) for other in world.gather(place)]
    apart = len(set(cards)) == len(cards) and all(card for _, card in cards)
    return replace(world, device=device) if apart else world, place.gpu, trouble


def _world(process: Process) -> World:
    hvd = horovod()
    cpu = torch.device("cpu")
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), cpu, threads=1, _process=process)


def _placed(world: World, wanted: str) -> World:
    """With its device, as `train.device` wants it, and its share of the node's cores. Collective."""
    device = world.together(lambda: devices.choose(wanted, world.local_rank))
    every = world.gather(Place.of(device))
    if different := node.alike(every):
        raise SharedError(different)
    places = [place for place in every if place.host == socket.gethostname()]
    world.together(lambda: node.check(places, world.size))
    if world.is_main:
        for warning in node.warnings(places):
            say(f"warning: {warning}")
    threads = node.threads(places)
    torch.set_num_threads(threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(threads, COMPILERS)))  # its own: 32 for each rank
    node.keep_freed_memory()
    return replace(world, device=device, threads=threads)


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
