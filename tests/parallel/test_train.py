"""The main job: what it leaves behind, under every launcher; repeatability; resuming; frozen weights."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.statistics import Statistics
from tests.parallel.conftest import LAUNCHERS, Launch, checkpoint_file, command, events, run, small, summary


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they come from elsewhere: another head, half precision."""
    model = build("resnet18", classes=200, trainable="all", seed=7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file({name: t.half().contiguous() if t.ndim == 4 else t for name, t in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), ("mpirun", 2), ("horovodrun", 3), ("gloo", 2)])
def test_every_launcher(launch: Launch, data: Path, weights: Path, tmp_path: Path, launcher: str, ranks: int) -> None:
    flags = small(data, tmp_path / "run", model__weights=weights, train__epochs=1)
    job = launch(launcher, ranks, "train", *flags)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("test accuracy: ") == 1
    assert "11,181,632 parameters, 14,720 trainable (bn+head)" in job.stdout
    facts = summary(tmp_path / "run")
    line = f"test accuracy: {100 * facts['test_accuracy']:.2f}% ({round(20 * facts['test_accuracy'])}/20)"
    assert job.stdout.rstrip().endswith(line)
    assert (facts["world_size"], facts["parameters"], facts["trainable_parameters"]) == (ranks, 11_181_632, 14_720)
    assert (facts["train_images"], facts["valid_images"], facts["test_images"]) == (80, 20, 20)
    for name in ("config.toml", "plots/learning_curves.png", "plots/confusion_matrix.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert checkpoint_file(tmp_path / "run", "best.json").exists()
    kinds = [json.loads(line)["event"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["start", "train", "valid", "checkpoint", "test", "end"]


def test_over_mpi_training_goes_before_horovods_thread() -> None:
    program = """if True:
        import os
        from hvd_eurosat.cluster import job
        world = job.join()
        nicest = max(os.getpriority(os.PRIO_PROCESS, int(name)) for name in os.listdir("/proc/self/task"))
        of_ranks = world.gather(nicest - os.nice(0))
        if world.is_main:
            print(of_ranks)
        job.leave_together(0)
    """
    job = run([*LAUNCHERS["mpirun"], "2", sys.executable, "-c", program])
    nicer = min(12, 19 - os.nice(0))
    assert job.stdout.strip() == f"[{nicer}, {nicer}]", job.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_ranks_share_values_of_any_size(launcher: str) -> None:
    program = """if True:
        import torch
        from hvd_eurosat.cluster import job
        world = job.join()
        large = torch.arange(2_500_000).view(2, -1)  # 20 MB: several messages
        of_main = world.from_main({"large": large, "none": None} if world.is_main else "another")
        of_all = world.gather(large[:, : 1000 * world.rank].T.clone())  # nothing of rank 0
        same = torch.equal(of_main["large"], large) and of_main["none"] is None
        print("same", same and all(torch.equal(t, large[:, : 1000 * n].T) for n, t in enumerate(of_all)), len(of_all))
        job.leave_together(0)
    """
    job = run([*LAUNCHERS[launcher], "3", sys.executable, "-c", program])
    assert job.stdout.split() == ["same", "True", "3"] * 3, job.stdout + job.stderr


def curve(run_dir: Path, kind: str) -> list[tuple[object, ...]]:
    return [(e["epoch"], e["loss"], e["accuracy"]) for e in events(run_dir, kind)]


def test_frozen_weights_stay_bit_identical(launch: Launch, data: Path, weights: Path, tmp_path: Path) -> None:
    assert launch("mpirun", 2, "train", *small(data, tmp_path, model__weights=weights, train__epochs=1)).returncode == 0
    before, after = load_file(weights), checkpoint.load(checkpoint_file(tmp_path)).model
    convolutions = [name for name, tensor in before.items() if tensor.ndim == 4]
    assert len(convolutions) == 20
    assert all(torch.equal(before[name].float(), after[name]) for name in convolutions)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_same_seed_same_bits_and_resume(launch: Launch, data: Path, tmp_path: Path) -> None:
    """Two epochs at once, again, and one epoch resumed to two: the same weights and history."""
    for name in ("once", "again"):
        flags = small(data, tmp_path / name, model__trainable="all", train__epochs=2)
        assert launch("mpirun", 2, "train", *flags).returncode == 0
    for epochs in (1, 2):
        flags = small(data, tmp_path / "resumed", model__trainable="all", train__epochs=epochs)
        job = launch("mpirun", 2, "train", *flags)
        assert job.returncode == 0, job.stderr
    assert "resuming after epoch 1" in job.stdout
    states = {name: checkpoint.load(checkpoint_file(tmp_path / name)) for name in ("once", "again", "resumed")}
    for name in ("again", "resumed"):
        assert all(torch.equal(t, states[name].model[key]) for key, t in states["once"].model.items()), name
        assert torch.equal(states["once"].rank_buffers, states[name].rank_buffers)
        assert len(events(tmp_path / name, "start")) == 1
        for kind in ("train", "valid"):
            assert curve(tmp_path / name, kind) == curve(tmp_path / "once", kind)


def test_finished_run_is_not_run_again(launch: Launch, data: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path / "run", train__epochs=1)
    first, second = launch("python", 1, "train", *flags), launch("python", 1, "train", *flags)
    assert second.returncode == 0
    assert "finished run" in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert len(events(tmp_path / "run", "train")) == 1
    places = {key: tmp_path / key for key in ("numbered_checkpoints", "outfile", "predictions")}
    more = [word for key, place in places.items() for word in (f"--run.{key}", place)]
    third = launch("mpirun", 2, "train", *flags, *more)
    assert third.returncode == 0, third.stderr
    assert "cannot be had any more: run.outfile\n" in third.stderr
    assert not list(tmp_path.glob("outfile*"))
    assert checkpoint.load(places["numbered_checkpoints"] / "model_checkpoint_1.pt").epoch == 1
    predicted = [line.split(",") for line in (places["predictions"] / "predictions.csv").read_text().splitlines()[1:]]
    right = sum(Path(path).parent.name == label for path, label, _ in predicted)
    assert third.stdout.splitlines()[-1] == f"test accuracy: {100 * right / 20:.2f}% ({right}/20)"
    other = launch("python", 1, "train", *flags, "--optim.lr", "0.5", "--train.epochs", "2")
    assert other.returncode == 2
    assert "cannot resume: optim.lr was 0.01 and is 0.5 now" in other.stderr
    anew = launch("python", 1, "train", *flags, "--optim.lr", "0.5", "--run.resume", "never")
    assert anew.returncode == 0
    assert f"the earlier run is now in {tmp_path / 'run.1'}" in anew.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_head_mode_has_one_loss_curve_on_any_number_of_ranks(
    launch: Launch, data: Path, tmp_path: Path, launcher: str
) -> None:
    curves = []
    for ranks in (1, 2, 4):
        keys = {"model__trainable": "head", "train__epochs": 3, "train__batch_size": 24 // ranks, "data__max_shift": 3}
        job = launch(launcher, ranks, "train", *small(data, tmp_path / str(ranks), **keys))
        assert job.returncode == 0, job.stderr
        curves.append([e["loss"] for kind in ("train", "valid") for e in events(tmp_path / str(ranks), kind)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)
    assert curves[0][2] < curves[0][0] - 0.01


@pytest.mark.parametrize(("keys", "near"), [({"compression": "fp16"}, 0.2), ({"reduction": "adasum"}, 1.0)])
def test_other_ways_to_add_gradients_up(
    launch: Launch, data: Path, trained: Path, tmp_path: Path, keys: dict[str, str], near: float
) -> None:
    flags = {f"optim__{key}": value for key, value in keys.items()}
    flags = small(data, tmp_path, model__trainable="all", train__epochs=2, valid__batch_size=8, **flags)
    job = launch("mpirun", 2, "train", *flags)
    assert job.returncode == 0, job.stderr
    losses, exact = ([event["loss"] for event in events(run_dir, "train")] for run_dir in (tmp_path, trained))
    assert losses != exact
    assert losses == pytest.approx(exact, abs=near)


def test_compiled_it_learns_the_same(launch: Launch, data: Path, tmp_path: Path) -> None:
    """On images of two sizes, where torch by itself would compile for one."""
    (tmp_path / "sitecustomize.py").write_text("import torch._dynamo\ntorch._dynamo.config.recompile_limit = 1\n")
    curves = []
    for compiled in ("false", "true"):
        keys = {"train__epochs": 2, "train__start_size": 48, "train__compile": compiled, "optim__lr": 1e-4}
        job = launch("mpirun", 2, "train", *small(data, tmp_path / compiled, **keys), PYTHONPATH=str(tmp_path))
        assert job.returncode == 0, job.stderr
        curves.append([e["loss"] for kind in ("train", "valid") for e in events(tmp_path / compiled, kind)])
    assert ", compiled" in job.stdout
    assert "recompile_limit" not in job.stderr
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_where_one_rank_has_no_compiler_none_compiles(data: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path, train__epochs=1, train__compile="true")
    one, two = command("mpirun", 1, "train", *flags), command("python", 1, "train", *flags)
    job = run([*one, ":", "-np", "1", "env", "CXX=/nowhere/g++", *two])
    assert job.returncode == 0, job.stderr
    assert f", not compiled: {socket.gethostname()} has no working /nowhere/g++" in job.stdout


@pytest.mark.parametrize(
    ("launcher", "ranks", "error"), [("mpirun", 3, "works on 2, 4, 8, ... ranks, not on 3"), ("gloo", 2, "needs MPI")]
)
def test_adasum_wants_a_power_of_two_and_mpi(
    launch: Launch, data: Path, tmp_path: Path, launcher: str, ranks: int, error: str
) -> None:
    job = launch(launcher, ranks, "train", *small(data, tmp_path, optim__reduction="adasum"))
    assert job.returncode != 0
    assert f"error: optim.reduction adasum {error}" in job.stderr


def test_resuming_from_a_file_in_another_run_directory(
    launch: Launch, data: Path, trained: Path, tmp_path: Path
) -> None:
    first = checkpoint_file(trained)
    flags = small(data, tmp_path / "run", model__trainable="all", train__epochs=3, valid__batch_size=8)
    job = launch("mpirun", 2, "train", *flags, "--run.resume", str(first))
    assert job.returncode == 0, job.stderr
    assert [e["epoch"] for e in events(tmp_path / "run", "train")] == [1, 2, 3]
    assert checkpoint_file(tmp_path / "run", "best.json").exists()
    assert first.exists()


def test_training_with_sharded_validation(launch: Launch, data: Path, trained: Path, tmp_path: Path) -> None:
    """Two runs of the same bits: one validates on rank 0, one on both."""
    flags = small(data, tmp_path, model__trainable="all", train__epochs=2, valid__batch_size=8, valid__sharded="true")
    assert launch("mpirun", 2, "train", *flags).returncode == 0
    mine, theirs = (curve(run_dir, "valid") for run_dir in (tmp_path, trained))
    for (_, loss, accuracy), (_, other_loss, other_accuracy) in zip(mine, theirs, strict=True):
        assert accuracy == other_accuracy
        assert loss == pytest.approx(other_loss, rel=1e-6)


def test_sharded_validation_counts_the_same(data: Path, trained: Path, tmp_path: Path) -> None:
    """20 images in batches of 7: on 4 ranks the last has none."""
    keys = {"valid__batch_size": 7, "model__trainable": "all", "model__weights": checkpoint_file(trained)}
    found = []
    for ranks in (1, 2, 3, 4):
        program = [sys.executable, "-m", "tests.parallel.validate", *small(data, tmp_path, **keys)]
        job = run([*LAUNCHERS["mpirun"], str(ranks), *program])
        assert job.returncode == 0, job.stderr
        found += [line.split()[1:] for line in job.stdout.splitlines() if line.startswith("validation ")]
    assert len(found) == 8
    losses, correct = zip(*((float(loss), int(count)) for loss, count in found), strict=True)
    assert losses == pytest.approx([losses[0]] * 8, rel=1e-6)
    assert set(correct) == {correct[0]}


def test_saved_statistics_are_the_average_over_the_ranks(trained: Path) -> None:
    saved = checkpoint.load(checkpoint_file(trained))
    model = build("resnet18", 10, "all", seed=0)
    model.load_state_dict(saved.model)
    assert saved.rank_buffers.shape[0] == 2
    assert not torch.equal(saved.rank_buffers[0], saved.rank_buffers[1])
    assert torch.equal(Statistics(model).flat, saved.rank_buffers.mean(0))


def test_evaluate_counts_the_same_on_any_number_of_ranks(launch: Launch, data: Path, trained: Path) -> None:
    best = checkpoint_file(trained, "best.json")
    for split in ("train", "valid", "test"):
        lines = set()
        for ranks in (1, 2, 3):
            job = launch("mpirun", ranks, "evaluate", "--checkpoint", best, "--data.root", data, "--split", split)
            assert job.returncode == 0, job.stderr
            lines.add(job.stdout.splitlines()[-1])
        assert len(lines) == 1, lines
    facts = summary(trained)
    assert lines == {f"test accuracy: {100 * facts['test_accuracy']:.2f}% ({round(20 * facts['test_accuracy'])}/20)"}


def test_images_grow_during_training(launch: Launch, data: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    keys = {"model__trainable": "all", "train__epochs": 3, "train__start_size": 32}
    job = launch("mpirun", 2, "train", *small(data, whole, **keys))
    assert job.returncode == 0, job.stderr
    assert "images of 64x64, in training from 32x32 on" in job.stdout
    assert [event["epoch"] for event in events(whole, "train")] == [1, 2, 3]
    smaller = whole / "checkpoints" / "epoch-0002.pt"
    job = launch("mpirun", 2, "train", *small(data, resumed, **keys, run__resume=smaller))
    assert job.returncode == 0, job.stderr
    assert curve(resumed, "valid") == curve(whole, "valid")
