"""The main job: what it leaves behind, under every launcher; repeatability; resuming; frozen weights."""

from __future__ import annotations

import csv
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvd_eurosat.data.inputs import EUROSAT
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run.status import read_status
from hvd_eurosat.training import checkpoint
from tests.parallel.conftest import (
    TRAINED,
    Job,
    Launch,
    checkpoint_file,
    command,
    events,
    run,
    small,
    summary,
    under,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they come from elsewhere: another head, half precision."""
    model = build("resnet18", classes=200, trainable="all", seed=7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file({name: t.half().contiguous() if t.ndim == 4 else t for name, t in model.state_dict().items()}, path)
    return path


@dataclass(frozen=True)
class Finished:
    """A run of one epoch, the weights of the convolutions frozen, under a launcher that started every rank itself.

    imported: the modules of each rank.
    """

    launcher: str
    ranks: int
    job: Job
    run_dir: Path
    imported: list[set[str]]


NOTE_IMPORTS = """
import atexit, json, os, sys
path = {folder!r} + "/imported-" + os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0")) + ".json"
if sys.orig_argv[1:3] == ["-m", "hvd_eurosat.train"]:
    atexit.register(lambda: open(path, "w").write(json.dumps(sorted(sys.modules))))
"""


@pytest.fixture(scope="module", params=[("python", 1), ("mpirun", 2), ("horovodrun", 3), ("gloo", 2)], ids=str)
def finished(
    request: pytest.FixtureRequest, data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    launcher, ranks = request.param
    folder = tmp_path_factory.mktemp(launcher)
    (folder / "sitecustomize.py").write_text(NOTE_IMPORTS.format(folder=str(folder)))
    flags = small(data, folder / "run", model__weights=weights, train__epochs=1)
    job = run(command(launcher, ranks, "train", *flags), PYTHONPATH=str(folder))
    assert job.returncode == 0, job.stderr
    imported = [set(json.loads((folder / f"imported-{rank}.json").read_text())) for rank in range(ranks)]
    return Finished(launcher, ranks, job, folder / "run", imported)


def test_every_launcher(finished: Finished) -> None:
    printed, run_dir = finished.job.stdout, finished.run_dir
    assert printed.count("test accuracy: ") == 1
    assert "11,181,632 parameters, 14,720 trainable (bn+head)" in printed
    facts = summary(run_dir)
    line = f"test accuracy: {100 * facts['test_accuracy']:.2f}% ({round(20 * facts['test_accuracy'])}/20)"
    assert printed.rstrip().endswith(line)
    assert facts["world_size"] == finished.ranks
    assert (facts["parameters"], facts["trainable_parameters"]) == (11_181_632, 14_720)
    assert (facts["train_images"], facts["valid_images"], facts["test_images"]) == (80, 20, 20)
    for name in ("config.toml", "plots/learning_curves.png", "plots/confusion_matrix.png"):
        assert (run_dir / name).stat().st_size > 0
    assert list((run_dir / "tensorboard").iterdir())
    assert checkpoint_file(run_dir, "best.json").exists()
    kinds = [json.loads(line)["event"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["start", "train", "valid", "checkpoint", "test", "end"]
    status = read_status(run_dir)
    assert (status["state"], status["epoch"], status["test_accuracy"]) == ("done", 1, facts["test_accuracy"])
    assert len(status["ranks"]) == sum(status["hosts"].values()) == finished.ranks
    page = (run_dir / "index.html").read_text()
    assert f"{round(20 * facts['test_accuracy'])} of 20" in page
    assert page.count("data:image/jpeg") > 10


def test_a_rank_imports_what_it_uses(finished: Finished) -> None:
    """No rank what training does not need; matplotlib, tensorboard and jinja2 rank 0 alone."""
    main, *others = finished.imported
    for modules in (main, *others):
        assert {"torch", "horovod.torch"} <= modules
        assert ("mpi4py.MPI" in modules) == (finished.launcher in ("mpirun", "horovodrun"))
        assert not modules & {"torch._dynamo", "torchvision", "h5py"}
    assert {"matplotlib", "tensorboard", "jinja2"} <= main
    for modules in others:
        assert not modules & {"matplotlib", "tensorboard", "jinja2", "prometheus_client"}


def test_frozen_weights_stay_bit_identical(finished: Finished, weights: Path) -> None:
    before, after = load_file(weights), checkpoint.load(checkpoint_file(finished.run_dir)).model
    convolutions = [name for name, tensor in before.items() if tensor.ndim == 4]
    assert len(convolutions) == 20
    assert all(torch.equal(before[name].float(), after[name]) for name in convolutions)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_checkpoints_say_what_their_network_takes(finished: Finished) -> None:
    """With the statistics of all that it was trained on."""
    saved = checkpoint.load(checkpoint_file(finished.run_dir))
    wants = saved.wants
    assert wants.quantiles is not None
    assert wants == open_tree(Path(saved.config["data"]["root"])).inputs
    assert all(list(band) == sorted(band) for band in wants.quantiles)
    measured = {"mean": wants.mean, "std": wants.std, "quantiles": wants.quantiles}
    assert wants == EUROSAT.model_copy(update=measured)


def test_over_mpi_training_goes_before_horovods_thread(warm: str) -> None:
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
    job = run(under("mpirun", 2, warm, "-c", program))
    nicer = min(12, 19 - os.nice(0))
    assert job.stdout.strip() == f"[{nicer}, {nicer}]", job.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_ranks_share_values_of_any_size(warm: str, tmp_path: Path, launcher: str) -> None:
    program = """if True:
        import json, pathlib, sys
        import torch
        from hvd_eurosat.cluster import job
        world = job.join()
        large = torch.arange(2_500_000).view(2, -1)  # 20 MB: several messages
        of_main = world.from_main({"large": large, "none": None} if world.is_main else "another")
        of_all = world.gather(large[:, : 1000 * world.rank].T.clone())  # nothing of rank 0
        same = [torch.equal(of_main["large"], large), of_main["none"] is None]
        same += [torch.equal(t, large[:, : 1000 * n].T) for n, t in enumerate(of_all)]
        pathlib.Path(sys.argv[1], str(world.rank)).write_text(json.dumps(same))
        job.leave_together(0)
    """
    job = run(under(launcher, 3, warm, "-c", program, tmp_path))
    assert job.returncode == 0, job.stderr
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)] == [[True] * 5] * 3


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_what_ranks_have_is_added_up(warm: str, tmp_path: Path, launcher: str) -> None:
    """Not averaged, which Adam would hardly show."""
    program = """if True:
        import json, pathlib, sys
        import torch
        from hvd_eurosat.cluster import job
        world = job.join()
        gradients = torch.full((3,), 2.0**world.rank)
        sums = world.sum(gradients)
        world.finish_sum(world.start_sum(gradients, "gradients"))
        pathlib.Path(sys.argv[1], str(world.rank)).write_text(json.dumps([sums.tolist(), gradients.tolist()]))
        job.leave_together(0)
    """
    job = run(under(launcher, 3, warm, "-c", program, tmp_path))
    assert job.returncode == 0, job.stderr
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)] == [[[7.0] * 3] * 2] * 3


def curve(run_dir: Path, kind: str) -> list[tuple[object, ...]]:
    return [(e["epoch"], e["loss"], e["accuracy"]) for e in events(run_dir, kind)]


def test_same_seed_same_bits_and_resume(launch: Launch, data: Path, trained: Path, tmp_path: Path) -> None:
    """Two epochs at once, again, and one epoch resumed to two: the same weights and history."""
    for name, epochs in (("again", 2), ("resumed", 1), ("resumed", 2)):
        flags = small(data, tmp_path / name, **{**TRAINED, "train__epochs": epochs})
        job = launch("mpirun", 2, "train", *flags)
        assert job.returncode == 0, job.stderr
    assert "resuming after epoch 1" in job.stdout
    once = checkpoint.load(checkpoint_file(trained))
    for name in ("again", "resumed"):
        state = checkpoint.load(checkpoint_file(tmp_path / name))
        assert all(torch.equal(t, state.model[key]) for key, t in once.model.items()), name
        assert torch.equal(once.rank_buffers, state.rank_buffers)
        assert len(events(tmp_path / name, "start")) == 1
        for kind in ("train", "valid"):
            assert curve(tmp_path / name, kind) == curve(trained, kind)


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
    assert "only training itself writes this, and it is over: run.outfile\n" in third.stderr
    assert not list(tmp_path.glob("outfile*"))
    assert checkpoint.load(places["numbered_checkpoints"] / "model_checkpoint_1.pt").epoch == 1
    predicted = csv.DictReader((places["predictions"] / "predictions.csv").read_text().splitlines())
    right = sum(Path(row["file"]).parent.name == row["class"] for row in predicted)
    assert third.stdout.splitlines()[-1] == f"test accuracy: {100 * right / 20:.2f}% ({right}/20)"
    other = launch("python", 1, "train", *flags, "--optim.lr", "0.5", "--train.epochs", "2")
    assert other.returncode == 2
    assert "cannot resume: optim.lr was 0.01 and is 0.5 now" in other.stderr
    anew = launch("python", 1, "train", *flags, "--optim.lr", "0.5", "--run.resume", "never")
    assert anew.returncode == 0
    assert f"the earlier run is now in {tmp_path / 'run.1'}" in anew.stderr


def test_head_mode_has_one_loss_curve_on_any_number_of_ranks(launch: Launch, data: Path, tmp_path: Path) -> None:
    """horovodrun without --gloo starts mpirun, so that one number of ranks shows it all."""
    curves = []
    for launcher, ranks in (("mpirun", 1), ("mpirun", 2), ("mpirun", 4), ("horovodrun", 4)):
        keys = {"model__trainable": "head", "train__epochs": 3, "train__batch_size": 24 // ranks, "data__max_shift": 3}
        run_dir = tmp_path / f"{launcher}-{ranks}"
        job = launch(launcher, ranks, "train", *small(data, run_dir, **keys))
        assert job.returncode == 0, job.stderr
        curves.append([e["loss"] for kind in ("train", "valid") for e in events(run_dir, kind)])
    for other in curves[1:]:
        assert curves[0] == pytest.approx(other, abs=1e-5)
    assert curves[0][2] < curves[0][0] - 0.01


def test_what_the_head_sees_is_kept(launch: Launch, data: Path, tmp_path: Path) -> None:
    """On any number of ranks. A run resumed for its last epoch keeps nothing, and computes the same bits."""
    curves = []
    for ranks in (1, 2):
        keys = {"model__trainable": "head", "train__epochs": 3, "train__batch_size": 24 // ranks}
        keys |= {"data__augment": "false", "run__keep": 3}
        run_dir = tmp_path / str(ranks)
        job = launch("mpirun", ranks, "train", *small(data, run_dir, **keys))
        assert job.returncode == 0, job.stderr
        assert " kept, 0.00 GB a rank: from epoch 2 on only the head is computed\n" in job.stdout
        curves.append([e["loss"] for kind in ("train", "valid") for e in events(run_dir, kind)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    last = tmp_path / "2" / "checkpoints" / "epoch-0002.pt"
    job = launch("mpirun", 2, "train", *small(data, tmp_path / "resumed", **keys, run__resume=last))
    assert job.returncode == 0, job.stderr
    assert "only the head" not in job.stdout
    for kind in ("train", "valid"):
        assert curve(tmp_path / "resumed", kind) == curve(tmp_path / "2", kind)


def test_gradients_that_travel_in_16_bits(launch: Launch, data: Path, trained: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path, **TRAINED, optim__compression="fp16")
    job = launch("mpirun", 2, "train", *flags)
    assert job.returncode == 0, job.stderr
    losses, exact = ([event["loss"] for event in events(run_dir, "train")] for run_dir in (tmp_path, trained))
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.2)


@pytest.mark.long
def test_compiled_it_learns_the_same(data: Path, tmp_path: Path) -> None:
    """On images of two sizes, where torch by itself would compile for one."""
    (tmp_path / "sitecustomize.py").write_text("import torch._dynamo\ntorch._dynamo.config.recompile_limit = 1\n")
    keys = {"train__epochs": 2, "train__start_size": 32, "data__image_size": 48, "optim__lr": 1e-4}
    job = run(command("mpirun", 2, "train", *small(data, tmp_path / "plain", **keys)))
    assert job.returncode == 0, job.stderr
    flags = small(data, tmp_path / "compiled", **keys, train__compile="true")
    job = run(command("mpirun", 2, "train", *flags), PYTHONPATH=str(tmp_path))
    assert job.returncode == 0, job.stderr
    assert ", compiled" in job.stdout
    assert "recompile_limit" not in job.stderr
    plain, compiled = (
        [e["loss"] for kind in ("train", "valid") for e in events(tmp_path / name, kind)]
        for name in ("plain", "compiled")
    )
    assert plain == pytest.approx(compiled, abs=1e-4)


def test_where_one_rank_has_no_compiler_none_compiles(warm: str, data: Path, tmp_path: Path) -> None:
    flags = small(data, tmp_path, train__epochs=1, train__compile="true")
    one, two = (command(launcher, 1, "train", *flags, python=warm) for launcher in ("mpirun", "python"))
    job = run([*one, ":", "-np", "1", "env", "CXX=/nowhere/g++", *two])
    assert job.returncode == 0, job.stderr
    assert f", not compiled: {socket.gethostname()} has no working /nowhere/g++" in job.stdout


def test_resuming_from_a_file_in_another_run_directory(
    launch: Launch, data: Path, trained: Path, tmp_path: Path
) -> None:
    first = checkpoint_file(trained)
    flags = small(data, tmp_path / "run", **{**TRAINED, "train__epochs": 3})
    job = launch("mpirun", 2, "train", *flags, "--run.resume", str(first))
    assert job.returncode == 0, job.stderr
    assert [e["epoch"] for e in events(tmp_path / "run", "train")] == [1, 2, 3]
    assert checkpoint_file(tmp_path / "run", "best.json").exists()
    assert first.exists()


def test_training_with_sharded_validation(launch: Launch, data: Path, trained: Path, tmp_path: Path) -> None:
    """Two runs of the same bits: one validates on rank 0, one on both."""
    flags = small(data, tmp_path, **TRAINED, valid__sharded="true")
    assert launch("mpirun", 2, "train", *flags).returncode == 0
    mine, theirs = (curve(run_dir, "valid") for run_dir in (tmp_path, trained))
    for (_, loss, accuracy), (_, other_loss, other_accuracy) in zip(mine, theirs, strict=True):
        assert accuracy == other_accuracy
        assert loss == pytest.approx(other_loss, rel=1e-6)


def test_saved_statistics_are_the_average_over_the_ranks(trained: Path) -> None:
    saved = checkpoint.load(checkpoint_file(trained))
    statistics = [t for name, t in saved.model.items() if name.endswith(("running_mean", "running_var"))]
    assert saved.rank_buffers.shape[0] == 2
    assert not torch.equal(saved.rank_buffers[0], saved.rank_buffers[1])
    assert torch.equal(torch.cat(statistics), saved.rank_buffers.mean(0))


def test_images_grow_during_training(launch: Launch, data: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    keys = {
        "model__trainable": "all",
        "train__epochs": 3,
        "train__start_size": 32,
        "train__ema": 0.9,
        "data__image_size": 64,
    }
    job = launch("mpirun", 2, "train", *small(data, whole, **keys))
    assert job.returncode == 0, job.stderr
    assert "images of 64x64, in training from 32x32 on" in job.stdout
    assert [event["epoch"] for event in events(whole, "train")] == [1, 2, 3]
    smaller = whole / "checkpoints" / "epoch-0002.pt"
    job = launch("mpirun", 2, "train", *small(data, resumed, **keys, run__resume=smaller))
    assert job.returncode == 0, job.stderr
    assert curve(resumed, "valid") == curve(whole, "valid")
