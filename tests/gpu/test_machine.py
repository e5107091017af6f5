"""The machine as the product sees it, with its GPUs and without, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import os
import re

import pytest
import torch

from hvd_eurosat.cluster import device, node
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.errors import UserError
from hvd_eurosat.training import compilation
from tests.gpu.commands import ROOT, horovodrun, needs_horovod, python
from tests.gpu.conftest import Note

EXAMINE = """
import json
from hvd_eurosat.cluster import device
from hvd_eurosat.diagnosis import checks, facts
found = facts.collect()
findings = [(one.level, one.what) for one in checks.machine(found)]
print(json.dumps({"device": str(device.choose("auto", 0)), "GPUs": len(found.gpus), "findings": findings}))
"""
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
REFUSED = [
    ((), {"CUDA_VISIBLE_DEVICES": "99"}, "of which torch can use none with CUDA_VISIBLE_DEVICES=99"),
    (("--train.device", "cuda"), HIDDEN, "has no NVIDIA GPU that this process may use"),
]


@pytest.mark.timeout(30)
def test_each_gpu_is_a_place(note: Note) -> None:
    """By its number on the bus; ranks of one GPU are refused."""
    count = torch.cuda.device_count()
    places = [Place.of(torch.device("cuda", number)) for number in range(count)]
    note("first GPU", f"{places[0].gpu}, on the bus {places[0].card}")
    node.check(places, count)
    with pytest.raises(UserError, match="2 ranks share 1 GPU of"):
        node.check(places[:1] * 2, 2)
    assert device.granted() >= count
    assert device.obstacle() is None


@pytest.mark.timeout(30)
def test_what_is_loaded_at_run_time(note: Note) -> None:
    """The driver's library, by the name that Horovod opens, and what compiling takes."""
    ctypes.CDLL("libcuda.so.1")
    note("train.compile lacks", compilation._missing(torch.device("cuda", 0)) or "nothing")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("variables", [{}, HIDDEN], ids=["seen", "hidden"])
def test_the_doctor_has_no_word_on_the_gpus(variables: dict[str, str], note: Note) -> None:
    """Seen or hidden on purpose they are nothing to mend; what else it finds is noted."""
    done = python("-c", EXAMINE, **variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == ("cpu" if variables else "cuda:0")
    assert found["GPUs"] == (0 if variables else torch.cuda.device_count())
    for number, (level, what) in enumerate(found["findings"], start=1):
        note(f"doctor, {'hidden' if variables else 'seen'}, {number}", f"{level}: {what}")
    assert not [what for level, what in found["findings"] if level == "mend" and re.search("NVIDIA|its GPU", what)]


@needs_horovod
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("words", "variables", "said"), REFUSED)
def test_a_gpu_that_cannot_be_had_is_refused(words: tuple[str, ...], variables: dict[str, str], said: str) -> None:
    """In one line, before the data are looked for."""
    done = python("-m", "hvd_eurosat.train", "--data.root", "nowhere", *words, **variables)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert said in errors[0]


@needs_horovod
@pytest.mark.timeout(90)
def test_two_ranks_on_one_gpu_are_refused() -> None:
    """Once, not by each."""
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    done = horovodrun(2, "-m", "hvd_eurosat.train", "--data.root", "nowhere", CUDA_VISIBLE_DEVICES=first)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("2 ranks share 1 GPU of") == 1, said


@pytest.mark.timeout(90)
def test_the_tests_of_devices_pass_beside_a_gpu() -> None:
    """As `make test` runs them: with the GPUs hidden."""
    tests = "tests/unit/test_devices.py"
    if not (ROOT / tests).exists():
        pytest.skip("the pack of offline.sh has no tests/unit")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, **HIDDEN)
    assert done.returncode == 0, done.stdout[-2000:]
