"""What the launch scripts and make do about GPUs: programs that only note how they were called stand in for mpirun and
srun."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
case $1 in --version) echo "mpirun (Open MPI) 4.1.8"; exit;; esac
printf '%s\\n' "$0" "$@" > {folder}/called
env > {folder}/environment
"""
PER_TASK = {
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1",
    "SLURM_GPU_BIND": "single:1",
    "SLURM_TRES_BIND": "gres/gpu:single:1",
    "SLURM_CPUS_PER_TASK": "8",
    "SRUN_CPUS_PER_TASK": "8",
}

TORCH = "cuda = type('cuda', (), {'is_available': lambda: GPUS > 0, 'device_count': lambda: GPUS})\n"  # enough of it

Start = Callable[..., tuple[list[str], dict[str, str]]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(script, *arguments, **variables): the words that its launcher was called with, and its environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stubs = {name: STUB.format(folder=tmp_path) for name in ("mpirun", "srun")}
    stubs |= {"python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "ssh": "#!/bin/sh\n"}
    stubs |= {"scontrol": "#!/bin/sh\nprintf 'a\\nb\\n'\n"}
    for name, text in stubs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run(script: str, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CUDA_"))}
        path = f"{folder}:{inherited['PATH']}"
        environment = {**inherited, "PATH": path, "SETUP_VENV": str(tmp_path), **variables}
        subprocess.run(["bash", script, *arguments], cwd=ROOT, env=environment, check=True)
        seen = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
        return (tmp_path / "called").read_text().splitlines(), seen

    return run


def test_as_many_ranks_as_the_machine_is_for(start: Start) -> None:
    words, _ = start("launch/mpirun.sh", "train", CUDA_VISIBLE_DEVICES="")
    assert words[words.index("-np") + 1] == "2"
    assert words[words.index("-H") + 1] == "localhost:2"


@pytest.mark.parametrize(
    ("hosts", "chosen", "forwarded"),
    [("localhost:2", "0,1", True), ("a:2,b:2", "0,1", False), ("a:2,b:2", "", True)],
)
def test_which_gpus_are_free_here_says_nothing_of_other_hosts(
    start: Start, hosts: str, chosen: str, forwarded: bool
) -> None:
    words, _ = start("launch/mpirun.sh", "--hosts", hosts, "train", CUDA_VISIBLE_DEVICES=chosen, CUDA_HOME="/cuda")
    exported = [word for before, word in itertools.pairwise(words) if before == "-x"]
    assert ("CUDA_VISIBLE_DEVICES" in exported) == forwarded
    assert "CUDA_HOME" in exported


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
@pytest.mark.parametrize("per_task", [PER_TASK, {}])
def test_every_rank_sees_all_gpus_of_its_node(start: Start, launcher: str, per_task: dict[str, str]) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "a,b", "SLURM_GPUS_ON_NODE": "2"}
    tasks = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
    words, seen = start("launch/slurm/train.sbatch", LAUNCHER=launcher, **job, **tasks, **per_task)
    assert not seen.keys() & PER_TASK.keys()
    assert Path(words[0]).name == launcher
    if launcher == "srun":
        assert {"--gpu-bind=none", "--kill-on-bad-exit=1"} <= set(words)
        assert ("--cpus-per-task=8" in words) == bool(per_task)


@pytest.mark.parametrize(
    ("gpus", "given", "ranks"), [(0, (), 2), (1, (), 1), (8, (), 8), (8, ("NP=4",), 4), (1, ("NP=2",), 2)]
)
def test_ranks_of_make(tmp_path: Path, gpus: int, given: tuple[str, ...], ranks: int) -> None:
    """With a torch that sees so many GPUs. A projection takes two ranks: with one, `make bench` does without."""
    (tmp_path / "torch.py").write_text(f"GPUS = {gpus}\n{TORCH}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    theirs = ("MAKE", "MFLAGS", "NP", "DATA", "RECIPE", "ARGS")  # of a make that runs these tests
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    words = ["make", "-n", "train", "bench", f"SETUP_VENV={tmp_path}", *given]
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"mpirun -np (\S+) .* -m hvd_eurosat\.(train|benchmark step)", said) == [
        (str(ranks), "train"),
        (str(ranks), "benchmark step"),
    ]
    measured = re.findall(r"hvd_eurosat\.benchmark (\w+)", said)
    assert measured == ["step", "scaling", *(["project"] if ranks > 1 else []), "memory"]
    assert ("no projection" in said) == (ranks == 1)
