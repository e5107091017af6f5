"""Faults that take root to plant: another MPI's library, hidden devices, a tiny /dev/shm, bridges, bound cores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.parallel.conftest import command, run
from tests.parallel.test_doctor import cure_of, report
from tests.system.conftest import Launch, need
from tests.system.hosts import Host
from tests.waiting import side_by_side

DOCTOR = (sys.executable, "-m", "hvd_eurosat.doctor", "--json")


def findings_after(plant: str, words: Sequence[str] = DOCTOR, **environment: str) -> list[dict[str, str]]:
    """What the doctor finds when `plant` was done by a shell in mounts of its own; /mnt is to plant in."""
    need("nsenter")
    job = run(["unshare", "--mount", "sh", "-ec", f'{plant}\nexec "$@"', "-", *words], **environment)
    assert job.returncode == 1, job.stdout + job.stderr
    return list(report(job)["findings"])


def test_mpi4py_with_the_library_of_another_mpi(tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/libmpich.so.12"), None)
    if library is None:
        pytest.fail("apt-get install --no-install-recommends libmpich12")
    (tmp_path / "libmpi.so.12").symlink_to(library)  # its name but on Debian
    findings = findings_after("", MPI4PY_LIBMPI="libmpi.so.12", LD_LIBRARY_PATH=str(tmp_path))
    cure = cure_of(findings, "mpi4py is of another MPI")
    assert cure.startswith("unset MPI4PY_LIBMPI and MPI4PY_MPIABI")


def test_a_container_with_tiny_shared_memory_and_hidden_gpus() -> None:
    plant = """
mount -t tmpfs -o size=64m none /mnt
mkdir /mnt/shm && cp -a /dev/null /dev/zero /dev/random /dev/urandom /mnt
mknod /mnt/nvidia0 c 195 0 && mknod /mnt/nvidia1 c 195 1
mount --move /mnt /dev
"""
    findings = findings_after(f"{plant}unset CUDA_VISIBLE_DEVICES")
    assert cure_of(findings, "/dev/shm has only 64 MiB").startswith("docker run --shm-size=1g")
    assert cure_of(findings, "2 NVIDIA devices here, of which torch sees 0").startswith("look at nvidia-smi")
    findings = findings_after(f"{plant}export CUDA_VISIBLE_DEVICES=1")
    assert cure_of(findings, "1 NVIDIA devices in CUDA_VISIBLE_DEVICES=1, of which torch sees 0").startswith("look")
    assert "NVIDIA" not in str(findings_after(plant)), "the tests hide GPUs on purpose"


def test_ranks_bound_to_the_same_core() -> None:
    job = command("mpirun", 2, "doctor", "--json")
    job[1:1] = ["--cpu-set", "0"]
    job[job.index("none")] = "core:overload-allowed"
    assert cure_of(findings_after("", job), "2 ranks share 1 of").startswith("mpirun --bind-to none")


def test_a_bridge_with_the_same_address_on_every_host(launch: Launch, hosts: dict[str, Host]) -> None:
    plant = "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up"
    try:
        for host in hosts.values():
            assert host.run(["sh", "-c", plant]).returncode == 0
        doctor = partial(launch, "mpirun", "--hosts", "a:1,b:1")
        jobs = (partial(doctor, "--interface", "eth0", "doctor", "--json"), partial(doctor, "doctor"))
        named, job = side_by_side(jobs, at_once=2)
    finally:
        for host in hosts.values():
            host.run(["ip", "link", "del", "docker0"])
    assert named.returncode == 0, "an interface was named"
    assert job.returncode == 1
    assert "could not join within 30 s. It has docker0 172.17.0.1 (bridge), eth0 10.77.0." in job.stderr
    assert "name the one that all hosts share, by launch/mpirun.sh --interface" in job.stderr
