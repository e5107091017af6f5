"""A Python that has imported what ranks need, and forks one in 0.1 s of CPU where a start takes 2.

The server waits asleep for its first client, imports, and joins no job. `-m MODULE WORD…` or `-c PROGRAM WORD…` of the
client, which any launcher starts in place of Python, makes it fork a process that becomes the rank: with the client's
words, folder, variables, cores, limits and streams. What that starts by sys.executable is warm, too. The client lives
as long as the rank, passes signals on to it and ends as it does; when the client is killed, so is the rank. A rank that
has ended leaves nothing to the next.

What it does not show, and ranks that begin by themselves do (test_train.py, `finished` and `imported`): what a rank
imports, sets whose order differs from rank to rank, and a run's pictures, which take longer than training here. Its
ResNet-18 has a quarter of the channels, and it does not wait for the disk.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import marshal
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from typing import NoReturn

LIMITS = range(16)  # Linux has so many
FROM_LAUNCHERS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
MAINS = (  # what ranks, launchers and processes of ranks run as their main program
    "train",
    "evaluate",
    "predict",
    "map",
    "benchmark",
    "benchmarks.job",
    "benchmarks.baseline",
    "doctor",
    "cluster.hosts",
    "weights.hdf5",
)
LAZY = (
    "multiprocessing.spawn",  # which keeps the Python that it starts: this one
    "horovod.runner.launch",
    "horovod.torch",
    "h5py",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.colors",
    "matplotlib.figure",
    "PIL.Image",
    "rasterio",
    "torch.utils.tensorboard",
)


def client(address: str, words: list[str]) -> None:
    """A rank, as its launcher sees it. It knows nothing but the standard library, to be there at once."""
    limits = {number: resource.getrlimit(number) for number in LIMITS}
    variables = {**os.environ, "LAUNCHER": str(os.getppid())}  # whose child the rank is not
    python = os.path.join(os.path.dirname(address), "python")
    request = marshal.dumps((words, python, os.getcwd(), variables, sorted(os.sched_getaffinity(0)), limits))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile("rb")
        rank = int(answers.readline())
        for name in FROM_LAUNCHERS:
            signal.signal(getattr(signal, name), lambda number, _: os.kill(rank, number))
        status = int(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener: int) -> None:
    """Fork a rank for every client, until standard input ends. Returns in the rank, which is to run sys.argv."""
    ready, _, _ = select.select([listener, 0], [], [])
    if 0 in ready:
        os._exit(0)
    mains = [f"hvd_eurosat.{name}" for name in MAINS]
    for name in (*LAZY, *mains):
        importlib.import_module(name)
    for name in mains:
        del sys.modules[name]
    make_small()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread, which a forked process would lack")
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # as the tests themselves (conftest.py)
    clients = socket.socket(fileno=listener)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = clients.accept()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            clients.close()
            keep(connection)
            return
        connection.close()


def make_small() -> None:
    """No pictures, no waits for the disk, a quarter of a ResNet-18's channels: a job takes a third of the time."""
    from hvd_eurosat.model import resnet
    from hvd_eurosat.run import plots

    plots.learning_curves = plots.confusion_matrix = plots.reliability = lambda *_: None  # type: ignore[assignment]
    os.fsync = lambda _: None
    block, depths, _ = resnet.BLOCKS["resnet18"]
    resnet.BLOCKS["resnet18"] = block, depths, 16


def keep(connection: socket.socket) -> None:
    """Fork a rank, end it with its client, say how it ended. Returns in the rank."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as requests:
        request = requests.read(int.from_bytes(length, "little"))
    rank = os.fork()
    if rank == 0:
        connection.close()
        become(request, streams)
        return
    for stream in (0, 1, 2, *streams):  # whoever reads them waits for their end
        os.close(stream)
    with contextlib.suppress(OSError):  # a client that is gone already
        connection.sendall(b"%d\n" % rank)
    ended = os.pidfd_open(rank)
    ready, _, _ = select.select([connection.fileno(), ended], [], [])
    if ended not in ready:
        os.kill(rank, signal.SIGKILL)
    _, status = os.waitpid(rank, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(request: bytes, streams: list[int]) -> None:
    """Take over what the client was given."""
    sys.argv, sys.executable, folder, variables, cores, limits = marshal.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    os.sched_setaffinity(0, cores)
    for number, limit in limits.items():
        resource.setrlimit(number, limit)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
    sys.path[:1] = [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]


def run() -> NoReturn:
    """As `python -m` and `python -c` do, but for taking apart what was imported, which takes longer than all else."""
    status: object = 0
    try:
        kind, what = sys.argv[:2]
        del sys.argv[:1]
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = kind
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(main))
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if (mpi := sys.modules.get("mpi4py.MPI")) and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
        run()
    else:
        client(sys.argv[1], sys.argv[2:])
