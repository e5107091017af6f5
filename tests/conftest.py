"""What all tests have in common."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

gc.disable()  # until all tests are imported: the modules stay, and are searched for garbage again and again
WARM = pytest.StashKey[str]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers of pytest-xdist share one warm Python (tests/parallel/warm.py), which imports when the first needs it."""
    if WARM not in node.config.stash:
        from tests.parallel.conftest import warm_python

        stack = ExitStack()
        node.config.add_cleanup(stack.close)
        node.config.stash[WARM] = stack.enter_context(warm_python())
    node.workerinput["warm"] = node.config.stash[WARM]


def pytest_collection_finish() -> None:
    """What was imported until now stays: it is not searched for garbage. The rest is, but less often."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 50, 100)  # Python's own 700, 10, 10 takes an eighth of the time


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Nothing here is read after a machine has lost its power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        patch.setattr(os, "fsync", lambda _: None)
        yield
