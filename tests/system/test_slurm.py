"""launch/slurm/*.sbatch in a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.parallel.conftest import events, small, summary, wait_for
from tests.system.conftest import need
from tests.system.hosts import Host
from tests.system.slurm import Slurm, cluster
from tests.waiting import side_by_side

pytestmark = pytest.mark.timeout(1200)  # of Slurm's minutes
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
    with cluster(hosts, tmp_path_factory.mktemp("slurm"), PATH=path, OMP_NUM_THREADS="1", SHELL="/bin/sh") as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: Slurm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder and the jobs of a run with a time limit and of one without, begun anew: minutes, beside the others.

    Slurm looks at its clock twice a minute: the signal comes after 25 to 55 s.
    """
    folder = tmp_path_factory.mktemp("limited")
    (folder / "sitecustomize.py").write_text(SLOW)

    def submit(name: str, *options: str) -> str:
        flags = small(data, folder / name, train__epochs=30, run__resume="never")
        environment = f"--export=ALL,PYTHONPATH={folder}"
        return slurm.submit(*TWO_NODES, *options, environment, f"--output={folder}/job.out", TRAIN, *flags)

    return folder, {"whole": submit("whole"), "cut": submit("cut", "--time=1", "--signal=B:USR1@5")}


def output(folder: Path) -> str:
    """What a job said so far, which writes there."""
    said = folder / "job.out"
    return said.read_text() if said.exists() else ""


# What a rank does before it listens to signals, for as long as this file is there. That on host a does not end by
# SIGUSR1: the launcher ends it, once the other is gone.
HELD = """
import pathlib, signal, socket, sys, time
if sys.orig_argv[1:3] == ["-m", "hvd_eurosat.train"]:
    if socket.gethostname() == "a":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    pathlib.Path(__file__).with_name(f"held-{socket.gethostname()}").touch()
    while pathlib.Path(__file__).exists():
        time.sleep(0.1)
"""


def ranks_of(run_dir: Path) -> set[int]:
    """Their process numbers."""
    commands = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return {
        pid for pid, words in commands.items() if words[1:3] == ["-m", "hvd_eurosat.train"] and str(run_dir) in words
    }


def test_training_on_two_nodes_signalled_before_its_ranks_listen_requeued_finished(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    """By each launcher, at once."""

    def finish(launcher: str) -> None:
        folder = tmp_path / launcher
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HELD)
        environment = f"--export=ALL,LAUNCHER={launcher},LOCAL_DIR={folder},PYTHONPATH={folder}"
        flags = small(data, folder / "run", train__epochs=1)
        number = slurm.submit(*TWO_NODES, f"--output={folder}/job.out", environment, TRAIN, *flags)
        wait_for(lambda: len(list(folder.glob("held-*"))) == 2, 300)
        held = ranks_of(folder / "run")
        assert slurm.run("scancel", "--batch", "--signal=USR1", number).returncode == 0
        wait_for(lambda: not held & ranks_of(folder / "run"), 300)
        (folder / "sitecustomize.py").unlink()
        job = slurm.wait(number)
        assert job["JobState"] == "COMPLETED", output(folder)
        assert job["Restarts"] == "1"
        assert job["NodeList"] in ("a,b", "a[b]", "[a-b]")
        assert "2 ranks (1 on this node)" in output(folder)
        assert "stopped on request" not in output(folder)
        assert summary(folder / "run")["world_size"] == 2
        assert list(folder.glob("hvd_eurosat-*/*.npy"))

    side_by_side([partial(finish, launcher) for launcher in ("mpirun", "horovodrun", "srun")], at_once=3)


# A tool that, once, signals the job's script before it does its work. srun waits until mpirun has ended: while mpirun
# lives, it would still start the ranks.
SIGNALLING = """#!/bin/sh
if mkdir "$0-signalled" 2>/dev/null; then
  script=$PPID
  until grep -q slurm_script "/proc/$script/cmdline"; do
    [ "$script" -gt 1 ] || exit 1
    script=$(cut -d ' ' -f 4 "/proc/$script/stat")
  done
  kill -USR1 "$script"
  [ "${0##*/}" != srun ] || while [ "$(cut -d ' ' -f 4 /proc/$$/stat)" = "$PPID" ]; do sleep 0.1; done
fi
exec %s "$@"
"""
READING_HOSTS = """
import subprocess, sys
if sys.orig_argv[1:3] == ["-m", "hvd_eurosat.cluster.hosts"]:
    subprocess.run(["true"], check=True)
"""


