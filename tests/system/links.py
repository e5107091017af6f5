"""The projection over hosts that are namespaces of this machine, with links of several rates. As root; an hour.

HOROVOD_CONTROLLER=gloo python -m tests.system.links --data.root data/EuroSAT_RGB --run.dir runs/links [--steps 24]

It is fitted on four hosts without a limit, and checked on two, three and four of them at each rate.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.system.hosts import Host, network

RATES = (0.0, 1.0, 0.1)
HOURS = 3600 * 6


def limit(host: Host, gigabits: float) -> None:
    """What the host sends, to so many Gbit/s (0: no limit), in bursts of a millisecond.

    Where a burst takes 64 KB, packets are not cut up by the processor, which a network card would do.
    """
    burst = f"{gigabits * 1e6 / 8:.0f}b"
    shape = ["tbf", "rate", f"{gigabits * 1000:.0f}mbit", "burst", burst, "latency", "400ms"]
    words = ["replace", "dev", "eth0", "root", *shape] if gigabits else ["del", "dev", "eth0", "root"]
    job = host.run(["tc", "qdisc", *words])
    if job.returncode and gigabits:
        raise RuntimeError(job.stderr)


def main() -> None:
    """Measure at each rate."""
    with tempfile.TemporaryDirectory() as name, network("abcd", Path(name)) as hosts:
        environment = {"PATH": f"{name}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        where = ["--hosts", "a:1,b:1,c:1,d:1", "--interface", "eth0"]
        words = [sys.executable, "-m", "hvd_eurosat.benchmark", "project", *where, *sys.argv[1:]]
        for rate in RATES:
            for host in hosts.values():
                limit(host, rate)
            print(f"links of {rate:g} Gbit/s" if rate else "no limit", flush=True)
            job = hosts["a"].run([*words, "--link", str(rate)], HOURS, **environment)
            print(job.stdout, job.stderr, flush=True)
            if job.returncode:
                sys.exit(job.returncode)


if __name__ == "__main__":
    main()
