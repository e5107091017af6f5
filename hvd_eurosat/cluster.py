"""The ranks of a job: who they are, what they share, and the one place through which they leave.

The only module that calls Horovod and MPI. It serves a single process, ranks started by an MPI launcher
(mpirun, srun, horovodrun) and ranks of `horovodrun --gloo` alike.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from hvd_eurosat import node, rendezvous
from hvd_eurosat.config import Settings
from hvd_eurosat.environment import is_parallel, launched, under_mpi
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.node import Place
from hvd_eurosat.watchdog import Watchdog

T = TypeVar("T")
Tensors = TypeVar("Tensors", bound=Tensor)
C = TypeVar("C", bound=Settings)

BROADCAST_BYTES = 4 * 2**20
PULSE_SECONDS = 1.0

DEFAULTS = {
    # The ranks wait minutes for rank 0's validation or for a node's packing: not a stall to warn of after 60 s.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "1800",
    # Fusion depends on timing, and so would the order of a sum: the buckets are ours (training/gradients.py).
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Horovod's thread asks the other ranks every so many ms, and MPI waits for their answer spinning.
    "HOROVOD_CYCLE_TIME": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
GLOO_DEFAULTS = {
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo",
    "HOROVOD_CYCLE_TIME": "1" if torch.cuda.is_available() else "5",  # 1 takes 3 % more of a training core
}
NICE = 12  # of Horovod's thread over MPI on CPUs: what trains on its core goes first, 15 to 1


class SharedError(UserError):
    """An error that every rank raises at the same place, so that all can leave in good order."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Process:
    """What this process keeps, also while the world around it changes (elastic jobs)."""

    def __init__(self, elastic: bool = False) -> None:
        # NCCL, unlike Gloo, may not tell a rank that the others are gone.
        self.watchdog = Watchdog(patient=elastic and not torch.cuda.is_available())
        self.pulse_due: float | None = None  # the sign of life that ranks at work give to those that wait for them
        self.committed: Any = None
        self.members: Any = None  # Horovod's elastic state, which hears of hosts that come and go


