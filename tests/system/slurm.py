"""A Slurm of two nodes, on two of our hosts."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.parallel.conftest import wait_for
from tests.system.hosts import DYING_WITH_US, Host, Job

CONFIG = """
ClusterName=test
SlurmctldHost=a(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5,sched_interval=5
MpiDefault=none
LaunchParameters=use_interactive_step
GresTypes=gpu
ReturnToService=2
KillWait=10
OverTimeLimit=1
NodeName=a NodeAddr=10.77.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
NodeName=b NodeAddr=10.77.0.2 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=a,b Default=YES MaxTime=INFINITE State=UP
"""
CPUS = 8  # more than there are, for jobs that mostly wait
# A job that goes on has more names than these: SIGNALING while a signal is sent, COMPLETING, REQUEUED, ...
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class Slurm:
    """The controller on host a, whose commands these are."""

    def __init__(self, host: Host, folder: Path, environment: dict[str, str]) -> None:
        self._host = host
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object, typed: str = "") -> Job:
        """A finished command on host a, and what is typed into it."""
        return self._host.run([str(word) for word in words], typed=typed, **self.environment)

    def submit(self, *words: object) -> str:
        """The number of a new job."""
        done = self.run("sbatch", "--parsable", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol tells of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float = 600) -> dict[str, str]:
        """The job once it has ended."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                self.run("scancel", number)
                raise TimeoutError(f"job {number} is still {job['JobState']}: {job}")
            time.sleep(1)
        return job


@contextlib.contextmanager
def cluster(hosts: dict[str, Host], folder: Path, **environment: str) -> Iterator[Slurm]:
    """munged, slurmctld and two slurmd, in the foreground of processes that end with us."""
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, cpus=CPUS))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for number in range(2):
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
    for name in ("state", "spool-a", "spool-b", "tmp-a", "tmp-b"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log"}
    files |= {"pid-file": "munge.pid", "seed-file": "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
    daemons = [
        munged,
        hosts["a"].command(["slurmctld", "-D"]),
        hosts["a"].command(["slurmd", "-D", "-N", "a"]),
        hosts["b"].command(["slurmd", "-D", "-N", "b"]),
    ]
    variables = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    started = []
    try:
        for number, words in enumerate(daemons):
            with (folder / f"daemon-{number}.log").open("w") as log:
                started.append(subprocess.Popen([*DYING_WITH_US, *words], stdout=log, stderr=log, env=variables))
            wait_for((folder / "munge.socket").exists)
        slurm = Slurm(hosts["a"], folder, environment)
        _wait_until_idle(slurm)
        yield slurm
    finally:
        for name in ("a", "b"):
            hosts[name].kill_all()
        for process in started:
            process.terminate()
            process.wait(20)


def _wait_until_idle(slurm: Slurm) -> None:
    wait_for(lambda: slurm.run("sinfo", "--noheader", "--format=%D %t").stdout.strip() == "2 idle", 300)
