"""What tests/gpu/offline.sh packs is enough beside Python and torch, which here is this one's, by links."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def link(package: str, folder: Path, seen: set[str]) -> None:
    """A package and what it requires, and no other, into a folder."""
    seen.add(package)
    try:
        found = distribution(package)
    except PackageNotFoundError:  # of another machine
        return
    for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / name).exists():
            (folder / name).symlink_to(found.locate_file(name))
    for requirement in map(Requirement, found.requires or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in seen:
            link(requirement.name, folder, seen)


@pytest.mark.timeout(1800)
def test_a_pack_is_enough_beside_torch(tmp_path: Path) -> None:
    """It is unpacked, installs itself without an index, collects tests/gpu, and `benchmark gpu` asks for a GPU."""
    pack, torch = tmp_path / "offline.tar.xz", tmp_path / "torch"
    version = ".".join(map(str, sys.version_info[:2]))
    quick = os.environ | {"XZ_OPT": "-1 -T0"}  # a fifth of the time; the pack is larger by a sixth
    words = ["bash", "tests/gpu/offline.sh", "--python", version, "--out", pack]
    subprocess.run(words, cwd=ROOT, env=quick, check=True)
    assert pack.stat().st_size < 60e6  # some 52e6 as people pack it, which leaves room for 2,000 patches of EuroSAT
    subprocess.run(["tar", "xf", pack, "-C", tmp_path], check=True)
    torch.mkdir()
    link("torch", torch, set())
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(torch), "PYTHON": sys.executable}
    alone["PIP_IGNORE_INSTALLED"] = "1"  # whatever this Python has beside torch

    def run(*words: str) -> tuple[int, list[str]]:
        done = subprocess.run([tmp_path / "offline/run.sh", *words], env=alone, capture_output=True, text=True)
        return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]

    status, said = run("-m", "pytest", "--collect-only", "-q", "tests/gpu")
    assert status == 0, said
    assert any(line.startswith("tests/gpu/test_") for line in said)
    names = "numpy, h5py, matplotlib.pyplot, torch.utils.tensorboard, hvd_eurosat.train, hvd_eurosat.benchmarks.gpu_job"
    status, said = run("-c", f"import {names}; print(numpy.__file__)")
    assert status == 0, said
    assert said[-1].startswith(str(tmp_path / "offline/venv"))
    status, said = run("-m", "hvd_eurosat.benchmark", "gpu", "--data.root", "../sample")
    assert (status, len(said)) == (2, 1), said
    assert "no NVIDIA GPU" in said[0]
