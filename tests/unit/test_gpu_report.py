"""How tests/gpu report: their conftest in a folder with small tests, beside a GPU that is planted or none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvd_eurosat.cluster import device
from tests.gpu import conftest

pytest_plugins = ["pytester"]
CONFTEST = Path(conftest.__file__)  # imported here, too, or pytester would have all that it imports imported again
TESTS = """
import json
import os
from pathlib import Path

import conftest
import pytest

def test_finds(note, request):
    note("images/s", 45678.0)
    assert request.node.get_closest_marker("timeout").args[0] <= 60 * conftest.MINUTES

def test_fails(note):
    found = json.loads(Path(os.environ["OUT"], "report.json").read_text())
    assert (found["images/s"], found["NCCL"], found["failed"]) == (45678.0, "2.28.9", [])
    assert found["running"].endswith("test_fails")
    assert 1 == 2

@pytest.mark.timeout(10)
def test_takes_all_the_time(request):
    assert request.node.get_closest_marker("timeout").args[0] == 10
    conftest.REPORT.until = 0.0

def test_is_late():
    raise AssertionError
"""


@pytest.fixture
def folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """With the conftest of tests/gpu; the report goes into its folder "out"."""
    monkeypatch.setenv("OUT", str(pytester.path / "out"))
    pytester.makeini("[pytest]\nmarkers = timeout: as pytest-timeout's, which would stop this test's own")
    pytester.makeconftest(CONFTEST.read_text())
    return pytester


def run(folder: pytest.Pytester) -> pytest.RunResult:
    return folder.runpytest_inprocess("-ra", "-p", "no:timeout", "-p", "no:cacheprovider")


def test_without_a_gpu_there_is_one_line(folder: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "obstacle", lambda: "its driver is too old")
    folder.makepyfile(TESTS)
    found = run(folder)
    found.assert_outcomes(skipped=1, deselected=3)
    assert found.ret == 0
    found.stdout.fnmatch_lines(["SKIPPED * tests/gpu, all of it: its driver is too old"])
    assert not (folder.path / "out").exists()


def test_what_was_found_failed_and_was_not_run(folder: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there after the first test; the time that was up is an error of its own."""
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30, major=9, minor=0)
    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: gpu,
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    folder.makepyfile(TESTS)
    found = run(folder)
    found.assert_outcomes(passed=2, failed=1, errors=1)
    assert found.ret == 1
    found.stdout.fnmatch_lines(
        [
            "*not run: the 6 minutes for all tests are over; --lf runs those that are left",
            "GPU * NVIDIA H200",
            "images/s * 45,678.0",
            "not run, for the 6 minutes were over: *::test_is_late",
        ]
    )
    report = json.loads((folder.path / "out" / "report.json").read_text())
    assert [name.partition("::")[2] for name in report["failed"]] == ["test_fails"]
    assert [name.partition("::")[2] for name in report["not run"]] == ["test_is_late"]
    assert report["running"] == ""


def test_the_decisive_ones_come_first(folder: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder.makepyfile(
        **dict.fromkeys(("test_norm_relu", "test_new", "test_step", "test_machine"), "def test_it(): ...")
    )
    said = folder.runpytest_inprocess("--collect-only", "-q", "-p", "no:cacheprovider").stdout.lines
    files = [line.partition(".py::")[0] for line in said if "::" in line]
    assert files == ["test_machine", "test_step", "test_norm_relu", "test_new"]
