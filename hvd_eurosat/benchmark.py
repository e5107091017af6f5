"""Measure how fast training is here, beside Horovod's own example, and what to expect of more ranks.

mpirun -np 2 --bind-to none python -m hvd_eurosat.benchmark step --data.root data/EuroSAT_RGB
python -m hvd_eurosat.benchmark scaling --data.root data/EuroSAT_RGB

Everything is measured in jobs that it starts itself, in turn. Figures go into benchmark.json and benchmark.png of
run.dir (default runs/benchmark) after every round, where the subcommands' results stand side by side.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hvd_eurosat.benchmarks import data, gpu, memory, project, results, scaling, step
from hvd_eurosat.benchmarks.launcher import Launcher
from hvd_eurosat.benchmarks.settings import (
    DataSettings,
    GpuSettings,
    MemorySettings,
    ProjectSettings,
    ScalingSettings,
    StepSettings,
)
from hvd_eurosat.cluster import environment
from hvd_eurosat.config.command import Parser
from hvd_eurosat.config.reading import read
from hvd_eurosat.errors import RunError, UserError

Measure = Callable[[Launcher, Any, Callable[[str], None]], Iterator[dict[str, Any]]]
SUBCOMMANDS: dict[str, tuple[type[StepSettings], Measure, str]] = {
    "step": (StepSettings, step.measure, "the training step beside Horovod's example"),
    "scaling": (ScalingSettings, scaling.measure, "1 to N ranks, weak and strong"),
    "project": (ProjectSettings, project.measure, "a model of the step's time, checked, and up to 1,024 ranks"),
    "memory": (MemorySettings, memory.measure, "memory of 1 and of 4 ranks"),
    "data": (DataSettings, data.measure, "the way of the data, from memory and from a cold disk"),
    "gpu": (GpuSettings, gpu.measure, "one GPU: batches, graphs, compiled code, and what bounds them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0 done, 1 failed, 2 bad usage or data. Rank 0 does it all."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank, _ = environment.launched()
    if rank > 0:  # the launcher only says how many ranks the jobs are to have
        return 0
    parser = Parser(
        prog="python -m hvd_eurosat.benchmark",
        description=__doc__,
        epilog="\n".join(f"{name:<9} {what}" for name, (_, _, what) in SUBCOMMANDS.items()),
    )
    parser.add_argument("what", choices=SUBCOMMANDS, help="`benchmark <what> --help` lists its keys")
    name = parser.parse_args(arguments[:1]).what
    schema, measure, _ = SUBCOMMANDS[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the job
    try:
        settings = read(schema, arguments[1:], f"benchmark {name}")
        if name == "gpu":
            gpu.check(settings.hosts)
        results.read_results(settings.folder)  # a damaged file is refused before anything is measured
        launcher = Launcher.of(settings)
        for found in measure(launcher, settings, lambda text: print(text, file=sys.stderr, flush=True)):
            results.draw(results.merge(settings.folder, name, found), settings.folder / "benchmark.png")
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    results.show(name, found)
    print(f"in {settings.folder / 'benchmark.json'} and benchmark.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
