"""The rooms of the package: who may import whom, and what a command imports before it has work to do."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvd_eurosat
from tests.unit.conftest import Grow

PACKAGE = Path(hvd_eurosat.__file__).parent
ORDER = [
    {"errors", "__init__", "__main__"},
    {"config"},
    {"cluster"},
    {"data", "model"},
    {"weights"},
    {"training"},
    {"run"},
    {"scene"},
    {"benchmarks", "diagnosis"},
    {"train", "prepare", "evaluate", "predict", "map", "export", "report", "benchmark", "doctor"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
HEAVY = {"torch", "torchvision", "horovod", "mpi4py", "matplotlib", "h5py", "tensorboard", "rasterio"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
MODULES = """
import json, runpy, sys
verb, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(f"hvd_eurosat.{verb}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("\\n" + json.dumps([end.code or 0, sorted(sys.modules)]))
"""


@functools.cache
def imports(path: Path) -> list[str]:
    """The modules that a file imports, wherever it does: hvd_eurosat.data.tree, numpy."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def files() -> Iterator[tuple[str, Path]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def test_every_room_has_its_place() -> None:
    there = {own for own, _ in files()}
    assert there == FLOOR.keys()
    for name in there - ORDER[0] - ORDER[-1]:
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
        assert text, f"{name}/__init__.py says what lives there"


def test_data_flows_one_way() -> None:
    for own, path in files():
        for module in imports(path):
            if module.startswith("hvd_eurosat"):
                other = room(module) if room(module) in FLOOR else "__init__"  # from hvd_eurosat import __version__
                assert other == own or FLOOR[other] < FLOOR[own], f"{path.relative_to(PACKAGE)} imports {module}"


def test_one_room_knows_horovod_and_mpi() -> None:
    knowing = {
        own for own, path in files() for module in imports(path) if module.split(".")[0] in ("horovod", "mpi4py")
    }
    assert knowing == {"cluster", "benchmarks"}
    theirs = [path.name for own, path in files() if own == "benchmarks" and "import horovod" in path.read_text()]
    assert theirs == ["baseline.py"], "Horovod's own example, as a user would write it"


def run(*words: object) -> tuple[object, set[str]]:
    """Exit status of a verb in a process of its own, and what it imported."""
    program = [sys.executable, "-c", MODULES, *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    status, modules = json.loads(done.stdout.splitlines()[-1])
    return status, set(modules)


@pytest.mark.parametrize("verb", sorted(ORDER[-1]))
def test_help_is_there_at_once(verb: str) -> None:
    status, modules = run(verb, "--help")
    assert status == 0
    assert not modules & HEAVY


def test_the_package_lists_its_verbs() -> None:
    """At once; with a verb as a word of its own, it says how to write it."""
    listed = subprocess.run([sys.executable, "-m", "hvd_eurosat"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == sorted(ORDER[-1])
    assert all(text.endswith(".") for _, text in lines)
    status, modules = run("__main__", "--help")
    assert status == 0
    assert not modules & HEAVY
    for word, known in (("train", "train"), ("trian", "VERB")):
        done = subprocess.run([sys.executable, "-m", "hvd_eurosat", word], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: write python -m hvd_eurosat.{known} ")


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "map", "export"])
def test_a_bad_flag_is_refused_at_once(verb: str) -> None:
    status, modules = run(verb, "--nonsense", "1")
    assert status == 2
    assert not modules & HEAVY


@pytest.mark.parametrize("told", [("--np", 2), ("--hosts", "localhost:2")])
def test_a_launcher_that_is_told_of_its_ranks_needs_no_torch(told: tuple[object, ...]) -> None:
    status, modules = run("cluster.hosts", *told)
    assert status == 0
    assert not modules & HEAVY


def test_preparing_needs_neither_torch_nor_the_configuration(grow: Grow, tmp_path: Path) -> None:
    source = grow("source", {"Forest": 5, "River": 5})
    status, modules = run("prepare", "--source", source, "--out", tmp_path / "data")
    assert status == 0
    assert not modules & (HEAVY | {"hvd_eurosat.config.schema"})


def test_training_imports_what_every_rank_needs() -> None:
    program = "import json, sys, hvd_eurosat.train; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert "torch" in modules
    assert not modules & (COMPILER | HEAVY - {"torch"})
