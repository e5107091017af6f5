"""Without a GPU all is skipped, in one line. With one, what the tests find is in report.json after each, a table last.

All of them have six minutes, and each a limit of its own. A test for which no time is left is an error, "not run", so
that the status says that something is missing; `--lf` runs those later, for pytest counts them as failed. A test that
hangs in CUDA, where Python cannot interrupt it, ends all, and shows where it was.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster import device
from tests.gpu.loop import WHOLE, Scale

OUT = Path(os.environ.get("OUT", "runs/test-gpu"))
MINUTES = 6
GRACE = 15  # seconds after a test's limit, in which it may end by itself
# Cheap and decisive ones first; the kernels of the last are in the steps of the others.
ORDER = ("test_machine", "test_step", "test_exchange", "test_runs", "test_rates", "test_norm_relu")
NOT_RUN = "not run"

Note = Callable[[str, str | float | bool], None]


class Report:
    """What the tests have found so far, and until when they may run, by time.monotonic."""

    def __init__(self) -> None:
        self.found: dict[str, str | float | bool] = {}
        self.failed: list[str] = []
        self.not_run: list[str] = []
        self.running = ""
        self.until: float | None = None

    def write(self) -> None:
        """report.json, once there is something to say."""
        if self.found:
            OUT.mkdir(parents=True, exist_ok=True)
            state = {"failed": self.failed, NOT_RUN: self.not_run, "running": self.running}
            (OUT / "report.json").write_text(json.dumps(self.found | state, indent=1))


REPORT = Report()


def _is_ours(item: pytest.Item) -> bool:
    return item.path.parent == Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """One test of this folder stands for all of it where none can run; else they are put in order."""
    ours = sorted(filter(_is_ours, items), key=lambda item: (*ORDER, item.path.stem).index(item.path.stem))
    others = [item for item in items if not _is_ours(item)]
    if ours and not torch.cuda.is_available():
        reason = device.obstacle() or "no NVIDIA GPU that this process may use"
        ours[0].add_marker(pytest.mark.skip(f"tests/gpu, all of it: {reason}"))
        config.hook.pytest_deselected(items=ours[1:])
        del ours[1:]
    items[:] = others + ours


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout reads the limit
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """No test gets more time than is left for all."""
    if not _is_ours(item):
        return (yield)
    if REPORT.until is None:
        REPORT.until = time.monotonic() + 60 * MINUTES
    own = item.get_closest_marker("timeout")
    limit = max(1.0, min(own.args[0] if own else 60, REPORT.until - time.monotonic()))
    item.add_marker(pytest.mark.timeout(limit), append=False)
    with open(os.dup(2), "w") as stderr:  # before pytest captures it
        faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


def pytest_runtest_setup() -> None:
    """Nothing begins when the time is over."""
    if REPORT.until is not None and time.monotonic() >= REPORT.until:
        pytest.fail(f"{NOT_RUN}: the {MINUTES} minutes for all tests are over; --lf runs those that are left", False)


def pytest_runtest_logstart(nodeid: str) -> None:
    """What a machine that does not come back was at."""
    REPORT.running = nodeid
    REPORT.write()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After each part of a test."""
    if report.failed:
        late = report.when == "setup" and str(report.longrepr).startswith(NOT_RUN)
        (REPORT.not_run if late else REPORT.failed).append(report.nodeid)
    if report.when == "teardown":
        REPORT.running = ""
        REPORT.write()


@pytest.fixture
def note() -> Note:
    """For a fact or a figure of the report."""
    return REPORT.found.__setitem__


@pytest.fixture
def scale() -> Scale:
    """Of what is computed."""
    return WHOLE


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Of a test's graphs and memory, which would count in the next one's figures."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a repeatable run has it before its first product
    properties: Any = torch.cuda.get_device_properties(0)
    REPORT.found.update(
        {
            "GPU": properties.name,
            "GPUs": torch.cuda.device_count(),
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "cores": len(os.sched_getaffinity(0)),
            "driver": device.driver(),
            "torch": torch.__version__,
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "Horovod": version_of("horovod"),
            "Python": platform.python_version(),
        }
    )


def version_of(package: str) -> str:
    """Or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table."""
    found = REPORT.found
    if not found:
        return
    width = max(map(len, found))
    terminalreporter.section(f"found, also in {OUT / 'report.json'}")
    for name, value in found.items():
        terminalreporter.write_line(
            f"{name:<{width}}  {value:,.1f}" if type(value) is float else f"{name:<{width}}  {value}"
        )
    if REPORT.not_run:
        terminalreporter.write_line(f"{NOT_RUN}, for the {MINUTES} minutes were over: {', '.join(REPORT.not_run)}")
