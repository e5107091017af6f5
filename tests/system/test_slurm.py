"""launch/slurm/*.sbatch in a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.conftest import events, small, summary
from tests.system.conftest import need
from tests.system.hosts import Host
from tests.system.slurm import Slurm, cluster

TRAIN = "launch/slurm/train.sbatch"
SLOW = """
import time
from hvd_eurosat.training.step import Step
prepare = Step._prepare
Step._prepare = lambda *arguments: time.sleep(0.5) or prepare(*arguments)
"""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def slurm(hosts: dict[str, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("slurmctld", "munged")
    path = f"{next(tmp_path_factory.getbasetemp().glob('hosts*')) / 'bin'}:{os.environ['PATH']}"
    with cluster(hosts, tmp_path_factory.mktemp("slurm"), PATH=path, OMP_NUM_THREADS="1") as started:
        yield started


def output(tmp_path: Path) -> str:
    return (tmp_path / "job.out").read_text()


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "srun"])
def test_training_on_two_nodes(slurm: Slurm, data: Path, tmp_path: Path, launcher: str) -> None:
    flags = small(data, tmp_path / "run", train__epochs=1)
    options = (*TWO_NODES, f"--output={tmp_path}/job.out", f"--export=ALL,LAUNCHER={launcher},LOCAL_DIR={tmp_path}")
    job = slurm.wait(slurm.submit(*options, TRAIN, *flags), 180)
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    assert job["NodeList"] in ("a,b", "a[b]", "[a-b]")
    assert "2 ranks (1 on this node)" in output(tmp_path)
    assert summary(tmp_path / "run")["world_size"] == 2
    assert list(tmp_path.glob("hvd_eurosat-*/*.npy"))


def test_an_elastic_job(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    words = ("launch/elastic.sh", "--interface", "eth0", "train", *small(data, tmp_path / "run", train__epochs=1))
    options = (*TWO_NODES, "--no-kill", f"--output={tmp_path}/job.out")
    job = slurm.wait(slurm.submit(*options, "--wrap", shlex.join(words)), 180)
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    assert summary(tmp_path / "run")["world_size"] == 2


def test_an_array_of_seeds(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    options = ("--array=3", "--ntasks-per-node=1", f"--output={tmp_path}/job.out")
    number = slurm.submit(*options, "launch/slurm/array.sbatch", *small(data, tmp_path / "run", train__epochs=1))
    assert slurm.wait(f"{number}_3", 120)["JobState"] == "COMPLETED", output(tmp_path)
    assert "seed = 3" in (tmp_path / "run" / "config.toml").read_text()


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(e["event"], e["epoch"], e["loss"], e["accuracy"]) for k in ("train", "valid") for e in events(run_dir, k)]


def test_signalled_before_the_time_limit_saved_requeued_finished(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """Also a run that was begun anew. Slurm looks at its clock twice a minute: the signal comes after 25 to 55 s."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)

    def submit(name: str, *options: str) -> str:
        flags = small(data, tmp_path / name, train__epochs=30, run__resume="never")
        environment = f"--export=ALL,PYTHONPATH={tmp_path}"
        return slurm.submit(*TWO_NODES, *options, environment, f"--output={tmp_path}/job.out", TRAIN, *flags)

    whole, cut = submit("whole"), submit("cut", "--time=1", "--signal=B:USR1@5")
    assert slurm.wait(whole, 400)["JobState"] == "COMPLETED", output(tmp_path)
    job = slurm.wait(cut, 400)
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    assert int(job["Restarts"]) >= 1
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "srun"])
def test_signalled_before_its_ranks_listen_requeued_finished(
    slurm: Slurm, hosts: dict[str, Host], data: Path, tmp_path: Path, launcher: str
) -> None:
    options = (*TWO_NODES, f"--output={tmp_path}/job.out", f"--export=ALL,LAUNCHER={launcher}")
    number = slurm.submit(*options, TRAIN, *small(data, tmp_path / "run", train__epochs=1))
    deadline = time.monotonic() + 60
    while not any("/bin/python -m hvd_eurosat.train" in words for words in hosts["b"].processes()):
        assert time.monotonic() < deadline, output(tmp_path)
        time.sleep(0.05)
    assert slurm.run("scancel", "--batch", "--signal=USR1", number).returncode == 0
    job = slurm.wait(number, 180)
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    assert job["Restarts"] == "1"
    assert "stopped on request" not in output(tmp_path)
    assert summary(tmp_path / "run")["world_size"] == 2


def test_bad_jobs(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    refused = slurm.run("sbatch", "--partition=nope", TRAIN)
    assert refused.returncode != 0
    assert "invalid partition specified: nope" in refused.stderr
    options = (*TWO_NODES, f"--output={tmp_path}/job.out")
    job = slurm.wait(slurm.submit(*options, TRAIN, *small(Path("/nowhere"), tmp_path / "run")), 60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert output(tmp_path).count("error: ") == 1
    assert "no data at /nowhere" in output(tmp_path)
    job = slurm.wait(slurm.submit("--export=ALL,LAUNCHER=nope", *options, TRAIN), 60)
    assert job["ExitCode"] == "2:0"
    assert "error: LAUNCHER is mpirun, horovodrun or srun, not 'nope'" in output(tmp_path)
    job = slurm.wait(slurm.submit("--export=ALL,LAUNCHER=horovodrun,HOROVOD_CONTROLLER=gloo", *options, TRAIN), 60)
    assert job["ExitCode"] == "2:0"
    assert "error: horovodrun over Gloo does not wait until its ranks have saved" in output(tmp_path)


def test_ranks_of_srun_without_pmix(slurm: Slurm) -> None:
    words = ("srun", "--ntasks=2", "--nodes=2", ".venv/bin/python", "-m", "hvd_eurosat.doctor", "--json")
    job = slurm.run(*words)
    assert job.returncode != 0
    found = json.loads(job.stdout)
    assert any("2 ranks, which do not see each other" in finding["what"] for finding in found["findings"]), job.stdout
