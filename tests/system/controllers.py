"""Steps on two hosts that are namespaces of this machine, by MPI and by Gloo, over links of several rates. As root.

python -m tests.system.controllers --data.root data/EuroSAT_RGB
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from hvd_eurosat.benchmarks.step import step_seconds
from tests.system.hosts import Host, network
from tests.system.links import RATES, limit

STEPS = {"bn+head": 20, "all": 4}
LAUNCHERS = {"MPI": "mpirun", "Gloo": "horovodrun"}


def measure(host: Host, controller: str, mode: str, **environment: str) -> str:
    """Medians of the step's time and of the least time that a rank is in its collective."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".job-") as out:
        job = [sys.executable, "-m", "hvd_eurosat.benchmarks.job", *sys.argv[1:], "--modes", json.dumps([mode])]
        keys = ["--model.weights", "none", "--cores", "1", "--steps", str(STEPS[mode]), "--out", out]
        launcher = [f"launch/{LAUNCHERS[controller]}.sh", "--hosts", "a:1,b:1", "--interface", "eth0"]
        done = host.run([*launcher, *job, *keys], 3600, HOROVOD_CONTROLLER=controller.lower(), **environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        ranks = [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(2)]
    seconds = statistics.median(step_seconds(ranks[0]["modes"][mode]))
    waits = zip(*(rank["modes"][mode]["communication"] for rank in ranks), strict=True)
    return f"step {1000 * seconds:,.1f} ms, communication {1000 * statistics.median(map(min, waits)):,.1f} ms"


def main() -> None:
    """Both, at each rate, in both modes."""
    with tempfile.TemporaryDirectory() as name, network("ab", Path(name)) as hosts:
        environment = {"PATH": f"{name}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        for rate in RATES:
            for host in hosts.values():
                limit(host, rate)
            for mode in STEPS:
                for controller in LAUNCHERS:
                    where = f"{rate:g} Gbit/s" if rate else "no limit"
                    found = measure(hosts["a"], controller, mode, **environment)
                    print(f"{where}, {mode}, {controller}: {found}", flush=True)


if __name__ == "__main__":
    main()
