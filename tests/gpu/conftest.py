"""Without a GPU all is skipped, in one line. With one, what the tests found is a table at the end, and report.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hvd_eurosat.cluster import device

FOUND: dict[str, str | float | bool] = {}
OUT = Path(os.environ.get("OUT", "runs/test-gpu"))

Note = Callable[[str, str | float | bool], None]


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """One test of this folder stands for all of it where none can run."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    if ours and not torch.cuda.is_available():
        reason = device.obstacle() or "no NVIDIA GPU that this process may use"
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]
        ours[0].add_marker(pytest.mark.skip(f"tests/gpu, all of it: {reason}"))


@pytest.fixture
def note() -> Note:
    """For a fact or a figure of the report."""
    return FOUND.__setitem__


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    properties = torch.cuda.get_device_properties(0)
    FOUND.update(
        {
            "GPU": properties.name,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "driver": device.driver(),
            "torch": torch.__version__,
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "Python": platform.python_version(),
        }
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, and the file."""
    if not FOUND:
        return
    failed = [report.nodeid for report in terminalreporter.stats.get("failed", [])]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.json").write_text(json.dumps(FOUND | {"failed": failed}, indent=1))
    width = max(map(len, FOUND))
    terminalreporter.section(f"found, also in {OUT / 'report.json'}")
    for name, value in FOUND.items():
        terminalreporter.write_line(
            f"{name:<{width}}  {value:,.1f}" if type(value) is float else f"{name:<{width}}  {value}"
        )
