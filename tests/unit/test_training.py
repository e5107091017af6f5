"""Sums, checkpoints and the run directory."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_eurosat.cluster.world import SharedError, World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config, Model, Optim, Train
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.convolution import Convolution
from hvd_eurosat.model.resnet import build
from hvd_eurosat.run.directory import RunDirectory
from hvd_eurosat.run.journal import Journal
from hvd_eurosat.run.saver import Saver
from hvd_eurosat.train import train
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.checkpoint_folder import CheckpointFolder
from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.training.gradients import GradientBuckets
from hvd_eurosat.training.metrics import Evaluation, Sums
from hvd_eurosat.training.optimiser import build_optimiser
from hvd_eurosat.training.precision import Precision, choose_precision
from hvd_eurosat.training.schedule import rate_share
from hvd_eurosat.training.state import TrainingState, digest
from hvd_eurosat.training.step import sample_losses
from hvd_eurosat.weights.loading import read_weights
from hvd_eurosat.weights.stored import Blob, read_record
from tests.unit.conftest import Canary, Grow


def test_class_weights_leave_the_smoothed_target_the_best_answer() -> None:
    """Which is 0.9 on the sample's own class here, whatever a rare class weighs: there the gradient is 0."""
    labels, weights = torch.tensor([0, 1, 2, 2]), torch.tensor([0.5, 1.0, 100.0])
    target = 0.85 * torch.eye(3)[labels] + 0.05
    logits = target.log().requires_grad_()
    losses = sample_losses(logits.log_softmax(1), labels, weights, smoothing=0.15)
    losses.sum().backward()
    torch.testing.assert_close(losses, weights[labels] * -(target * target.log()).sum(1))
    torch.testing.assert_close(logits.grad, torch.zeros(4, 3), atol=1e-5, rtol=0)
    unweighted = sample_losses(logits.log_softmax(1), labels, None, smoothing=0.15)
    torch.testing.assert_close(losses, weights[labels] * unweighted)


def test_optimiser_has_the_trainable_parameters_and_spares_batch_norm_from_decay() -> None:
    optimiser = build_optimiser(build("resnet50", 10, "bn+head", seed=0), Optim(weight_decay=0.1))
    sizes = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimiser.param_groups}
    assert sizes == {0.1: 20_480, 0.0: 53_120}


def test_learning_rates_by_depth() -> None:
    """The head's first, whose rate is reported; layer4 begins after 2 epochs, the stem, at 1/32, after 10."""
    optim = Optim(layer_decay=0.5, unfreeze_epochs=2, weight_decay=0.1)
    groups = build_optimiser(build("resnet18", 10, "all", seed=0), optim).param_groups
    assert [group["depth"] for group in groups] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert {tuple(p.shape) for group in groups[-2:] for p in group["params"]} == {(64, 3, 7, 7), (64,)}
    assert [rate_share(optim, depth, 4) for depth in range(6)] == [1, 0.5, 0.25, 0, 0, 0]
    assert rate_share(optim, 5, 10) == 1 / 32


def test_accuracy_line() -> None:
    confusion = torch.tensor([[130, 5], [5, 130]])
    assert Evaluation(0.1, confusion, torch.zeros(3, 15)).line("test") == "test accuracy: 96.30% (260/270)"


