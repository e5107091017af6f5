"""The ranks of a job: who they are, what they share, and the one place through which they leave.

The only module that knows Horovod and MPI. It serves a single process, ranks started by an MPI launcher
(mpirun, srun, horovodrun) and ranks of `horovodrun --gloo` alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
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

from hvd_eurosat import rendezvous
from hvd_eurosat.config import Settings
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.watchdog import Watchdog

T = TypeVar("T")
Tensors = TypeVar("Tensors", bound=Tensor)
C = TypeVar("C", bound=Settings)

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
LAUNCHER_VARIABLES = re.compile(
    "(OMPI|PMIX|PMI|ORTE)_|HOROVOD_(RANK|SIZE|LOCAL_|CROSS_|HOSTNAME|GLOO_|CONTROLLER|CPU_OPERATIONS|ELASTIC)"
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
BUCKET_BYTES = 16 * 2**20
BROADCAST_BYTES = 4 * 2**20
PULSE_SECONDS = 1.0

DEFAULTS = {
    # The ranks wait minutes for rank 0's validation or for a node's packing: not a stall to warn of after 60 s.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "1800",
    # Fusion depends on timing, and so would the order of a sum: the buckets are ours (see GradientBuckets).
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Horovod's thread asks the other ranks every so many ms, and MPI waits for their answer spinning: on CPUs both
    # take cores from the training thread, 30 % of them with the defaults (1 ms, no yielding), 6 % with these.
    "HOROVOD_CYCLE_TIME": "1" if torch.cuda.is_available() else "5",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


class SharedError(UserError):
    """An error that every rank raises at the same place, so that all can leave in good order."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Process:
    """What this process keeps, also while the world around it changes (elastic jobs)."""

    def __init__(self, elastic: bool = False) -> None:
        self.watchdog = Watchdog(patient=elastic)
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
            seconds, f"rank {self.rank} of {self.size} ({socket.gethostname()})", _is_parallel()
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
        with self.waiting():
            return list(_hvd().allgather_object(value, name="gather"))

    def from_main(self, value: T) -> T:
        """Rank 0's value (picklable) on every rank. Collective."""
        if self.size == 1:
            return value
        with self.waiting():
            return cast(T, _hvd().broadcast_object(value, root_rank=0, name="from_main"))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's tensors (dense, of any memory format) to every rank, in place. Collective."""
        memory = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        for number, group in enumerate(_split(memory, BROADCAST_BYTES) if self.size > 1 else []):
            with self.waiting():  # of groups, so that a slow network is not taken for a dead one
                _hvd().broadcast_parameters([(f"broadcast.{number}.{i}", m) for i, m in enumerate(group)], root_rank=0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor. Collective."""
        if self.size == 1:
            return tensor.clone()
        with self.waiting():
            return cast(Tensor, _hvd().allreduce(tensor, op=_hvd().Sum))

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


class GradientBuckets:
    """Sums gradients over the ranks in flat buckets of fixed content and order, while backward still runs.

    Each bucket is one buffer, allocated once, whose slices are the parameters' `.grad`; its allreduce starts when
    the last gradient of it is there. Buckets are filled from the last parameter to the first, the order in which
    backward makes them. Fixed buckets make the sums repeatable, unlike Horovod's own fusion. The last bucket ends
    with a few numbers more: what the ranks tell each other in every step, `notes`, costs no collective of its own
    (but with Adasum, which adds numbers up in another way). Buckets, notes included, travel as `dtype`.
    """

    def __init__(
        self,
        world: World,
        parameters: Sequence[torch.nn.Parameter],
        notes: int,
        adasum: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if adasum and world.size & (world.size - 1):
            raise SharedError(f"optim.reduction adasum works on 2, 4, 8, ... ranks, not on {world.size}")
        if adasum and world.size > 1 and not _under_mpi():
            raise SharedError("optim.reduction adasum needs MPI: start the ranks by mpirun, srun or horovodrun --mpi")
        self._world, self._adasum = world, adasum
        self._dtype, self._compresses = dtype, dtype != torch.float32
        self._missing: list[int] = []
        self.groups = _split(list(reversed(parameters)), BUCKET_BYTES)
        self._handles: dict[int, tuple[int, Tensor]] = {}
        rooms = [sum(p.numel() for p in group) for group in self.groups]
        if not adasum:
            rooms[-1] += notes
        self.buffers = [torch.zeros(room, device=world.device) for room in rooms]
        self.notes = torch.zeros(notes, device=world.device) if adasum else self.buffers[-1][-notes:]
        for number, group in enumerate(self.groups):
            self._hold(number, group)

    def _hold(self, number: int, parameters: list[torch.nn.Parameter]) -> None:
        offset = 0
        for parameter in parameters:
            piece = self.buffers[number][offset : offset + parameter.numel()]
            parameter.grad = piece.as_strided(parameter.shape, parameter.stride())
            offset += parameter.numel()
            parameter.register_post_accumulate_grad_hook(lambda _: self._arrived(number))

    def _arrived(self, number: int) -> None:
        self._missing[number] -= 1
        if self._missing[number] == 0 and self._world.size > 1:
            sent = self.buffers[number]
            if self._compresses:  # as large as a rank's own mean, or 16 bits would lose it
                sent = (sent * self._world.size).to(self._dtype)
            operation = _hvd().Adasum if self._adasum else _hvd().Sum
            handle = _hvd().allreduce_async_(sent, name=f"gradients.{number}", op=operation)
            self._handles[number] = handle, sent

    def zero(self) -> None:
        """Start a step: all gradients and notes to zero, in place."""
        for buffer in self.buffers:
            buffer.zero_()
        self._missing = [len(group) for group in self.groups]

    def wait(self) -> None:
        """Until the sums over all ranks are in the parameters' gradients and in the notes."""
        with self._world.waiting():
            for number, (handle, sent) in self._handles.items():
                _hvd().synchronize(handle)
                if self._compresses:
                    self.buffers[number].copy_(sent).div_(self._world.size)
            if self._adasum:
                self.notes.copy_(self._world.sum(self.notes))
        self._handles.clear()


def _split(tensors: list[Tensors], room: int) -> list[list[Tensors]]:
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
    return f" (rank {_rank()} on {socket.gethostname()})" if _is_parallel() else ""


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
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    if _under_mpi():
        from mpi4py import MPI  # before Horovod, which would otherwise finalise MPI when the first rank leaves

        _hvd().init(comm=MPI.COMM_WORLD)
    else:
        os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
        hvd = _hvd()
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            del os.environ["HOROVOD_CYCLE_TIME"]  # with this and the threshold given, a second init would crash
            rendezvous.meet(again=False)
        hvd.init()


def _world(process: _Process) -> World:
    """This rank's place among the others: its device and its share of the node's cores. Collective."""
    world = _place(process)
    places = [place for place in world.gather(_Place.of(world.device)) if place.host == socket.gethostname()]
    world.together(lambda: _check_places(world, places))
    own = frozenset(os.sched_getaffinity(0))
    sharing = sum(1 for place in places if place.cores & own)
    threads = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or max(1, len(own) // sharing))
    torch.set_num_threads(threads)
    _keep_freed_memory()
    return replace(world, threads=threads)


def _place(process: _Process) -> World:
    hvd = _hvd()
    local_rank, device = hvd.local_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    return World(hvd.rank(), hvd.size(), local_rank, hvd.local_size(), device, threads=1, _process=process)


@dataclass(frozen=True)
class _Place:
    """Where a rank runs: its host, the cores it may use, its GPU."""

    host: str
    cores: frozenset[int]
    gpu: str | None

    @staticmethod
    def of(device: torch.device) -> _Place:
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        return _Place(socket.gethostname(), frozenset(os.sched_getaffinity(0)), gpu)


def _check_places(world: World, places: list[_Place]) -> None:
    """Refuse ranks that share a GPU or do not see each other; name cores that mpirun leaves idle."""
    gpus = {place.gpu for place in places}
    if None not in gpus and len(gpus) < len(places):
        raise UserError(
            f"{len(places)} ranks on the {len(gpus)} GPUs of {places[0].host}: start one rank per GPU, "
            f"or set CUDA_VISIBLE_DEVICES= to train on its cores"
        )
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if world.size == 1 and int(tasks) > 1 and not _under_mpi():
        raise UserError(f"srun started {tasks} tasks that do not see each other: use srun --mpi=pmix, or mpirun")
    used, there = len(frozenset().union(*(p.cores for p in places))), len(os.sched_getaffinity(os.getppid()))
    if world.is_main and _under_mpi() and used < there:
        _say(
            f"warning: mpirun bound this node's {len(places)} ranks to {used} of {there} cores: give it --bind-to none"
        )


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
    if not _under_mpi():
        return "no MPI in this job"
    from mpi4py import MPI

    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(name.lower() for name in names if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def launched() -> tuple[int, int]:
    """(rank, ranks) by the launcher's word, before the job is joined; srun's counts where no MPI's is there."""
    known = any(v in os.environ for v in ("HOROVOD_RANK", *RANK_VARIABLES))
    rank = _rank() if known else int(os.environ.get("SLURM_PROCID", 0))
    sizes = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return rank, next((int(os.environ[v]) for v in sizes if v in os.environ), 1)


def forget_launcher() -> None:
    """This process, and those that it starts, are no ranks of a job that it was launched in, nor bound as such."""
    if not _is_parallel():
        return
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    for variable in filter(LAUNCHER_VARIABLES.match, list(os.environ)):
        del os.environ[variable]


def _loaded_mpi() -> set[str]:
    """Paths of the MPI libraries in this process."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in paths if re.search(r"/libmpi(ch)?\.so", path)}


def _keep_freed_memory() -> None:
    """Stop glibc from returning every large activation to the system, only to fault its pages in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # glibc before 2.35 takes less
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _say(text: str) -> None:
    """A message on standard error in one write, which launchers that label each rank's words keep together."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _hvd() -> Any:
    import horovod.torch

    return horovod.torch


def _under_mpi() -> bool:
    return "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ and any(v in os.environ for v in RANK_VARIABLES)


def _is_parallel() -> bool:
    return "HOROVOD_SIZE" in os.environ or any(v in os.environ for v in RANK_VARIABLES)


def _rank() -> int:
    if "horovod.torch" in sys.modules and _hvd().is_initialized():
        return int(_hvd().rank())
    return int(next((os.environ[v] for v in ("HOROVOD_RANK", *RANK_VARIABLES) if v in os.environ), 0))


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
    if _under_mpi():
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(status)
    os._exit(status)
