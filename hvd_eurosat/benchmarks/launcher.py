"""Starts the jobs that a subcommand measures, and collects what their ranks wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_eurosat.benchmarks.settings import StepSettings
from hvd_eurosat.cluster import environment
from hvd_eurosat.cluster.hostlist import parse
from hvd_eurosat.cluster.hosts import is_here
from hvd_eurosat.config.schema import ENV_PREFIX
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.run.status import read_status
from hvd_eurosat.training.files import make_folder, write_text

LAUNCH = Path(__file__).parents[2] / "launch"
RANK_LABEL = re.compile(r"^\[\d+\]<stderr>:\s*")  # horovodrun's
ALONE = ("gpu_job", "train")  # a process by itself, which no launcher starts
Results = list[dict[str, Any]]


@dataclass
class Launcher:
    """Jobs of one configuration, on this machine or on hosts.

    cores: of a machine; launched: ranks that the benchmark itself was started with; slots: of each host, if any; gloo:
    ranks meet over Gloo, as they do where HOROVOD_CONTROLLER says so, and not over MPI; precision: of all jobs of ours,
    the one that the first job chose.
    """

    settings: StepSettings
    recipe: Path
    cores: int
    launched: int
    slots: tuple[int, ...]
    gloo: bool
    precision: str

    @staticmethod
    def of(settings: StepSettings) -> Launcher:
        """Makes the folder of the results, with the configuration in it. Bad data raise UserError at once."""
        if not (LAUNCH / "mpirun.sh").exists():
            raise UserError(f"benchmark starts its jobs by {LAUNCH}, which is not there: use a clone of the project")
        open_tree(settings.data.root)
        gloo = os.environ.get("HOROVOD_CONTROLLER") == "gloo"
        _, launched = environment.launched()
        environment.forget_launcher()
        make_folder(settings.folder, "run.dir")
        recipe = settings.folder / "benchmark.toml"
        write_text(recipe, settings.training().to_toml())
        hosts = parse(settings.hosts, "--hosts", is_here) if settings.hosts else []
        cores, slots = len(os.sched_getaffinity(0)), tuple(host.slots for host in hosts)
        return Launcher(settings, recipe, cores, launched, slots, gloo, settings.train.precision)

    @property
    def ranks(self) -> int:
        """As many as the hosts have slots, or as the benchmark was started with."""
        return sum(self.slots) or self.launched

    def threads(self, ranks: int) -> int:
        """Of each of so many ranks that share out a machine's cores: OMP_NUM_THREADS, where it is set, as for train."""
        return environment.omp_threads() or max(1, self.cores // ranks)

    @property
    def gpus(self) -> int:
        """Of this machine, that the jobs may use."""
        from hvd_eurosat.cluster.device import visible  # which imports torch: seconds, which --help does not take

        return 0 if self.settings.train.device == "cpu" else visible()[0]

    @property
    def places(self) -> int:
        """Slots of the hosts, or GPUs: no two ranks share one. 0 where there are only cores, which they can share."""
        return sum(self.slots) or self.gpus

    def room(self, cores: int) -> int:
        """How many ranks there is room for when each has so many cores, or a place. Raises UserError."""
        if not self.places and cores > self.cores:
            raise UserError(f"--cores {cores}: this machine has {self.cores}, give so many or fewer")
        return self.places or self.cores // cores

    def allows(self, ranks: int) -> bool:
        """Whether a job may have so many."""
        return not self.places or ranks <= self.places

    def ours(self, ranks: int, steps: int, threads: int, **keys: object) -> Results:
        """What each rank of a job of ours measured."""
        return self.measured("job", ranks, steps, threads, keys)

    def measured(self, module: str, ranks: int, steps: int, threads: int, keys: Mapping[str, object]) -> Results:
        """What each rank of a job of this module measured."""
        flags = [f"--{key}={value}" for key, value in {"train.precision": self.precision, **keys}.items()]
        found = self._run(module, ranks, threads, ["--config", self.recipe, f"--steps={steps}", *flags])
        self.precision = found[0]["precision"]
        return found

    def alone(self, ranks: int, steps: int, cores: int) -> Results:
        """What independent jobs of one rank measured, side by side; of GPUs, which share nothing, one does for all."""
        beside = 1 if self.gpus else ranks
        return self.ours(beside, steps, cores, cores=cores, beside=beside)

    def baseline(self, ranks: int, steps: int, threads: int, *flags: str) -> Results:
        """What each rank of the baseline measured."""
        config = self.settings
        sizes = [f"--image-size={config.data.input_side}", f"--batch-size={config.train.batch_size}"]
        what = [f"--data={config.data.root}", f"--arch={config.model.arch}", f"--steps={steps}"]
        return self._run("baseline", ranks, threads, [*what, *sizes, *flags])

    def trained(self, keys: Mapping[str, object]) -> dict[str, float]:
        """Seconds of a whole run of `train`, by one rank and from random weights, as its own records have them: of its
        "start_up"; after that of "all", of which "training" and "validation" are parts.
        """
        flags = [f"--{key}={value}" for key, value in {"train.precision": self.precision, **keys}.items()]
        with self._folder() as out:
            run = Path(out, "run")
            words = ["hvd_eurosat.train", "--config", self.recipe, *flags, "--model.weights=none", "--run.dir", run]
            self._start("train", 1, self.threads(1), words)
            status = read_status(run)
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        took = {kind: sum(of["seconds"] for of in events if of["event"] == kind) for kind in ("train", "valid")}
        return {
            "start_up": status["preparing_seconds"],
            "all": status["updated"] - status["starts"][0]["time"],
            "training": took["train"],
            "validation": took["valid"],
        }

    def _run(self, module: str, ranks: int, threads: int, words: list[object]) -> Results:
        """What the ranks of a module of ours wrote."""
        with self._folder() as out:
            self._start(module, ranks, threads, [f"hvd_eurosat.benchmarks.{module}", *words, "--out", out])
            return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """For what a job writes."""
        return tempfile.TemporaryDirectory(dir=self.settings.folder, prefix=".job-")

    def _start(self, name: str, ranks: int, threads: int, module: list[object]) -> None:
        """A job, until it has ended. module: with its words.

        Raises UserError or RunError, with the job's own words, where it fails; over Gloo always RunError.
        """
        begin: list[object] = [LAUNCH / ("horovodrun.sh" if self.gloo else "mpirun.sh"), "--np", ranks]
        for option, value in {"--hosts": self.settings.hosts, "--interface": self.settings.interface}.items():
            begin += [option, value] if value else []
        if name in ALONE:
            begin = []
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        variables = {**inherited, "OMP_NUM_THREADS": str(threads)}  # what was configured is in the recipe
        if self.settings.train.device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""  # of the baseline, too
        if self.gloo:
            variables["HOROVOD_CONTROLLER"] = "gloo"
        status, errors = _finish([str(word) for word in (*begin, sys.executable, "-m", *module)], variables)
        if status:
            said = [RANK_LABEL.sub("", line) for line in errors.strip().splitlines()]
            log = self.settings.folder / "benchmark.log"
            write_text(log, errors)
            unsaid = f"it ended with status {status}; what it said is in {log}"
            error = next((line for line in said if line.startswith("error: ")), unsaid)
            message = f"{name}, np {ranks}: {error.removeprefix('error: ')}"
            raise UserError(message) if status == 2 else RunError(message)


def _finish(words: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """A launched job's exit status and standard error. It ends when this process is asked to."""
    with subprocess.Popen(words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        try:
            _, errors = job.communicate()
        except BaseException:
            job.terminate()  # and not killed, for the launcher has ranks to end
            raise
    return job.returncode, errors
