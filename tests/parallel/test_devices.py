"""Jobs whose ranks have unlike devices, or meet the same error of a device, which are planted: said once."""

from __future__ import annotations

import socket

from hvd_eurosat.cluster.explanations import MORE
from tests.parallel.conftest import run, under
from tests.parallel.test_failures import errors

PROGRAM = """
import dataclasses, os
from horovod.common.exceptions import HorovodInternalError
from hvd_eurosat.cluster import job
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.config.schema import Config

def main(world, settings):
    raise HorovodInternalError("ncclCommInitRank failed: unhandled system error (run with NCCL_DEBUG=INFO for details)")
{plant}
job.run(lambda _: Config(), main)
"""
A_GPU_ON_RANK_1 = """
here = Place.of
gpu = {"gpu": "GPU-1", "card": "0:1:0"} if os.environ["OMPI_COMM_WORLD_RANK"] == "1" else {}
Place.of = staticmethod(lambda device: dataclasses.replace(here(device), **gpu))
"""


def test_an_error_of_all_ranks_is_said_once_in_its_own_words(warm: str) -> None:
    job = run(under("mpirun", 3, warm, "-c", PROGRAM.format(plant="")))
    assert job.returncode == 1
    where = f"(rank 0 on {socket.gethostname()})"
    assert errors(job) == [f"error: ncclCommInitRank failed: unhandled system error: {MORE} {where}"]


def test_ranks_with_and_without_a_gpu_are_refused(warm: str) -> None:
    job = run(under("mpirun", 2, warm, "-c", PROGRAM.format(plant=A_GPU_ON_RANK_1)))
    assert job.returncode == 2
    (said,) = errors(job)
    assert said.startswith(
        f"error: rank 0 ({socket.gethostname()}) of 2 has no GPU, which the others have: leave such "
    )
