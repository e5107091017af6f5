"""launch/*.sh and launch/slurm/*.sbatch with launchers that only note what they were told."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.conftest import warm as warm

ROOT = Path(__file__).parents[2]
TOOLS = (
    "awk",
    "basename",
    "bash",
    "cat",
    "dirname",
    "env",
    "grep",
    "head",
    "ls",
    "realpath",
    "sed",
    "sh",
    "tail",
    "tr",
)
NOTE = """#!/bin/sh
case "$*" in --version) echo "mpirun (Open MPI) ${MAJOR:-4}.1.8" && exit ;; esac
{ printf '%s\\n' "$(basename "$0")" "$@"; echo; env; } >"$NOTES"
"""
PYTHON = """#!/bin/sh
case $1 in -c) shift && exec "$(dirname "$0")/horovodrun" elastic "$@" ;; esac
exec {} "$@"
"""
Launch = Callable[..., "Done"]


class Done:
    """A script that has ended, and what its launcher was told."""

    def __init__(self, job: subprocess.CompletedProcess[str], notes: Path) -> None:
        self.status, self.errors = job.returncode, job.stderr
        words, _, variables = notes.read_text().partition("\n\n") if notes.exists() else ("", "", "")
        self.words = words.splitlines()
        self.variables = dict(line.partition("=")[::2] for line in variables.splitlines())
        notes.unlink(missing_ok=True)

    def told(self, option: str) -> str:
        """The word behind an option."""
        return self.words[self.words.index(option) + 1]


@pytest.fixture(scope="module")
def launch(warm: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """launch(script, *words, without=…, **variables): nothing else is in the environment, and no other tools."""
    folder = tmp_path_factory.mktemp("launchers")
    venv, tools = folder / "venv" / "bin", folder / "tools"
    for place in (venv, tools):
        place.mkdir(parents=True)
    for name in (*TOOLS, "timeout"):
        (tools / name).symlink_to(str(shutil.which(name)))
    stubs = {venv / name: NOTE for name in ("mpirun", "horovodrun")} | {venv / "python": PYTHON.format(warm)}
    stubs |= {tools / "srun": NOTE, tools / "scontrol": "#!/bin/sh\n"}
    stubs[tools / "ssh"] = '#!/bin/sh\n[ "$1" != -T ] || printf "hostname $3\\nport 22\\n"\n'
    for path, text in stubs.items():
        path.write_text(text)
        path.chmod(0o755)

    def run(script: str, *words: object, without: str = "", project: Path = ROOT, **variables: str) -> Done:
        kept = folder / f"without-{without}"
        if without and not kept.exists():
            shutil.copytree(tools, kept, symlinks=True, ignore=lambda *_: [without])
        environment = {"PATH": str(kept if without else tools), "SETUP_VENV": str(venv.parent), "HOME": str(folder)}
        environment |= {"NOTES": str(folder / "notes"), "PYTHONPATH": str(ROOT), **variables}
        command = ["bash", str(project / "launch" / script), *map(str, words)]
        job = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        return Done(job, folder / "notes")

    return run


SCRIPTS: list[tuple[str, ...]] = [
    ("mpirun.sh", "train"),
    ("mpirun.sh", "--np", "2", "train"),
    ("horovodrun.sh", "train"),
    ("elastic.sh", "--interface", "lo", "train"),
    ("slurm/train.sbatch", "--config", "recipes/quickstart.toml"),
    ("slurm/array.sbatch",),
]
VARIABLES: dict[str, tuple[str, ...]] = {
    "SLURM_JOB_ID": ("7",),
    "SLURM_JOBID": ("7",),
    "SLURM_JOB_NODELIST": ("n[1-2]", "n1"),
    "SLURM_NODELIST": ("n[1-2]",),
    "SLURM_NNODES": ("2",),
    "SLURM_NTASKS": ("2", "8"),
    "SLURM_NTASKS_PER_NODE": ("1", "4"),
    "SLURM_TASKS_PER_NODE": ("1(x2)", "4(x2)", "2,1", "4"),
    "SLURM_CPUS_PER_TASK": ("2",),
    "SLURM_GPUS_ON_NODE": ("0", "4"),
    "SLURM_GPUS_PER_NODE": ("4", "a100:4"),
    "SLURM_GPUS_PER_TASK": ("1",),
    "SLURM_GPUS": ("8", "3"),
    "CUDA_VISIBLE_DEVICES": ("0,1",),
    "SLURM_STEP_ID": ("0", "4294967290"),
    "SLURM_STEP_NODELIST": ("n1",),
    "SLURM_STEP_TASKS_PER_NODE": ("1",),
    "SLURM_SUBMIT_DIR": (str(ROOT),),
    "SLURM_RESTART_COUNT": ("0", "2"),
    "SLURM_ARRAY_TASK_ID": ("3",),
    "SLURM_PROCID": ("0",),
    "LAUNCHER": ("mpirun", "horovodrun", "srun"),
    "INTERFACE": ("lo",),
    "LOCAL_DIR": ("/tmp",),
}


def mixes(count: int) -> list[dict[str, str]]:
    """No variable, each with a job's number and nodes, and `count` mixes at random, the empty ones too."""
    dice = random.Random(0)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    alone = [{**job, name: values[0]} for name, values in VARIABLES.items()]
    drawn = []
    for _ in range(count):
        some = dice.sample(sorted(VARIABLES), dice.randint(4, len(VARIABLES)))
        drawn.append({name: dice.choice((*VARIABLES[name], *VARIABLES[name], "")) for name in some})
    return [{}, *alone, *drawn]


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.long)])
def test_no_mix_of_variables_is_unbound(launch: Launch, count: int) -> None:
    """A script under a mix of Slurm's variables starts its launcher, or says in one line what is missing."""
    started = 0
    for number, mix in enumerate(mixes(count)):
        script = SCRIPTS[number % len(SCRIPTS)]
        done = launch(*script, **mix)
        assert "unbound variable" not in done.errors, (script, mix)
        assert done.status in (0, 2), (script, mix, done.errors)
        assert bool(done.words) == (done.status == 0), (script, mix, done.errors)
        assert done.errors.count("error: ") == (done.status == 2), (script, mix, done.errors)
        started += done.status == 0
    assert started > 15, "some are whole"