@pytest.fixture
def state() -> Checkpoint:
    model = build("resnet18", 2, "head", seed=0)
    optimiser = build_optimiser(model, Optim())
    return Checkpoint(
        model=model.state_dict(),
        frozen=[name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        optimiser=optimiser.state_dict(),
        rank_buffers=torch.zeros(2, 3),
        sums=torch.zeros(2, 4, dtype=torch.float64),
        epoch=1,
        samples=0,
        step=10,
        config=Config().model_dump(mode="json"),
        classes=["a", "b"],
        digest="d",
        precision="fp32",
        history=[{"event": "valid", "epoch": 1, "accuracy": 0.5}],
    )


def at(state: Checkpoint, epoch: int, accuracy: float, samples: int = 0) -> Checkpoint:
    """The state at another time."""
    history = [{"event": "valid", "epoch": epoch, "accuracy": accuracy}]
    return dataclasses.replace(state, epoch=epoch, samples=samples, step=10 * epoch + samples, history=history)


def test_training_on_leaves_the_checkpoint_as_it_was(tmp_path: Path) -> None:
    config = load(["--run.dir", str(tmp_path), "--model.arch", "resnet18"])
    tree = Tree(tmp_path, ("a", "b"), "d", synthetic=False, image_size=48, checksums=Checksums.of({}))
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    model = build("resnet18", 2, "head", seed=0)
    state = TrainingState(world, config, tree, model, Precision("fp32"))

    def update() -> None:
        model.fc.weight.grad = torch.ones_like(model.fc.weight)
        state.optimiser.step()

    update()
    saved = state.snapshot()
    assert saved is not None
    assert saved.image_side == 48
    first = copy.deepcopy(saved)
    state.restore(saved)
    update()
    assert not torch.equal(model.fc.weight, first.model["fc.weight"])
    for name in ("model", "optimiser"):
        torch.testing.assert_close(getattr(saved, name), getattr(first, name), rtol=0, atol=0)


class Twins(World):
    """Two ranks of equal gradients, in place of Horovod's."""

    def start_sum(self, tensor: torch.Tensor, name: str) -> int:
        tensor.mul_(2)
        return 0

    def finish_sum(self, handle: int) -> None:
        pass


def test_gradients_stay_with_their_rank_within_no_sync() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    world = Twins(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"), threads=1)
    buckets = GradientBuckets(world, [parameter], notes=1)

    def gradient() -> float:
        buckets.zero()
        parameter.sum().backward()
        buckets.wait()
        assert parameter.grad is not None
        return parameter.grad.mean().item()

    assert gradient() == 2
    with buckets.no_sync():
        assert gradient() == 1
    assert gradient() == 2


def never(message: str) -> None:
    raise AssertionError(message)


def test_checkpoint_round_trip(tmp_path: Path, state: Checkpoint) -> None:
    CheckpointFolder(tmp_path, keep=1).add(state)
    loaded = checkpoint.load(tmp_path / "epoch-0001.pt")
    assert all(torch.equal(tensor, loaded.model[name]) for name, tensor in state.model.items())
    assert loaded.history == state.history
    assert loaded.config == state.config
    names = sorted(path.name for path in tmp_path.iterdir())
    frozen = next(name for name in names if name.startswith("frozen-"))
    assert names == ["best.json", "epoch-0001.json", "epoch-0001.pt", frozen, "last.json"]
    assert (tmp_path / frozen).stat().st_size > 44e6
    assert (tmp_path / "epoch-0001.pt").stat().st_size < 2e5


def test_nothing_damaged_is_read(tmp_path: Path, state: Checkpoint) -> None:
    """Truncated, a byte flipped anywhere, of a checkpoint and of its frozen weights: the one before is taken."""
    rng = random.Random(0)
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.add(state)
    folder.add(at(state, 2, 0.6))
    path = tmp_path / "epoch-0002.pt"
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, len(whole) // 2, len(whole) - 1)]
    for _ in range(100):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"epoch-0002\.pt: damaged"):
            checkpoint.load(path)
    reports: list[str] = []
    newest = folder.newest(reports.append)
    assert newest is not None
    assert newest.epoch == 1
    assert len(reports) == 1
    assert "epoch-0002.pt: damaged" in reports[0]
    (tmp_path / "epoch-0001.pt").write_bytes(damaged[0])
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        folder.newest(reports.append)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        folder.newest(never)


def of_seed(state: Checkpoint, seed: int = 0, **model: str) -> Checkpoint:
    """The state as of a run of this seed and these settings of the model, its own without any."""
    config = Config(
        model=Model(**{"arch": "resnet18", "weights": "none", "trainable": "head"} | model), train=Train(seed=seed)
    )
    return dataclasses.replace(state, config=config.model_dump(mode="json"))


@pytest.mark.parametrize("damage", [lambda whole: whole[:9], lambda whole: whole[:-1] + b"?", None])
def test_frozen_weights_are_made_again(
    tmp_path: Path, state: Checkpoint, damage: Callable[[bytes], bytes] | None
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    state = of_seed(state)
    folder.add(state)
    folder.add(at(state, 2, 0.4))
    frozen = next(tmp_path.glob("frozen-*"))
    whole = frozen.read_bytes()
    frozen.unlink()
    if damage:
        frozen.write_bytes(damage(whole))
    best = folder.best_model(never)  # which takes no frozen weights
    assert best.keys() == state.model.keys() - set(state.frozen)
    reports: list[str] = []
    newest = folder.newest(reports.append)
    assert newest is not None
    assert newest.epoch == 2
    assert all(torch.equal(tensor, newest.model[name]) for name, tensor in state.model.items())
    assert frozen.read_bytes() == whole
    (report,) = reports
    assert report.endswith("; it was made again from model.weights none")


def test_frozen_weights_that_cannot_be_made_again_cost_no_checkpoint(
    tmp_path: Path, state: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be put back."""

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    for name, other, message in (
        ("seed", of_seed(state, seed=1), "model.weights gives others now: put either back as it was"),
        ("file", of_seed(state, weights="/nowhere.pt"), r"cannot be made again: model\.weights /nowhere\.pt"),
        ("net", of_seed(state, weights="imagenet"), "cannot be made again: cannot fetch the ImageNet weights"),
    ):
        folder = CheckpointFolder(tmp_path / name, keep=1)
        folder.folder.mkdir()
        folder.add(other)
        frozen = next(folder.folder.glob("frozen-*"))
        away = frozen.rename(tmp_path / "away")
        with pytest.raises(UserError, match=message):
            folder.newest(never)
        away.rename(frozen)
        assert folder.newest(never) is not None


def test_the_best_checkpoint_keeps_its_temperatures(tmp_path: Path, state: Checkpoint) -> None:
    """It alone; and where its run goes on with it."""
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch, accuracy in ((1, 0.9), (2, 0.6)):
        folder.add(at(state, epoch, accuracy))
    assert folder.temperature(1) == 1
    folder.calibrate_best({1: 1.5, 8: 1.25})
    best, last = (checkpoint.load(tmp_path / name) for name in ("best.json", "last.json"))
    assert [best.temperature(views) for views in (1, 8)] == [1.5, 1.25]
    assert last.temperature(1) == 1
    folder.add(best)
    assert CheckpointFolder(tmp_path, keep=2).temperature(8) == 1.25


@pytest.mark.parametrize("temperature", ["0", "-1", "1e999", '"warm"'])
def test_a_temperature_that_is_none_is_damage(tmp_path: Path, state: Checkpoint, temperature: str) -> None:
    CheckpointFolder(tmp_path, keep=1).add(state)
    path = tmp_path / "epoch-0001.json"
    path.write_text(path.read_text().replace('"temperatures": {}', f'"temperatures": {{"1": {temperature}}}'))
    with pytest.raises(UserError, match=r"epoch-0001\.json: damaged"):
        checkpoint.load(tmp_path / "epoch-0001.pt")


def test_a_damaged_file_of_frozen_weights_is_not_taken_for_whole(tmp_path: Path, state: Checkpoint) -> None:
    CheckpointFolder(tmp_path, keep=1).add(state)
    frozen = next(tmp_path.glob("frozen-*"))
    frozen.write_bytes(b"")
    CheckpointFolder(tmp_path, keep=1).add(at(state, 2, 0.6))
    assert checkpoint.load(tmp_path / "epoch-0002.pt").epoch == 2


def test_the_next_best_is_taken_where_the_best_is_damaged(tmp_path: Path, state: Checkpoint) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch, accuracy in ((1, 0.9), (2, 0.7), (3, 0.8)):
        weights = {**state.model, "fc.weight": torch.full_like(state.model["fc.weight"], epoch)}
        folder.add(dataclasses.replace(at(state, epoch, accuracy), model=weights))
    (tmp_path / "epoch-0001.pt").write_bytes(b"")
    reports: list[str] = []
    assert folder.best_model(reports.append)["fc.weight"][0, 0] == 3
    assert "epoch-0001.pt: damaged" in reports[0]
    assert json.loads((tmp_path / "best.json").read_text())["file"] == "epoch-0003.pt"


def test_what_a_killed_job_left_out_is_put_right(tmp_path: Path, state: Checkpoint) -> None:
    """It was killed after the last epoch's .json: before the pointers, and before the copy for good."""
    numbered = tmp_path / "numbered"
    numbered.mkdir()

    def folder() -> CheckpointFolder:
        return CheckpointFolder(tmp_path, keep=2, numbered=numbered)

    pointers = [tmp_path / "last.json", tmp_path / "best.json"]
    folder().add(at(state, 1, 0.5))
    before = [pointer.read_text() for pointer in pointers]
    folder().add(at(state, 2, 0.9))
    after = [pointer.read_text() for pointer in pointers]
    for pointer, text in zip(pointers, before, strict=True):
        pointer.write_text(text)
    written = (tmp_path / "epoch-0002.pt").stat().st_mtime_ns
    for path in (*numbered.glob("model_checkpoint_1.*"), numbered / "model_checkpoint_2.json"):
        path.unlink()
    start = folder().newest(never)
    assert start is not None
    folder().add(start)
    assert [pointer.read_text() for pointer in pointers] == after
    assert [checkpoint.load(numbered / f"model_checkpoint_{n}.pt").step for n in (1, 2)] == [10, 20]
    assert (tmp_path / "epoch-0002.pt").stat().st_mtime_ns == written


def test_a_name_is_not_taken_for_the_checkpoint(tmp_path: Path, state: Checkpoint) -> None:
    """Another run's of the same epoch and step, in the run's folder and in that of the numbered ones."""
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    other = {**state.model, "fc.weight": state.model["fc.weight"] + 1}
    for model in (other, state.model):
        CheckpointFolder(tmp_path, keep=2, numbered=numbered).add(dataclasses.replace(state, model=model))
    for path in (tmp_path / "epoch-0001.pt", numbered / "model_checkpoint_1.pt"):
        assert torch.equal(checkpoint.load(path).model["fc.weight"], state.model["fc.weight"])


def test_a_checkpoint_of_the_version_before_is_read(tmp_path: Path, state: Checkpoint) -> None:
    """It has no seconds."""
    CheckpointFolder(tmp_path, keep=1).add(state)
    path = tmp_path / "epoch-0001.pt"
    fields = torch.load(path, weights_only=True)
    del fields["seconds"]
    torch.save(fields, path)
    record = read_record(path).model_copy(update={"content": Blob.of(path.name, path.read_bytes())})
    path.with_suffix(".json").write_text(record.model_dump_json())
    assert checkpoint.load(path).seconds == 0


@pytest.mark.parametrize("field", ["model", "optimiser", "history"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, state: Checkpoint, field: str) -> None:
    """A forger writes the right digest, too."""
    CheckpointFolder(tmp_path, keep=1).add(state)
    path = tmp_path / "epoch-0001.pt"
    torch.save({**torch.load(path, weights_only=True), field: Canary(tmp_path / "canary")}, path)
    record = read_record(path)
    forged = record.model_copy(update={"content": Blob.of(path.name, path.read_bytes())})
    path.with_suffix(".json").write_text(forged.model_dump_json())
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="not a checkpoint"):
        read_weights(path)
    assert not (tmp_path / "canary").exists()


def test_resuming_as_another_run_is_refused_by_name(state: Checkpoint) -> None:
    other = ["--train.epochs", "99", "--run.keep", "2", "--data.cache_dir", "elsewhere"]
    state.check_resumable(load(other), ["a", "b"], "d")
    with pytest.raises(UserError, match=r"model\.arch was 'resnet50' and is 'resnet18' now"):
        state.check_resumable(load(["--model.arch", "resnet18"]), ["a", "b"], "d")
    with pytest.raises(UserError, match=r"optim\.schedule_epochs was 0 and is 99 now"):
        state.check_resumable(load(["--train.epochs", "99", "--optim.schedule_epochs", "99"]), ["a", "b"], "d")
    state.check_resumable(load(["--train.epochs", "99", "--optim.schedule_epochs", "15"]), ["a", "b"], "d")
    with pytest.raises(UserError, match=r"knows the classes a, b \(give them, or another run\.dir\)"):
        state.check_resumable(load([]), ["a", "c"], "d")
    with pytest.raises(UserError, match=r"not those that the run began with \(give those, or another run\.dir\)"):
        state.check_resumable(load([]), ["a", "b"], "e")


def test_what_has_moved_is_the_same(tmp_path: Path, state: Checkpoint) -> None:
    """Images wherever they are now, which the digest names, and a file of weights with the same content."""
    for name, content in (("w.pt", b"weights"), ("moved.pt", b"weights"), ("other.pt", b"others")):
        (tmp_path / name).write_bytes(content)
    was = load(["--model.weights", str(tmp_path / "w.pt"), "--model.layers", "layers.json"])
    digest = hashlib.sha256(b"weights").hexdigest()
    saved = dataclasses.replace(state, config=was.model_dump(mode="json"), weights=digest)

    def check(weights: str, root: str = "data", layers: str = "layers.json", saved: Checkpoint = saved) -> None:
        words = ["--model.weights", str(tmp_path / weights), "--data.root", root, "--model.layers", layers]
        saved.check_resumable(load(words), ["a", "b"], "d")

    check("w.pt", root="elsewhere")
    check("w.pt", layers="elsewhere/layers.json")
    check("moved.pt")
    (tmp_path / "w.pt").unlink()
    check("w.pt")  # all that it held is in the checkpoint
    for weights in ("other.pt", "missing.pt"):
        with pytest.raises(UserError, match=rf"cannot resume: model\.weights was .*w\.pt' and is .*{weights}' now"):
            check(weights)
    of_before = dataclasses.replace(saved, weights=None)
    check("x/../w.pt", saved=of_before)  # another spelling
    with pytest.raises(UserError, match=r"cannot resume: model\.weights was "):
        check("moved.pt", saved=of_before)
    with pytest.raises(UserError, match=r"cannot resume: model\.layers was 'layers\.json' and is None now"):
        saved.check_resumable(load(["--model.weights", str(tmp_path / "w.pt")]), ["a", "b"], "d")


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_where_all_has_moved(
    alone: World, grow: Grow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images, copied and so of another time, its weights and its own folder; but not with other images."""
    for split in SPLITS:
        grow(f"was/data/{split}", {"Forest": 4, "River": 4}, size=(32, 32))
    weights = build("resnet18", 7, "all", seed=1).state_dict()
    torch.save(weights, tmp_path / "was" / "w.pt")

    def run(folder: str, epochs: int) -> str:
        places = {"data.root": "data", "model.weights": "w.pt", "run.dir": "run"}
        flags = [word for key, name in places.items() for word in (f"--{key}", str(tmp_path / folder / name))]
        flags += ["--model.arch", "resnet18", "--train.batch_size", "8", "--train.precision", "fp32"]
        flags += ["--data.image_size", "32", "--optim.schedule_epochs", "2", "--train.epochs", str(epochs)]
        assert train(alone, load(flags)) == 0
        return capsys.readouterr().out

    out = run("was", 1)
    assert "weights      120 tensors; its head of 7 units is left out, for there are 2 classes\n" in out
    shutil.copytree(tmp_path / "was", tmp_path / "now", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "was")
    shutil.rmtree(tmp_path / "now" / "data" / ".packed")
    out = run("now", 2)
    assert "resuming after epoch 1" in out
    assert "left out" not in out
    first = tmp_path / "now" / "data" / "train" / "Forest"
    (first / "Forest_1.jpg").write_bytes((first / "Forest_2.jpg").read_bytes())
    with pytest.raises(UserError, match=r"the images of .*/now/data are not those that the run began with"):
        run("now", 3)


def test_frozen_weights_are_made_again_from_a_file_that_has_moved(tmp_path: Path, state: Checkpoint) -> None:
    weights = build("resnet18", 2, "head", seed=5).state_dict()
    torch.save(weights, tmp_path / "moved.pt")
    model = {"arch": "resnet18", "weights": str(tmp_path / "gone.pt"), "trainable": "head"}
    config = {**state.config, "model": {**state.config["model"], **model}}
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.folder.mkdir()
    folder.add(dataclasses.replace(state, config=config, model=weights))
    (frozen,) = folder.folder.glob("frozen-*")
    frozen.unlink()
    with pytest.raises(UserError, match=r"cannot be made again: model\.weights .*gone\.pt: No such file"):
        folder.newest(never)
    reports: list[str] = []
    assert folder.newest(reports.append, str(tmp_path / "moved.pt")) is not None
    assert reports[0].endswith(f"it was made again from model.weights {tmp_path / 'moved.pt'}")


def test_a_checkpoint_of_another_version_is_not_resumed(state: Checkpoint) -> None:
    state.check_resumable(load([]), ["a", "b"], "d")
    state.config["optim"]["reduction"] = "adasum"
    with pytest.raises(
        UserError, match=r"another version of hvd_eurosat \(see optim\.reduction\): use another run\.dir"
    ):
        state.check_resumable(load([]), ["a", "b"], "d")


def test_folder_keeps_the_newest_and_the_best(tmp_path: Path, state: Checkpoint) -> None:
    """Of 20 saves, some between epochs."""
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in range(1, 11):
        folder.add(at(state, epoch, 0.9 if epoch == 2 else epoch / 20))
        best = 1 if epoch == 1 else 2
        assert (tmp_path / f"epoch-{best:04d}.pt").exists()
        folder.add(at(state, epoch, 0.99, samples=5))
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["epoch-0002.pt", "epoch-0010-step-00000105.pt", "epoch-0010.pt"]
    last, best = (json.loads((tmp_path / name).read_text()) for name in ("last.json", "best.json"))
    assert last == {"file": "epoch-0010-step-00000105.pt", "epoch": 10, "step": 105, "metric": None}
    assert best == {"file": "epoch-0002.pt", "epoch": 2, "step": 20, "metric": 0.9}


def test_what_is_newer_than_the_start_is_removed(tmp_path: Path, state: Checkpoint) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch, accuracy in ((1, 0.5), (2, 0.6), (3, 0.9)):
        folder.add(at(state, epoch, accuracy))
    folder.cut(20)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["epoch-0002.pt"]
    assert [json.loads((tmp_path / name).read_text())["step"] for name in ("last.json", "best.json")] == [20, 20]
    folder.cut(15)
    folder.add(at(state, 1, 0.5, samples=5))
    assert json.loads((tmp_path / "last.json").read_text())["file"] == "epoch-0001-step-00000015.pt"


def test_a_lock_is_waited_for_as_long_as_told(tmp_path: Path) -> None:
    config = load(["--run.dir", str(tmp_path)])
    first = RunDirectory(config, never, 0.0, lambda: None)
    with pytest.raises(UserError, match="in use by another job"):
        RunDirectory(config, never, 0.0, lambda: None)
    RunDirectory(config, never, 5.0, first.close).close()


@pytest.mark.parametrize(
    ("name", "stays"), [("epoch-0002.pt", True), ("last.json", True), ("epoch-0001.pt", False), ("best.json", False)]
)
def test_a_run_goes_on_in_place_from_its_newest_checkpoint(
    tmp_path: Path, state: Checkpoint, name: str, stays: bool
) -> None:
    folder = tmp_path / "run"
    resume = folder / "checkpoints" / name
    config = load(["--run.dir", str(folder), "--run.resume", str(resume), "--model.arch", "resnet18"])
    directory = RunDirectory(config, lambda _: None, 0.0, lambda: None)
    for epoch, accuracy in ((1, 0.9), (2, 0.5)):
        directory.checkpoints.add(
            dataclasses.replace(at(state, epoch, accuracy), config=config.model_dump(mode="json"))
        )
    (folder / "metrics.jsonl").touch()
    tree = Tree(folder, tuple(state.classes), state.digest, synthetic=False, image_size=64, checksums=Checksums.of({}))
    assert directory.start(config, tree) is not None
    directory.close()
    assert (folder / "metrics.jsonl").exists() == stays
    assert Path(f"{folder}.1").exists() != stays


def a_run(tmp_path: Path, *words: str) -> tuple[Config, RunDirectory, Tree]:
    """A run directory, opened, and what its runs are of."""
    config = load(["--run.dir", str(tmp_path / "run"), "--model.arch", "resnet18", *words])
    tree = Tree(tmp_path, ("a", "b"), "d", synthetic=False, image_size=64, checksums=Checksums.of({}))
    return config, RunDirectory(config, lambda _: None, 0.0, lambda: None), tree


def test_tensorboard_reads_as_one_undisturbed_run(tmp_path: Path, state: Checkpoint) -> None:
    """What was recorded before the checkpoint stays; what came after it is recorded anew, and counts once."""
    _, directory, _ = a_run(tmp_path)
    directory.begin(None)
    for epoch, loss in ((1, 0.5), (2, 0.25), (3, 0.125)):
        directory.record("valid", epoch, loss=loss)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    file.rename(file.with_name(re.sub(r"\d{10}", "0000000001", file.name, count=1)))  # as if of an earlier second
    directory.begin(at(state, 2, 0.5))
    directory.record("valid", 3, loss=0.75)
    directory.close()
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss/valid")] == [(1, 0.5), (2, 0.25), (3, 0.75)]


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize(
    ("name", "content", "aside"),
    [
        ("checkpoints/epoch-0001.pt", "", True),
        ("summary.json", '{"epochs": 1}', True),
        ("metrics.jsonl", '{"event": "start"}\n{"event": "train"}\n', True),
        ("metrics.jsonl", '{"event": "start"}\n', False),
        ("slurm-17.out", "", False),
    ],
)
def test_a_new_run_overwrites_nothing_of_another(
    tmp_path: Path, resume: str, name: str, content: str, aside: bool
) -> None:
    """Whatever of it is left in the folder."""
    config, directory, tree = a_run(tmp_path, "--run.resume", resume)
    (tmp_path / "run" / name).write_text(content)
    assert directory.start(config, tree) is None
    directory.close()
    assert (tmp_path / "run.1" / name).exists() == aside
    assert (tmp_path / "run" / name).exists() != aside
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_a_new_run_overwrites_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    """Numbered checkpoints, predictions and logs of another; what else lies there stays."""
    places = {"numbered_checkpoints": "saved", "predictions": "predicted", "outfile": "out.txt"}
    words = [word for key, place in places.items() for word in (f"--run.{key}", str(tmp_path / place))]
    files = ["saved/model_checkpoint_1.pt", "saved/model_checkpoint_1.json", "predicted/predictions.csv"]
    begun = tmp_path / "saved" / "model_checkpoint_2.pt"  # with it this run begins
    config, directory, tree = a_run(tmp_path, *words, "--run.resume", "never", "--model.weights", str(begun))
    for name in (*files, "saved/model.h5", "saved/model_checkpoint_2.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("another's")
    log = "time epoch batch loss gradient_norm learning_rate\n1.0 1 1 2.3 0.5 0.1\n"
    (tmp_path / "out_train.txt").write_text(log)
    directory.start(config, tree)
    directory.close()
    for name in files:
        folder, _, file = name.partition("/")
        assert (tmp_path / folder / "earlier.1" / file).read_text() == "another's"
        assert not (tmp_path / name).exists()
    assert (tmp_path / "saved" / "model.h5").exists()
    assert begun.exists()
    assert (tmp_path / "saved" / "earlier.1" / begun.name).exists()
    assert (tmp_path / "earlier.1" / "out_train.txt").read_text() == log


ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)


def test_an_interrupted_epoch_counts_as_one(tmp_path: Path, state: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 images in 100 s on one rank, in 8 steps after the 10 of epoch 1; the other 32 on any number of ranks."""
    monkeypatch.setattr("hvd_eurosat.data.tree.Tree.files", lambda *_: [])
    config, directory, tree = a_run(tmp_path, "--run.outfile", str(tmp_path / "out.txt"))
    directory.close()
    steps = [(epoch, step) for epoch in (1, 2) for step in range(1, 11)]
    lines = [f"{n}.0 {epoch} {step} 2.3 0.5 0.1\n" for n, (epoch, step) in enumerate(steps)]
    (tmp_path / "out_train.txt").write_text("".join(["time epoch batch loss gradient_norm learning_rate\n", *lines]))
    history = [{"event": kind, "epoch": 1, "step": 10, "accuracy": 0.5} for kind in ("train", "valid")]
    part = dataclasses.replace(state, samples=40, step=18, seconds=100.0, history=history)
    journal = Journal(ALONE, config, tree)
    journal.begin(part, {}, part)
    journal.begin_epoch(2, 1)
    outfile = journal._outfile
    assert outfile is not None
    outfile.stepped(2, torch.zeros(()), torch.zeros(()), 0.1)
    journal.save(part)
    journal.saved()
    journal.trained(72, [])
    journal.save(dataclasses.replace(part, samples=72, step=19))
    sums = Sums(ALONE)
    journal.validated(2, 19, 0.1, sums, Evaluation(0.1, torch.eye(2, dtype=torch.int64), torch.ones(3, 15)))
    rows = [line.split()[1:3] for line in (tmp_path / "out_train.txt").read_text().splitlines()[1:]]
    assert rows == [[str(epoch), str(step)] for epoch, step in [*steps[:18], (2, 9)]]
    for step in (18, 19):
        saved = checkpoint.load(config.run.path / "checkpoints" / f"epoch-0001-step-{step:08d}.pt")
        assert 100 <= saved.seconds < 200
    trained = json.loads((config.run.path / "metrics.jsonl").read_text().splitlines()[-2])
    assert trained["images_per_second"] * trained["seconds"] == pytest.approx(72)
    assert 100 < trained["seconds"] < 200
    journal.begin_epoch(3, 1)
    journal.trained(72, [])
    assert journal._seconds() < 100
    journal.close()


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "f") as file:
        file.writelines([b"new", "not bytes"])  # type: ignore[list-item]
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that loses its power may keep the name and not the content."""
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        facts = os.fstat(handle)
        done.append("the folder" if stat.S_ISDIR(facts.st_mode) else f"{facts.st_size} bytes")
        sync(handle)

    def renamed(source: str, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "f", "new")
    assert done == ["3 bytes", "renamed", "the folder"]


def test_a_failing_save_is_a_run_error(state: Checkpoint) -> None:
    with pytest.raises(RunError, match=r"cannot write /proc/frozen-"):
        CheckpointFolder(Path("/proc"), keep=1).add(state)


@pytest.mark.parametrize(("stop_at_once", "failures"), [(True, 1), (False, 3)])
def test_saving_fails_in_the_background(state: Checkpoint, stop_at_once: bool, failures: int) -> None:
    reports: list[str] = []
    saver = Saver(CheckpointFolder(Path("/proc"), keep=1), stop_at_once, reports.append)
    for _ in range(failures):
        saver.save(state)
    with pytest.raises(RunError, match="cannot write"):
        saver.wait()
    assert len(reports) == failures


def test_a_digest_tells_ranks_apart() -> None:
    """One bit of one weight, and weights in another order."""
    weights = torch.randn(100_000)
    other = weights.clone()
    other.view(torch.int32)[70_000] ^= 1
    swapped = weights[torch.arange(100_000) ^ 1]
    assert len({int(digest([w], torch.device("cpu"))) for w in (weights, other, swapped)}) == 3


def one_network_each(ranks: int) -> list[TrainingState]:
    """The states, after one step, of ranks that are threads: `stack` brings them together."""
    barrier, parts = threading.Barrier(ranks), {}

    class Rank(World):
        def stack(self, tensor: torch.Tensor) -> torch.Tensor:
            parts[self.rank] = tensor
            barrier.wait(60)
            return torch.stack([parts[rank] for rank in range(ranks)])

    states = []
    for rank in range(ranks):
        world = Rank(rank, ranks, rank, ranks, torch.device("cpu"), threads=1)
        model = build("resnet18", 2, "head", seed=0)
        tree = Tree(Path("tree"), ("a", "b"), "d", synthetic=False, image_size=64, checksums=Checksums.of({}))
        state = TrainingState(world, Config(), tree, model, Precision("bf16"))
        state.seal()
        with state.precision.autocast(world.device):
            model(torch.ones(1, 3, 32, 32)).sum().backward()
        state.optimiser.step()
        states.append(state)
    return states


def verdict(states: list[TrainingState]) -> str:
    """What all ranks say of their weights."""

    def verified(state: TrainingState) -> str:
        try:
            state.verify()
        except SharedError as error:
            return str(error)
        return "well"

    with ThreadPoolExecutor(len(states)) as threads:
        (said,) = set(threads.map(verified, states))
    return said


@pytest.mark.parametrize(
    ("ranks", "culprit", "what", "said"),
    [
        (2, 0, "frozen", "weights that do not train changed on rank 0, found at step 0"),
        (2, 1, "frozen", "weights that do not train changed on rank 1, found at step 0"),
        (2, 0, "statistics", "weights that do not train changed on rank 0, found at step 0"),
        (2, 0, "copy", "weights that do not train changed on rank 0, found at step 0"),
        (2, 0, "head", "the weights of ranks 0 and 1 differ at step 0"),
        (3, 0, "head", "the weights of rank 0 differ from the others' at step 0"),
        (3, 2, "optimiser", "the weights of rank 2 differ from the others' at step 0"),
    ],
)
def test_a_flipped_bit_is_found_and_its_rank_named(ranks: int, culprit: int, what: str, said: str) -> None:
    states = one_network_each(ranks)
    assert verdict(states) == "well"
    model, optimiser = states[culprit].model, states[culprit].optimiser
    first = model.layer1[0].conv1
    assert isinstance(first, Convolution)
    tensors = {
        "frozen": first.weight.detach(),
        "statistics": model.bn1.running_mean,
        "copy": first.prepared()[1][0],
        "head": model.fc.weight.detach(),
        "optimiser": optimiser.state[model.fc.weight]["exp_avg_sq"],
    }
    tensor = tensors[what]
    assert tensor is not None
    tensor.as_strided((1,), (1,)).view(torch.int16)[-1] ^= 1
    assert verdict(states) == said


@pytest.mark.parametrize("fast", ["bf16", "fp32"])
def test_auto_takes_the_faster_precision(monkeypatch: pytest.MonkeyPatch, fast: str) -> None:
    """Also where another process had the core in most of its products."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[fast]
    disturbed = itertools.cycle([5.0, 5.0, 0.0])
    monkeypatch.setattr(
        "hvd_eurosat.training.precision._product_seconds", lambda of: 1.0 + next(disturbed) if of == dtype else 2.0
    )
    assert choose_precision(world, "auto").name == fast
    assert {choose_precision(world, name).name for name in ("bf16", "fp32")} == {"bf16", "fp32"}