@pytest.mark.parametrize("tool", ["true", "srun"])
def test_signalled_before_its_ranks_are_started_requeued_finished(
    slurm: Slurm, data: Path, tmp_path: Path, tool: str
) -> None:
    """While the script reads its hosts, and while mpirun's helpers start."""
    (tmp_path / "sitecustomize.py").write_text(READING_HOSTS)
    (tmp_path / tool).write_text(SIGNALLING % shutil.which(tool))
    (tmp_path / tool).chmod(0o755)
    environment = f"--export=ALL,PYTHONPATH={tmp_path},PATH={tmp_path}:{slurm.environment['PATH']}"
    flags = small(data, tmp_path / "run", train__epochs=1)
    job = slurm.wait(slurm.submit(*TWO_NODES, f"--output={tmp_path}/job.out", environment, TRAIN, *flags))
    assert (tmp_path / f"{tool}-signalled").exists(), output(tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert summary(tmp_path / "run")["world_size"] == 2


def test_a_cancelled_job_does_not_come_back(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """srun's ranks hear of it, save, and end with 75 as at a time limit."""
    options = (*TWO_NODES, f"--output={tmp_path}/job.out", "--export=ALL,LAUNCHER=srun")
    number = slurm.submit(*options, TRAIN, *small(data, tmp_path / "run", train__epochs=3000))
    wait_for(lambda: "epoch 1/" in output(tmp_path), 300)
    assert slurm.run("scancel", number).returncode == 0
    assert slurm.wait(number, 60)["JobState"] == "CANCELLED"
    assert "stopped on request" in output(tmp_path)


COUNTED = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES" >"$0.$(hostname).$OMPI_COMM_WORLD_RANK-of-$OMPI_COMM_WORLD_SIZE"
"""
TWO_EACH = ["a.0-of-4", "a.1-of-4", "b.2-of-4", "b.3-of-4"]
BATCH: dict[str, tuple[tuple[str, ...], str, list[str]]] = {
    "tasks of each node": (("--ntasks-per-node=2",), "", TWO_EACH),
    "neither tasks nor GPUs": ((), "", ["a.0-of-2", "b.1-of-2"]),
    "GPUs of each node": (("--gpus-per-node=2",), "", TWO_EACH),
    "GPUs in all": (("--gpus=4", "--ntasks-per-node=2"), "", TWO_EACH),
    "GPUs for each task": (("--gpus-per-task=1", "--ntasks=4"), "", TWO_EACH),
    "tasks for each GPU": (("--gpus=4", "--ntasks-per-gpu=1"), "", TWO_EACH),
    "hosts of another shape": (
        ("--ntasks-per-node=1",),
        "--hosts localhost:2,b:1",
        ["a.0-of-3", "a.1-of-3", "b.2-of-3"],
    ),
    "fewer hosts": (("--ntasks-per-node=1",), "--hosts b:2", ["b.0-of-2", "b.1-of-2"]),
}
SHELLS = {
    "of srun": ("salloc", *TWO_NODES, "srun", *TWO_NODES, "sh", "-c", '[ "$SLURM_PROCID" = 1 ] || exec "$@"', "-"),
    "of salloc": ("salloc", *TWO_NODES),
}


def counted(folder: Path) -> tuple[Path, Path]:
    """A program whose ranks leave a file each, and its folder."""
    folder.mkdir()
    program = folder / "program"
    program.write_text(COUNTED)
    program.chmod(0o755)
    return program, folder


def ranks_in(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in folder.glob("program.*"))


def test_jobs_as_people_ask_for_them(slurm: Slurm, tmp_path: Path) -> None:
    numbers = {}
    for number, (name, (options, words, _)) in enumerate(BATCH.items()):
        program, folder = counted(tmp_path / str(number))
        wrapped = f"launch/mpirun.sh {words} {program}"
        numbers[name] = slurm.submit("--nodes=2", *options, f"--output={folder}/job.out", "--wrap", wrapped)
    for number, (name, (_, _, expected)) in enumerate(BATCH.items()):
        job = slurm.wait(numbers[name])
        assert job["JobState"] == "COMPLETED", (name, output(tmp_path / str(number)))
        assert ranks_in(tmp_path / str(number)) == expected, name
        if "GPU" in name and "neither" not in name:
            seen = {path.name: path.read_text() for path in (tmp_path / str(number)).glob("program.*")}
            assert set(seen.values()) == {"0,1\n"}, (name, seen)


def test_a_job_in_a_container_without_slurms_commands(
    slurm: Slurm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program, folder = counted(tmp_path / "job")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if tool.name not in ("srun", "scontrol"):
            (tools / tool.name).symlink_to(tool)
    ssh = next(tmp_path_factory.getbasetemp().glob("hosts*")) / "bin"
    wrapped = f"PATH={ssh}:{tools} launch/mpirun.sh {program}"
    job = slurm.wait(slurm.submit(*TWO_NODES, f"--output={folder}/job.out", "--wrap", wrapped))
    assert job["JobState"] == "COMPLETED", output(folder)
    assert ranks_in(folder) == ["a.0-of-2", "b.1-of-2"]


def test_shells_in_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    """Where mpirun's helpers run beside the step that the shell is."""
    program, folder = counted(tmp_path / "srun")
    job = slurm.run(*SHELLS["of srun"], "launch/mpirun.sh", program)
    assert ranks_in(folder) == ["a.0-of-2", "b.1-of-2"], job.stdout + job.stderr
    program, folder = counted(tmp_path / "salloc")
    job = slurm.run(*SHELLS["of salloc"], typed=f"launch/mpirun.sh {program}\nexit\n")
    assert ranks_in(folder) == ["a.0-of-2", "b.1-of-2"], job.stdout + job.stderr


def test_an_elastic_job(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    words = ("launch/elastic.sh", "--interface", "eth0", "train", *small(data, tmp_path / "run", train__epochs=1))
    options = (*TWO_NODES, "--no-kill", f"--output={tmp_path}/job.out")
    job = slurm.wait(slurm.submit(*options, "--wrap", shlex.join(words)))
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    assert summary(tmp_path / "run")["world_size"] == 2


def test_an_array_of_seeds(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    options = ("--array=3", "--ntasks-per-node=1", f"--output={tmp_path}/job.out")
    number = slurm.submit(*options, "launch/slurm/array.sbatch", *small(data, tmp_path / "run", train__epochs=1))
    assert slurm.wait(f"{number}_3")["JobState"] == "COMPLETED", output(tmp_path)
    assert "seed = 3" in (tmp_path / "run" / "config.toml").read_text()


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(e["event"], e["epoch"], e["loss"], e["accuracy"]) for k in ("train", "valid") for e in events(run_dir, k)]


def test_bad_jobs(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    refused = slurm.run("sbatch", "--partition=nope", TRAIN)
    assert refused.returncode != 0
    assert "invalid partition specified: nope" in refused.stderr
    flags = small(Path("/nowhere"), tmp_path / "run")
    gloo = "ALL,LAUNCHER=horovodrun,HOROVOD_CONTROLLER=gloo"
    bad = {
        "ALL": "no data at /nowhere",
        "ALL,LAUNCHER=nope": "LAUNCHER is mpirun, horovodrun or srun, not 'nope'",
        gloo: "horovodrun over Gloo does not wait until its ranks have saved",
    }
    numbers = {}
    for variables in bad:
        (tmp_path / variables).mkdir()
        options = (*TWO_NODES, f"--output={tmp_path / variables}/job.out", f"--export={variables}")
        numbers[variables] = slurm.submit(*options, TRAIN, *flags)
    for variables, message in bad.items():
        job = slurm.wait(numbers[variables])
        assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
        assert output(tmp_path / variables).count("error: ") == 1
        assert f"error: {message}" in output(tmp_path / variables)


def test_ranks_of_srun_without_pmix(slurm: Slurm) -> None:
    words = ("srun", "--ntasks=2", "--nodes=2", ".venv/bin/python", "-m", "hvd_eurosat.doctor", "--json")
    job = slurm.run(*words)
    assert job.returncode != 0
    found = json.loads(job.stdout)
    assert any("2 ranks, which do not see each other" in finding["what"] for finding in found["findings"]), job.stdout


def test_signalled_before_the_time_limit_saved_requeued_finished(
    slurm: Slurm, limited: tuple[Path, dict[str, str]]
) -> None:
    folder, numbers = limited
    jobs = {name: slurm.wait(number) for name, number in numbers.items()}
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}, output(folder)
    assert int(jobs["cut"]["Restarts"]) >= 1
    assert losses(folder / "cut") == losses(folder / "whole")
