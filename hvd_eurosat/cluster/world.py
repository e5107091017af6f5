"""The ranks of a job, as one of them sees them: who they are, and what they share.

It serves a single process, ranks started by an MPI launcher (mpirun, srun, horovodrun) and ranks of
`horovodrun --gloo` alike.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hvd_eurosat.cluster.backend import horovod
from hvd_eurosat.cluster.environment import is_parallel
from hvd_eurosat.cluster.watchdog import Watchdog
from hvd_eurosat.errors import UserError

T = TypeVar("T")
Tensors = TypeVar("Tensors", bound=Tensor)

BROADCAST_BYTES = 4 * 2**20
PULSE_SECONDS = 1.0


class SharedError(UserError):
    """An error that every rank raises at the same place, so that all can leave in good order."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Process:
    """What this process keeps, also while the world around it changes (elastic jobs)."""

    def __init__(self) -> None:
        self.watchdog = Watchdog()
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
    _process: Process = field(default_factory=Process, compare=False)

    @property
    def is_main(self) -> bool:
        """Rank 0 validates, saves and speaks."""
        return self.rank == 0

    def watch(self, seconds: float) -> None:
        """From here on this rank is ended after `seconds` without progress, and when its launcher dies."""
        name = f"rank {self.rank} of {self.size} ({socket.gethostname()})"
        patient = self.is_elastic and self.device.type == "cpu"  # NCCL may not tell a rank that the others are gone
        self._process.watchdog.start(seconds, name, is_parallel(), patient)

    def last_words(self, path: Path) -> None:
        """Where this rank's watchdog leaves why it ended it, as JSON; the words that are there first stay."""
        self._process.watchdog.last_words(str(path))

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
            lengths = horovod().allgather(torch.tensor([len(mine)]), name="gather.lengths")
            every = horovod().allgather(mine, name="gather")
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
                named = [(f"broadcast.{number}.{i}", m) for i, m in enumerate(group)]
                horovod().broadcast_parameters(named, root_rank=0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor. Collective."""
        if self.size == 1:
            return tensor.clone()
        with self.waiting():
            return cast(Tensor, horovod().allreduce(tensor, op=horovod().Sum))

    def start_sum(self, tensor: Tensor, name: str) -> int:
        """Begin to add up a tensor over all ranks, in place, while this one works on. Collective, known by `name`."""
        return cast(int, horovod().allreduce_async_(tensor, name=name, op=horovod().Sum))

    def finish_sum(self, handle: int) -> None:
        """Wait for what `start_sum` began."""
        with self.waiting():
            horovod().synchronize(handle)

    def stack(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [...], as one [size, ...]. Collective."""
        if self.size == 1:
            return tensor[None].clone()
        with self.waiting():
            return cast(Tensor, horovod().allgather(tensor[None]))

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
            handle = horovod().allreduce_async(torch.tensor([float(at_work)]), name="pulse", op=horovod().Sum)
            while not horovod().poll(handle):
                time.sleep(0.005)
            self._process.pulse_due = time.monotonic() + PULSE_SECONDS
            return bool(horovod().synchronize(handle) > 0)

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
