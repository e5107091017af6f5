"""launch/mpirun.sh and launch/horovodrun.sh over three hosts, and what goes wrong there (elastic.sh: test_elastic)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.parallel.conftest import small, summary
from tests.parallel.test_failures import errors
from tests.system.conftest import Launch
from tests.system.hosts import GREETING, Host
from tests.waiting import now, side_by_side

ALL = "a:1,b:1,c:1"


@pytest.mark.parametrize(
    ("script", "options", "environment"),
    [
        ("mpirun", ("--interface", "eth0"), {}),
        ("horovodrun", (), {}),
        ("horovodrun", ("--interface", "eth0"), {"HOROVOD_CONTROLLER": "gloo"}),
    ],
)
def test_training_over_three_hosts(
    launch: Launch, data: Path, tmp_path: Path, script: str, options: tuple[str, ...], environment: dict[str, str]
) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("# ours\na slots=1\nb slots=1\n\nc:1\n")
    run_dir = tmp_path / "run"
    flags = small(data, run_dir, train__epochs=1)
    job = launch(script, "--hostfile", hosts, *options, "train", *flags, **environment)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "world        3 ranks (1 on this node)" in job.stdout
    assert summary(run_dir)["world_size"] == 3


COUNTED = """#!/bin/sh
touch "$0.${HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}-of-${HOROVOD_SIZE:-$OMPI_COMM_WORLD_SIZE}"
"""


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_fewer_ranks_than_slots(launch: Launch, tmp_path: Path, controller: str) -> None:
    for ranks in (1, 2):
        program = tmp_path / str(ranks)
        program.write_text(COUNTED)
        program.chmod(0o755)
        words = ("--hosts", ALL, "--np", ranks, "--interface", "eth0", program)
        job = launch("horovodrun", *words, HOROVOD_CONTROLLER=controller)
        assert job.returncode == 0, job.stdout + job.stderr
        started = {path.suffix for path in tmp_path.glob(f"{ranks}.*")}
        assert started == {f".{rank}-of-{ranks}" for rank in range(ranks)}


def test_the_doctor_over_three_hosts_that_greet(launch: Launch) -> None:
    job = launch("mpirun", "--hosts", ALL, "doctor", SSH_LOG_LEVEL="INFO")
    assert job.returncode == 0, job.stdout + job.stderr
    ranks = [line.split()[1] for line in job.stdout.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    assert ranks == list("abc")
    assert GREETING in job.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hosts", ""), "no host in --hosts: write name:slots, or in a file: name slots=N"),
        (("--hosts", "a:1,b:none"), "'b:none' is no host: write name:slots, or in a file: name slots=N"),
        (("--hosts", "a:1,a:1"), "host a is named twice"),
        (("--hosts", ALL, "--np", "4"), f"--np 4 is more than the 3 slots of {ALL}"),
        (("--hosts", "a:1,nowhere:1"), "host nowhere cannot be reached by ssh: "),
        (("--hosts", ALL, "--interface", "ib7"), "has no network interface ib7, only eth0 lo"),
        (("--hostfile", "/nowhere.txt"), "--hostfile /nowhere.txt cannot be read"),
        (("--hostfile", "/dev/null"), "no host in --hostfile /dev/null: "),
    ],
)
def test_bad_hosts(launch: Launch, options: tuple[str, ...], message: str) -> None:
    began = now()
    scripts = [partial(launch, script, *options, "doctor") for script in ("mpirun", "horovodrun", "elastic")]
    for job in side_by_side(scripts, at_once=3):
        assert job.returncode == 2
        assert job.stdout == ""
        assert len(job.stderr.splitlines()) == 1
        assert message in job.stderr
    assert began.unhindered() < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--interface: which one do the hosts share? Here are: eth0 lo"),
        (("--min-np", "4"), "--min-np 4, --np 3: give the least first, the most last"),
        (("--max-np", "2"), "--min-np 1, --np 3 and --max-np 2: give the least first, the most last"),
        (("--min-np", "some"), "--min-np needs a number of ranks"),
    ],
)
def test_bad_elastic_options(launch: Launch, options: tuple[str, ...], message: str) -> None:
    job = launch("elastic", "--hosts", ALL, *options, "doctor")
    assert job.returncode == 2
    assert job.stderr == f"error: {message}\n"


@pytest.mark.parametrize("script", ["mpirun", "horovodrun"])
def test_data_missing_on_one_host(
    launch: Launch, hosts: dict[str, Host], data: Path, tmp_path: Path, script: str
) -> None:
    assert hosts["b"].run(["mount", "-t", "tmpfs", "none", str(data)]).returncode == 0
    try:
        began = now()
        job = launch(script, "--hosts", "a:1,b:1", "train", *small(data, tmp_path / "run"))
        assert began.unhindered() < 30
    finally:
        hosts["b"].run(["umount", str(data)])
    assert job.returncode == 2
    (error,) = errors(job)
    assert str(data) in error
    assert error.endswith("(on rank 1 of 2, b)")


def test_run_folder_unwritable_on_the_first_host(launch: Launch, data: Path) -> None:
    began = now()
    job = launch("mpirun", "--hosts", "a:1,b:1", "train", *small(data, Path("/proc/run")))
    assert began.unhindered() < 30
    assert job.returncode == 2
    (error,) = errors(job)
    assert "run.dir /proc/run: " in error