@dataclass(frozen=True)
class World:
    """The ranks of the job, as seen from one of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    threads: int
    _process: _Process = field(default_factory=_Process, compare=False)

    @property
    def is_main(self) -> bool:
        """Rank 0 validates, saves and speaks."""
        return self.rank == 0

    def watch(self, seconds: float) -> None:
        """From here on this rank is ended after `seconds` without progress, and when its launcher dies."""
        self._process.watchdog.start(
            seconds, f"rank {self.rank} of {self.size} ({socket.gethostname()})", is_parallel()
        )

    def tick(self, phase: str | None = None, patience: float = 1.0) -> None:
        """This rank made progress, and is now in `phase`, which may take `patience` times the watchdog's limit.

        Within `together` the ranks that wait hear of it too.
        """
        self._process.watchdog.beat(phase, patience)
        if self._process.pulse_due is not None and time.monotonic() > self._process.pulse_due:
            self._give_pulse(at_work=True)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within the block this rank waits for the others."""
        return self._process.watchdog.waiting()

    def gather(self, value: T) -> list[T]:
        """Every rank's value (picklable), in the order of the ranks. Collective."""
        if self.size == 1:
            return [value]
        mine = _pack(value)
        with self.waiting():
            lengths = _hvd().allgather(torch.tensor([len(mine)]), name="gather.lengths")
            every = _hvd().allgather(mine, name="gather")
        return [pickle.loads(one.numpy().data) for one in every.split(lengths.tolist())]

    def from_main(self, value: T) -> T:
        """Rank 0's value (picklable) on every rank. Collective."""
        if self.size == 1:
            return value
        packed = _pack(value if self.is_main else None)
        length = torch.tensor(len(packed))
        self.broadcast([length])
        packed = packed if self.is_main else packed.new_empty(int(length))
        self.broadcast(packed.split(BROADCAST_BYTES))
        return value if self.is_main else cast(T, pickle.loads(packed.numpy().data))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's tensors (dense, of any memory format) to every rank, in place. Collective."""
        memory = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        for number, group in enumerate(split_by_bytes(memory, BROADCAST_BYTES) if self.size > 1 else []):
            with self.waiting():  # of groups, so that a slow network is not taken for a dead one
                _hvd().broadcast_parameters([(f"broadcast.{number}.{i}", m) for i, m in enumerate(group)], root_rank=0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor. Collective."""
        if self.size == 1:
            return tensor.clone()
        with self.waiting():
            return cast(Tensor, _hvd().allreduce(tensor, op=_hvd().Sum))

    def start_sum(self, tensor: Tensor, name: str, adasum: bool = False) -> int:
        """Begin to add up a tensor over all ranks, in place, while this one works on. Collective, known by `name`.

        adasum: by Adasum (Maleki et al. 2020), which needs MPI between the ranks.
        """
        operation = _hvd().Adasum if adasum else _hvd().Sum
        return cast(int, _hvd().allreduce_async_(tensor, name=name, op=operation))

    def finish_sum(self, handle: int) -> None:
        """Wait for what `start_sum` began."""
        with self.waiting():
            _hvd().synchronize(handle)

    def stack(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [...], as one [size, ...]. Collective."""
        if self.size == 1:
            return tensor[None].clone()
        with self.waiting():
            return cast(Tensor, _hvd().allgather(tensor[None]))

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns, on every rank; a UserError on any of them is raised on all. Collective.

        Ranks with little or no work wait asleep for the others, which show by `tick` that they are alive.
        """
        result, error = None, None
        self._process.pulse_due = time.monotonic() + PULSE_SECONDS if self.size > 1 else None
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        while self.size > 1 and self._give_pulse(at_work=False):
            pass
        self._process.pulse_due = None
        errors = self.gather((error, socket.gethostname()))
        if len({e for e, _ in errors}) == 1:
            shared = error
        else:
            rank, shared, host = next((rank, e, host) for rank, (e, host) in enumerate(errors) if e)
            shared = f"{shared} (on rank {rank} of {self.size}, {host})"
        if shared:
            raise SharedError(shared)
        return result  # type: ignore[return-value]

    def _give_pulse(self, at_work: bool) -> bool:
        """Whether any rank is at work yet. Collective."""
        with self.waiting():
            handle = _hvd().allreduce_async(torch.tensor([float(at_work)]), name="pulse", op=_hvd().Sum)
            while not _hvd().poll(handle):
                time.sleep(0.005)
            self._process.pulse_due = time.monotonic() + PULSE_SECONDS
            return bool(_hvd().synchronize(handle) > 0)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0 (picklable), on every rank, or its UserError. Collective."""
        return self.from_main(self.together(lambda: work() if self.is_main else cast(T, None)))

    @property
    def is_elastic(self) -> bool:
        """Whether ranks may be lost and join while the job runs (horovodrun --min-np)."""
        return self._process.members is not None

    def commit(self, state: Any) -> None:
        """Keep a state from which all go on when ranks are lost or join, which may happen here. Collective."""
        self._process.committed = state
        with self.waiting():
            self._process.members.check_host_updates()

    def committed(self) -> Any:
        """Rank 0's committed state on every rank, None in a job that has just begun. Collective."""
        return self.from_main(self._process.committed) if self.is_elastic else None

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """Raise on every rank unless all have the same values, naming what differs. Collective."""
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    raise SharedError(
                        f"the ranks differ in {what}: {key} is {first.get(key)!r} on rank 0, "
                        f"{other.get(key)!r} on rank {rank}"
                    )

    def node_by_node(self, work: Callable[[], T]) -> T:
        """`work` on one rank of each node, then on all, which find it done. Collective."""
        self.together(lambda: work() if self.local_rank == 0 else None)
        return self.together(work)


def _pack(value: object) -> Tensor:
    """uint8 [bytes]. Horovod's own broadcast_object and allgather_object copy them one by one: 100 MB take 10 s."""
    buffer = io.BytesIO()
    pickle.dump(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def split_by_bytes(tensors: list[Tensors], room: int) -> list[list[Tensors]]:
    """Groups of tensors, in order, of about `room` bytes each."""
    groups: list[list[Tensors]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.nbytes > room:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def run(configure: Callable[[Sequence[str]], C], main: Callable[[World, C], int | None]) -> NoReturn:
    """Run a verb: its configuration from the command line, the same on all ranks, then `main`; the one way out.

    Statuses: 0 done, 1 failed, 2 bad usage, configuration or data, and what `main` returns on all ranks alike. When
    one rank fails alone, all end: its error is printed once and the whole job is aborted.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        if _rank() == 0:
            configure(sys.argv[1:])
        sys.exit(0)

    def job(process: _Process) -> int:
        world = _world(process)
        settings = world.together(lambda: configure(sys.argv[1:]))
        world.agree("configuration", settings.flat())
        return main(world, settings) or 0

    try:
        _init()
        status = _elastically(job) if os.environ.get("HOROVOD_ELASTIC") == "1" else job(_Process())
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


def _elastically(job: Callable[[_Process], int]) -> int:
    """The job, begun again from its last commit, without ending the process, whenever ranks are lost or join."""
    from horovod.common.elastic import State, run_fn

    class Members(State):  # type: ignore[misc]  # the state itself is the World's to keep
        def sync(self) -> None: ...

        def restore(self) -> None: ...

        def on_reset(self) -> None: ...  # it would lose the news that came since this rank asked for its place

    process = _Process(elastic=True)
    process.members = Members(_hvd().broadcast_object, _hvd().rank)

    def regroup() -> None:
        process.watchdog.rest()  # new hosts may take their time
        process.pulse_due = None
        _hvd().shutdown()
        State.on_reset(process.members)
        rendezvous.meet(again=True)
        os.environ["HOROVOD_ELASTIC"] = "0"  # Horovod would ask for a place too
        _hvd().init()

    return cast(int, run_fn(lambda _: job(process), regroup)(process.members))


def join() -> World:
    """Join the job as its launcher has laid it out, good or bad. Collective."""
    _init()
    return _place(_Process())


def _init() -> None:
    for variable, value in (DEFAULTS if under_mpi() else DEFAULTS | GLOO_DEFAULTS).items():
        os.environ.setdefault(variable, value)
    if under_mpi():
        from mpi4py import MPI  # before Horovod, which would otherwise finalise MPI when the first rank leaves

        hvd, others = _hvd(), _threads()
        hvd.init(comm=MPI.COMM_WORLD)
        if not torch.cuda.is_available():
            for thread in _threads() - others:
                with contextlib.suppress(ProcessLookupError):  # one that has ended since
                    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.nice(0) + NICE))
    else:
        hvd = _hvd()
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            del os.environ["HOROVOD_CYCLE_TIME"]  # with this and the threshold given, a second init would crash
            rendezvous.meet(again=False)
        hvd.init()


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def _world(process: _Process) -> World:
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


def _place(process: _Process) -> World:
    hvd = _hvd()
    local_rank, device = hvd.local_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    return World(hvd.rank(), hvd.size(), local_rank, hvd.local_size(), device, threads=1, _process=process)


def libraries() -> dict[str, Any]:
    """What Horovod and mpi4py are built with and load, without joining a job."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    of_mpi4py = _loaded_mpi()
    hvd = _hvd()
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built(), "CUDA": hvd.cuda_built()}
    return {
        "horovod_built": {name: int(value) for name, value in built.items()},
        "horovod_mpi": sorted(_loaded_mpi() - of_mpi4py or of_mpi4py),
        "mpi4py_mpi": sorted(of_mpi4py),
        "mpi": MPI.Get_library_version().split(", package")[0].splitlines()[0].strip("\0 "),
    }


def thread_level() -> str:
    """Which calls from several threads MPI allows in this job."""
    if not under_mpi():
        return "no MPI in this job"
    from mpi4py import MPI

    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(name.lower() for name in names if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def _loaded_mpi() -> set[str]:
    """Paths of the MPI libraries in this process."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in paths if re.search(r"/libmpi(ch)?\.so", path)}


def _say(text: str) -> None:
    """A message on standard error in one write, which launchers that label each rank's words keep together."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _hvd() -> Any:
    import horovod.torch

    return horovod.torch


def _rank() -> int:
    if "horovod.torch" in sys.modules and _hvd().is_initialized():
        return int(_hvd().rank())
    rank, _ = launched()
    return rank


def leave_together(status: int) -> NoReturn:
    """Collective. Once all are here, a request to stop comes too late to count."""
    hvd = _hvd()
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
