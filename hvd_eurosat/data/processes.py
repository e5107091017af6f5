"""Work on many items in processes of their own: what Python does of it, threads would do one after the other."""

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from hvd_eurosat.errors import RunError

CHUNK = 64  # items for one message; an interrupt waits for none
WAITING = 3  # chunks that a process has before it, so that it never waits for the next
FEW = 4 * CHUNK  # are not worth a process
FORK = get_context("fork")  # what there is need not travel, and a million names would
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
Result = TypeVar("Result")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on stderr when that is a terminal. It is told how many more are done."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task(title, total=total)
        yield lambda count: bars.advance(bar, count)


def in_processes(
    function: Callable[[range], Result], count: int, title: str, jobs: int
) -> Generator[tuple[range, Result], None, None]:
    """What `function` makes of ranges that together are range(count), each with its result, in no order.

    Ranges go to whichever of `jobs` forked processes is free. What these change in memory stays with them. For a few
    items, or one job, there is no other process. The first exception stops it; a progress bar shows on stderr when that
    is a terminal. Raises RunError where a process dies.
    """
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    if jobs < 2 or count <= FEW:
        with progress(title, count) as advance:
            for chunk in chunks:
                yield chunk, function(chunk)
                advance(len(chunk))
        return
    chunks.reverse()
    pipes: list[Connection] = []
    workers = []
    try:
        for _ in range(min(jobs, len(chunks))):  # before the bar, which has a thread
            here, there = FORK.Pipe()
            worker = FORK.Process(target=_serve, args=(function, there, [*pipes, here]), daemon=True)
            worker.start()
            there.close()
            pipes.append(here)
            workers.append(worker)
        with progress(title, count) as advance:
            for chunk, result in _share_out(chunks, pipes):
                advance(len(chunk))
                yield chunk, result
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise RunError(f"a process that was {title} died (out of memory?): give fewer --jobs") from None
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.kill()
            worker.join()


def _share_out(chunks: list[range], pipes: Sequence[Connection]) -> Iterator[tuple[range, Any]]:
    """Gives away the chunks, from the last on, and takes what comes back. Raises what a process raised."""
    given = 0
    for pipe in [pipe for _ in range(WAITING) for pipe in pipes][: len(chunks)]:
        pipe.send(chunks.pop())
        given += 1
    while given:
        ready = wait(pipes)
        for pipe in (pipe for pipe in pipes if pipe in ready):
            chunk, result, error = pipe.recv()
            given -= 1
            if error is not None:
                raise error
            if chunks:
                pipe.send(chunks.pop())
                given += 1
            yield chunk, result


def _serve(function: Callable[[range], Result], pipe: Connection, others: list[Connection]) -> None:
    """A process: works off what comes through the pipe, until that is closed, be it by the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)  # at once, and not after a last chunk
    gc.freeze()  # a collection would touch all that is shared, and so copy it
    for other in others:  # which would not be closed while it is open here
        other.close()
    try:
        while True:
            chunk: range = pipe.recv()
            try:
                pipe.send((chunk, function(chunk), None))
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                pipe.send((chunk, None, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