TWO_NODES = {"SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}


def test_mpirun_in_slurm_takes_the_gpus_of_the_nodes(launch: Launch) -> None:
    done = launch("mpirun.sh", "train", **TWO_NODES, SLURM_GPUS_ON_NODE="4", SLURM_GPUS_PER_TASK="1")
    assert (done.told("-np"), done.told("-H")) == ("8", "n1:4,n2:4")
    slurm = {name: value for name, value in done.variables.items() if name.startswith("SLURM_")}
    told = {"SLURM_NODELIST": "n1,n2", "SLURM_TASKS_PER_NODE": "4,4", "SLURM_OVERLAP": "1", "SLURM_JOBID": "7"}
    told |= {"SLURM_GPUS_PER_NODE": "4"}
    assert {name: slurm.get(name) for name in told} == told
    assert "SLURM_GPUS_PER_TASK" not in slurm, "of which mpirun's helper on a node would have one GPU for all its ranks"


@pytest.mark.parametrize("slurm", [{}, TWO_NODES])
def test_the_numbers_of_gpus_are_each_nodes_own(launch: Launch, slurm: dict[str, str]) -> None:
    done = launch("mpirun.sh", "--hosts", "n1:1,n2:1", "train", **slurm, CUDA_VISIBLE_DEVICES="2,3", NCCL_DEBUG="INFO")
    assert "NCCL_DEBUG" in done.words
    assert "CUDA_VISIBLE_DEVICES" not in done.words


CARRIED = {
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "CUDA_HOME",
    "NCCL_DEBUG",
    "HOROVOD_CYCLE_TIME",
    "HVD_EUROSAT_TRAIN__EPOCHS",
    "OMP_NUM_THREADS",
    "MPI4PY_LIBMPI",
    "UCX_TLS",
    "TORCH_HOME",
    "XDG_CACHE_HOME",
}


def test_mpirun_carries_what_ranks_and_their_libraries_read(launch: Launch) -> None:
    given = dict.fromkeys(CARRIED - {"PATH", "PYTHONPATH"}, "4")
    done = launch("mpirun.sh", "--np", "2", "train", **given, SECRET_OF_MINE="4")
    assert {name for before, name in itertools.pairwise(done.words) if before == "-x"} == CARRIED


def test_hosts_in_a_job_of_another_shape(launch: Launch) -> None:
    done = launch("mpirun.sh", "--hosts", "n2:3", "train", **TWO_NODES, SLURM_NTASKS="2")
    assert (done.told("-np"), done.told("-H")) == ("3", "n2:3")
    assert (done.variables["SLURM_NODELIST"], done.variables["SLURM_TASKS_PER_NODE"]) == ("n1,n2", "1,3")
    shell = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n2", "SLURM_STEP_TASKS_PER_NODE": "1"}
    done = launch("mpirun.sh", "train", **{**TWO_NODES, **shell, "SLURM_NODELIST": "n2"})
    assert (done.told("-H"), done.variables["SLURM_NODELIST"]) == ("n2:1", "n1,n2"), "or its helpers start anywhere"


def test_a_container_without_slurms_commands(launch: Launch) -> None:
    """mpirun goes by ssh, and knows nothing of Slurm, whose commands it would call."""
    done = launch("mpirun.sh", "train", without="srun", **TWO_NODES, SLURM_NTASKS="2")
    assert done.told("-H") == "n1:1,n2:1"
    assert "SLURM_JOBID" not in done.variables


def test_srun_starts_what_was_counted(launch: Launch) -> None:
    done = launch("slurm/train.sbatch", **TWO_NODES, SLURM_GPUS_ON_NODE="4", LAUNCHER="srun")
    assert done.words[0] == "srun"
    assert {"--ntasks=8", "--ntasks-per-node=4", "--mpi=pmix"} <= set(done.words)
    done = launch("slurm/train.sbatch", **{**TWO_NODES, "SLURM_TASKS_PER_NODE": "2,1"}, LAUNCHER="srun")
    assert "--ntasks=3" in done.words
    assert "--ntasks-per-node" not in " ".join(done.words)


def test_gpus_that_would_idle(launch: Launch) -> None:
    for launcher in ("mpirun", "srun"):
        more = {"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "8", "LAUNCHER": launcher}
        done = launch("slurm/train.sbatch", **TWO_NODES, **more)
        assert done.status == 2
        assert done.errors.startswith("error: 8 GPUs on a node, and tasks for 1 of them")


def test_a_sites_own_settings_may_use_what_is_not_set(launch: Launch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("site.env"))
    (tmp_path / "launch" / "slurm" / "site.env").write_text("PATH=$PATH$MODULEPATH_OF_NOBODY\nLAUNCHER=srun\n")
    done = launch("slurm/train.sbatch", project=tmp_path, **TWO_NODES)
    assert done.words[:1] == ["srun"], done.errors


@pytest.mark.parametrize("major", ["4", "5"])
def test_full_names_stay_whole(launch: Launch, major: str) -> None:
    names = {"4": "orte_keep_fqdn_hostnames", "5": "prte_keep_fqdn_hostnames"}
    done = launch("mpirun.sh", "--hosts", "a.x.invalid:1,a.y.invalid:1", "train", MAJOR=major)
    assert done.told(names[major]) == "1"
    done = launch("mpirun.sh", "--hosts", "a.x.invalid:1,b.x.invalid:1", "train", MAJOR=major)
    assert names[major] not in done.words


def test_horovodrun_keeps_full_names(launch: Launch) -> None:
    done = launch("horovodrun.sh", "--hosts", "a.x.invalid:1,a.y.invalid:1", "train")
    (options,) = [word for word in done.words if word.startswith("--mpi-args=")]
    assert "-mca orte_keep_fqdn_hostnames 1" in options


@pytest.mark.parametrize(("ranks", "elsewhere"), [(1, False), (2, True)])
def test_horovodrun_on_this_host_alone(launch: Launch, ranks: int, elsewhere: bool) -> None:
    """There it refuses every interface but lo; over Gloo it has no more hosts than ranks need."""
    words = ("--hosts", "localhost:1,b:1", "--np", ranks, "--interface", "lo", "train")
    done = launch("horovodrun.sh", *words, HOROVOD_CONTROLLER="gloo")
    assert ("--network-interfaces" in done.words) == elsewhere, done.errors


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_a_nodefile_is_found(launch: Launch, tmp_path: Path, script: str) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    done = launch(script, "train", PBS_NODEFILE=str(tmp_path / "nodes"))
    assert (done.told("-np"), done.told("-H")) == ("3", "n1:2,n2:1")


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "elastic.sh"])
def test_a_line_that_is_not_understood(launch: Launch, tmp_path: Path, script: str) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 gpus=2\n")
    done = launch(script, "--hostfile", tmp_path / "hosts", "train")
    assert (done.status, done.words) == (2, [])
    assert done.errors.startswith(f"error: --hostfile {tmp_path}/hosts, line 2: 'gpus=2' is nothing that is known of")


def test_discovery_knows_this_host_by_any_name(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 slots = 2\n")
    command = [str(ROOT / "launch" / "elastic" / "discover.sh"), "--hostfile", str(tmp_path / "hosts")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SETUP_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "localhost:2\n"
