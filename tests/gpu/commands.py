"""Commands of this project as processes of their own, which may hide GPUs or fail."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="it takes Horovod")


def python(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python words…` in the project's folder, with these environment variables besides."""
    return command(sys.executable, *words, **variables)


def command(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Any program."""
    return subprocess.run(
        list(map(str, words)), cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )


def horovodrun(ranks: int, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python words…` by so many ranks of this machine, over Gloo, which needs no MPI."""
    launcher = Path(sys.executable).parent / "horovodrun"
    return command(launcher, "--gloo", "-np", ranks, "-H", f"localhost:{ranks}", sys.executable, *words, **variables)
