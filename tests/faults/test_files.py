"""Disks that fill, vanish or refuse; processes killed while they save; files that an enemy or a bad cable made."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hvd_eurosat.config.schema import Config, Model, Optim
from hvd_eurosat.data.packed import open_packed, verify_packed
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.optimiser import build_optimiser
from hvd_eurosat.weights.loading import load_weights
from tests.faults.conftest import SAVE, STEP, STEPS, Ended, Inject, fingerprint
from tests.parallel.conftest import checkpoint_file
from tests.unit.conftest import Canary, narrow


@pytest.fixture
def state() -> Checkpoint:
    with narrow():
        model = build("resnet18", 2, "bn+head", seed=0)
    return Checkpoint(
        model=model.state_dict(),
        frozen=[name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        optimiser=build_optimiser(model, Optim()).state_dict(),
        rank_buffers=torch.zeros(2, 3),
        sums=torch.zeros(2, 4, dtype=torch.float64),
        epoch=0,
        samples=8,
        step=1,
        config=Config().model_dump(mode="json"),
        classes=["a", "b"],
        digest="d",
        precision="fp32",
    )


def save_for_ever(folder: Path, state: Checkpoint) -> None:
    """What rank 0 does, step after step; never returns."""
    saver = Saver(CheckpointFolder(folder, keep=1), stop_at_once=True, report=print)
    for step in range(1, 10**6):
        saver.save(dataclasses.replace(state, step=step))


def test_killed_at_random_moments_while_saving(tmp_path: Path, state: Checkpoint) -> None:
    """20 times; with keep=1, so that nothing but the promise stands between the run and its loss."""
    rng = random.Random(0)
    CheckpointFolder(tmp_path, keep=1).add(state)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            newest = CheckpointFolder(tmp_path, keep=1).records()[-1].step
            save_for_ever(tmp_path, dataclasses.replace(state, step=newest))
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reports: list[str] = []
        saved = CheckpointFolder(tmp_path, keep=1).newest(reports.append)
        assert saved is not None
        assert reports == []
        assert all(torch.equal(tensor, saved.model[name]) for name, tensor in state.model.items())
        for partial in tmp_path.glob(".*"):
            partial.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 MB of its own: one and a half runs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", folder], check=False).returncode != 0:
        pytest.skip("only root can mount a file system of its own")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_the_disk_fills_and_has_room_again(inject: Inject, disk: Path, tmp_path: Path) -> None:
    """Another's file takes all the room before the second save, and the third finds room; before it, a run without."""
    job = inject({tmp_path / "undisturbed": "", disk / "run": f"0 {STEPS + 2} {STEP} fill"})
    assert job.returncode == 0, job.output
    assert "No space left on device; training goes on, and the earlier checkpoints are whole" in job.output
    assert str(disk / "run" / "checkpoints") in job.output
    assert fingerprint(disk / "run") == fingerprint(tmp_path / "undisturbed")
    assert not list((disk / "run" / "checkpoints").glob(".*"))


def test_the_disk_fills_for_good(inject: Inject, disk: Path, data: Path) -> None:
    job = inject({disk / "run": f"0 2 {SAVE} fill-for-good"}, train__epochs=5)
    assert job.returncode == 1
    assert "No space left on device" in job.errors[0]
    checkpoints = CheckpointFolder(disk / "run" / "checkpoints", keep=1)
    newest = checkpoints.newest(print)
    assert newest is not None
    assert newest.step == STEPS
    assert not list((disk / "run" / "checkpoints").glob(".*"))


def test_too_little_room_is_said_before_training(inject: Inject, disk: Path, data: Path) -> None:
    job = inject({disk / "run": ""}, "python", 1, model__arch="resnet50", model__trainable="all")
    assert job.returncode == 2
    assert "MB free" in job.errors[0]


def test_the_run_directory_is_removed(inject: Inject, tmp_path: Path) -> None:
    job = inject({tmp_path / "run": f"0 2 {SAVE} remove"}, run__checkpoint_steps=1)
    assert job.returncode == 1
    assert "No such file or directory" in job.errors[0]
    assert not (tmp_path / "run").exists()


def test_all_checkpoints_damaged(inject: Inject, tmp_path: Path) -> None:
    """The run is not begun again in silence; --run.resume never says that it shall be."""

    def begin(**keys: object) -> Ended:
        return inject({tmp_path / "run": ""}, "python", 1, **keys)

    assert begin(train__epochs=1).returncode == 0
    path = checkpoint_file(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        job = begin(train__epochs=2)
        assert job.returncode == 2
        assert "is whole: " in job.errors[0]
    assert begin(train__epochs=1, run__resume="never").returncode == 0


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated or cut off."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice(
        [
            content[:start],
            content[:start] + content[end:],
            content[:end] + content[start:],
            content[:start] + rng.randbytes(min(end - start, 64)) + content[end:],
            content[:start] + bytes([content[start % len(content)] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
        ]
    )


def error_of(read: Callable[[], object]) -> UserError | RunError | None:
    """The clean error that reading ended with, if it did."""
    try:
        read()
    except (UserError, RunError) as error:
        return error
    return None


def test_mutated_files_are_a_clean_error(tmp_path: Path, state: Checkpoint, data: Path) -> None:
    """200 checkpoints, their .json files, manifests, lists of digests and packed files: refused, or harmless."""
    rng = random.Random(1)
    small = dataclasses.replace(state, model={name: t for name, t in state.model.items() if t.ndim < 4}, frozen=[])
    CheckpointFolder(tmp_path, keep=1).add(small)
    copy = shutil.copytree(data, tmp_path / "data")
    packed = open_packed(open_tree(copy), "test", 64, None)
    assert len(packed.files) == 20
    targets = {
        tmp_path / f"{small.name}.pt": lambda: checkpoint.load(tmp_path / f"{small.name}.pt"),
        tmp_path / f"{small.name}.json": lambda: checkpoint.load(tmp_path / f"{small.name}.pt"),
        copy / "manifest.json": lambda: open_tree(copy),
        copy / "files.sha256": lambda: open_tree(copy),
    }
    array = next((copy / ".packed").glob("*-test-64.npy"))
    targets |= {array: lambda: verify_packed(array), array.with_suffix(".json"): lambda: verify_packed(array)}
    refused = 0
    for path, read in targets.items():
        whole = path.read_bytes()
        for _ in range(34):
            path.write_bytes(mutated(whole, rng))
            error = error_of(read)
            refused += error is not None
            assert "\n" not in str(error)
        path.write_bytes(whole)
        read()
    assert refused > 180


def test_weights_that_would_run_code(tmp_path: Path) -> None:
    torch.save({"fc.weight": Canary(tmp_path / "canary")}, tmp_path / "weights.pt")
    settings = Model(arch="resnet18", weights=str(tmp_path / "weights.pt"))
    error = error_of(lambda: load_weights(build("resnet18", 10, "bn+head", seed=0), settings))
    assert isinstance(error, UserError)
    assert "not a file of weights" in str(error)
    assert not (tmp_path / "canary").exists()
