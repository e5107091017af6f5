"""One rank's failure is everyone's, at once, and said once."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.parallel.conftest import Job, Launch, checkpoint_file, command, make_data, run, small


def errors(job: Job) -> list[str]:
    """The error lines, without the launcher's own words."""
    return [line for line in job.stderr.splitlines() if "error: " in line]


def test_ranks_with_differing_configurations(warm: str, data: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path)
    one = command("mpirun", 1, "train", *flags, python=warm)
    two = command("python", 1, "train", *flags, "--train.seed", 3, python=warm)
    job = run([*one, ":", "-np", "1", *two])
    assert job.returncode == 2
    assert errors(job) == ["error: the ranks differ in configuration: train.seed is 0 on rank 0, 3 on rank 1"]


def with_data_of_its_own(python: str, folder: Path, first: Path, second: Path) -> Job:
    """One mpirun job of two ranks that see different things at data/, each with its own cache."""
    script = folder / "rank.sh"
    script.write_text(
        f"cd $(mktemp -d -p {folder}) && ln -s $([ $OMPI_COMM_WORLD_RANK = 0 ] && echo {first} || echo {second}) data "
        '&& exec "$@"\n'
    )
    flags = small(Path("data"), folder / "run", data__cache_dir="cache", train__epochs=1)
    words = command("mpirun", 2, "train", *flags, python=python)
    program = words.index(python)
    return run([*words[:program], "sh", str(script), *words[program:]])


def test_ranks_with_differing_data(warm: str, data: Path, tmp_path: Path) -> None:
    job = with_data_of_its_own(warm, tmp_path, data, make_data(tmp_path / "other", seed=1))
    assert job.returncode == 2
    assert len(errors(job)) == 1
    assert errors(job)[0].startswith("error: the ranks differ in data: content is ")


def test_copies_of_the_data_are_the_same_data(warm: str, data: Path, tmp_path: Path) -> None:
    """On disks of the nodes, unzipped there at another time; unless an image is another."""
    first, second = (shutil.copytree(data, tmp_path / name, copy_function=shutil.copyfile) for name in ("a", "b"))
    for copy in (first, second):
        for name in ("manifest.json", "files.sha256"):
            (copy / name).unlink()
    assert with_data_of_its_own(warm, tmp_path, first, second).returncode == 0
    victim, other = sorted((second / "train" / "Forest").iterdir())[:2]
    victim.write_bytes(other.read_bytes())
    job = with_data_of_its_own(warm, tmp_path, first, second)
    assert job.returncode == 2
    assert len(errors(job)) == 1
    assert errors(job)[0].startswith("error: the ranks differ in data: content of train/ is ")


def test_a_bad_image_on_one_rank_alone(warm: str, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    victim = next((broken / "valid" / "Forest").iterdir())
    victim.write_bytes(victim.read_bytes()[:-200])
    job = with_data_of_its_own(warm, tmp_path, data, broken)
    assert job.returncode == 2
    assert len(errors(job)) == 1
    assert f"data/valid/Forest/{victim.name} has changed since it was prepared" in errors(job)[0]
    assert errors(job)[0].endswith(f"(on rank 1 of 2, {socket.gethostname()})")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_bad_usage_is_said_once(launch: Launch, launcher: str) -> None:
    job = launch(launcher, 2, "train", "--train.epochs", "-1")
    assert job.returncode == 2
    assert errors(job) == ["error: train.epochs: Input should be greater than 0, got '-1'"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data__root": "/nowhere"}, "no data at /nowhere"),
        ({"train__batch_size": 41}, "a rank's shard of 40 training images: give 40 or less, or start 1 rank at most"),
        ({"model__weights": "/nowhere.pt"}, "model.weights /nowhere.pt: No such file or directory"),
        ({"run__resume": "/nowhere.pt"}, "checkpoint /nowhere.pt: No such file or directory"),
        ({"run__dir": "/proc/run"}, "run.dir /proc/run: "),
    ],
)
def test_bad_input_is_said_once(
    launch: Launch, data: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    job = launch("mpirun", 2, "train", *small(data, tmp_path, **keys))
    assert job.returncode == 2
    assert len(errors(job)) == 1
    assert message in errors(job)[0]


def test_evaluate_refuses_other_classes_and_no_checkpoint(
    launch: Launch, data: Path, trained: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "valid", "test"):
        (other / split / "Forest").rename(other / split / "Jungle")
    for name in ("manifest.json", "files.sha256"):
        (other / name).unlink()
    best = checkpoint_file(trained, "best.json")
    job = launch("mpirun", 2, "evaluate", "--checkpoint", best, "--data.root", other)
    assert job.returncode == 2
    assert len(errors(job)) == 1
    assert "knows the classes AnnualCrop, Forest, " in errors(job)[0]
    job = launch("python", 1, "evaluate", "--data.root", data)
    assert job.returncode == 2
    assert errors(job) == ["error: --checkpoint is required"]


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 3), ("gloo", 2)])
def test_rank_0_fails_to_save(warm: str, data: Path, tmp_path: Path, launcher: str, ranks: int) -> None:
    """A file-size limit lets the packed images and the metrics be written, and no checkpoint."""
    flags = small(data, tmp_path / "run", model__trainable="all", train__epochs=2)
    words = command(launcher, ranks, "train", *flags, python=warm)
    job = run(["bash", "-c", 'ulimit -f 6000; exec "$@"', "-", *words], timeout=240)  # of seconds: it does not hang
    assert job.returncode == 1
    assert len(errors(job)) == 1
    assert "cannot write" in errors(job)[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("epoch-*"))
