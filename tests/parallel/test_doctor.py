"""The doctor finds nothing on a healthy machine, and every planted fault with its cure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_eurosat import doctor
from hvd_eurosat.diagnosis import facts
from tests.parallel.conftest import Job, Launch, command, run, under

# The doctor, which looks at libraries by starting the Python that it finds itself to be.
AS = """
import runpy, sys
sys.executable = sys.argv.pop(1)
runpy.run_module("hvd_eurosat.doctor", run_name="__main__", alter_sys=True)
"""

HOROVOD_WITHOUT = """
import importlib, sys
sys.path.remove({folder!r})
del sys.modules["horovod"], sys.modules["horovod.torch"]
real = importlib.import_module("horovod.torch")
real.mpi_built = real.gloo_built = lambda: False
sys.modules["horovod.torch"] = real
"""

BROKEN_HOROVOD = """
import os, time
time.sleep(3 if os.environ["OMPI_COMM_WORLD_RANK"] == "0" else 0)
raise ImportError("libmpi.so.40: not found")
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_mpirun(folder: Path, version: str) -> str:
    return str(script(folder / "mpirun", f"echo '{version}'").parent)


def report(job: Job) -> dict[str, Any]:
    """The JSON in a job's output."""
    return dict(json.loads(job.stdout[job.stdout.index("{") :]))


def cure_of(findings: list[dict[str, str]], what: str) -> str:
    cures = [finding["cure"] for finding in findings if what in finding["what"]]
    assert len(cures) == 1, findings
    return cures[0]


@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), ("gloo", 2)])
def test_a_healthy_machine(warm: str, launcher: str, ranks: int) -> None:
    """To one rank as libraries are when they are loaded afresh."""
    job = run(under(launcher, ranks, warm, "-c", AS, sys.executable if ranks == 1 else warm, "--json"))
    assert job.returncode == 0, job.stdout + job.stderr
    found = report(job)
    assert found["healthy"]
    assert len(found["ranks"]) == ranks
    assert len(found["milliseconds"]) == (3 if ranks > 1 else 1)


def test_the_table(launch: Launch) -> None:
    job = launch("mpirun", 2, "doctor")
    assert job.returncode == 0, job.stdout + job.stderr
    for words in ("Open MPI v4.1", "threads multiple", "MPI, Gloo, NCCL", "allreduce of 16 MiB", "mended: nothing"):
        assert words in job.stdout


def test_a_machine_with_no_mpirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(facts, "_libraries", dict)
    monkeypatch.setattr(facts, "_mpirun", lambda path: facts.Mpirun("", ""))
    doctor.report([facts.collect()], [], {}, "none", as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mpirun", "none"] in lines
    assert ["on", "PATH", "none"] in lines


def test_settings_and_limits(warm: str, tmp_path: Path) -> None:
    """Nine faults at once, each found with its own cure."""
    planted = {
        "HOROVOD_AUTOTUNE": "1",
        "HOROVOD_CACHE_CAPACITY": "0",
        "HOROVOD_CYCLE_TIME": "100",
        "NCCL_SOCKET_IFNAME": "nope0",
        "TMPDIR": str(tmp_path / "nowhere"),
        "PATH": fake_mpirun(tmp_path / "bin", "HYDRA build details: Version 4.0.2"),
        "OMPI_ALLOW_RUN_AS_ROOT": "",
    }
    words = command("python", 1, "doctor", "--json", python=warm)
    job = run(["/bin/bash", "-c", 'ulimit -n 256; exec "$@"', "-", *words], **planted)
    assert job.returncode == 1
    findings = report(job)["findings"]
    assert cure_of(findings, "HOROVOD_AUTOTUNE=1") == "unset HOROVOD_AUTOTUNE"
    assert cure_of(findings, "HOROVOD_CACHE_CAPACITY=0") == "unset HOROVOD_CACHE_CAPACITY"
    assert cure_of(findings, "HOROVOD_CYCLE_TIME=100") == "unset HOROVOD_CYCLE_TIME"
    assert cure_of(findings, "NCCL_SOCKET_IFNAME names nope0").startswith("NCCL_SOCKET_IFNAME is one of ")
    assert cure_of(findings, "TMPDIR").startswith("set TMPDIR")
    assert cure_of(findings, "another MPI comes first on PATH").startswith(f"type {Path(warm).parent}")
    assert cure_of(findings, "only 256 files can be open").startswith("ulimit -n")
    assert cure_of(findings, "there is no ssh") == "apt-get install openssh-client"
    if os.geteuid() == 0:
        assert cure_of(findings, "Open MPI does not start for root").startswith("export OMPI_ALLOW_RUN_AS_ROOT=1 ")


def test_open_mpi_5_and_a_horovod_without_mpi(warm: str, tmp_path: Path) -> None:
    fake_mpirun(tmp_path / "bin", "mpirun (Open MPI) 5.0.3")
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    script(tmp_path / "site" / "horovod" / "__init__.py", "")
    stub = tmp_path / "site" / "horovod" / "torch.py"
    stub.write_text(HOROVOD_WITHOUT.format(folder=str(tmp_path / "site")))
    prefix = Path(sys.executable).parent.parent
    (tmp_path / "pyvenv.cfg").write_text((prefix / "pyvenv.cfg").read_text())
    (tmp_path / "lib").symlink_to(prefix / "lib")
    words = under("python", 1, warm, "-c", AS, tmp_path / "bin" / "python", "--json")
    job = run(words, PYTHONPATH=str(tmp_path / "site"))
    assert job.returncode == 1, job.stderr
    findings = report(job)["findings"]
    assert "launch/mpirun.sh" in cure_of(findings, "Open MPI 5, which breaks horovodrun")
    assert "HOROVOD_WITH_MPI=1" in cure_of(findings, "Horovod was built without MPI")
    assert "HOROVOD_WITH_GLOO=1" in cure_of(findings, "Horovod was built without Gloo")


def test_versions_that_differ_between_ranks(warm: str, tmp_path: Path) -> None:
    other = tmp_path / "torchvision-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    one, two = (command(launcher, 1, "doctor", "--json", python=warm) for launcher in ("mpirun", "python"))
    job = run([*one, ":", "-np", "1", "env", f"PYTHONPATH={tmp_path}", *two])
    assert job.returncode == 1
    findings = report(job)["findings"]
    assert "make the hosts alike" in cure_of(findings, "version of torchvision is 0.1 here")
    assert findings[0]["where"].startswith("ranks 1 (")


def test_horovod_that_cannot_be_imported(warm: str, tmp_path: Path) -> None:
    """Rank 0, which reports, comes last: the launcher must not have ended it by then for another rank's end."""
    script(tmp_path / "horovod" / "__init__.py", "").write_text(BROKEN_HOROVOD)
    job = run(under("mpirun", 2, warm, "-c", AS, sys.executable), PYTHONPATH=str(tmp_path))
    assert job.returncode == 1
    assert job.stdout.count("cannot be imported: ImportError: libmpi.so.40: not found") == 1
    assert "cure: make setup" in job.stdout
