"""Schedules, sums, checkpoints and the run directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvd_eurosat.config import Config, Optim, load
from hvd_eurosat.errors import RunError, UserError
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint, CheckpointFolder
from hvd_eurosat.training.files import replacing, write_text
from hvd_eurosat.training.metrics import Evaluation
from hvd_eurosat.training.optimiser import build_optimiser, learning_rate


def rates(optim: Optim, batch: int = 64) -> list[float]:
    return [learning_rate(optim, 10, batch, progress) for progress in (0, 0.5, 1, 2, 3, 5, 9.99)]


def test_exponential_schedule_is_per_epoch() -> None:
    optim = Optim(lr=0.05, schedule="exponential", gamma=0.95)
    assert rates(optim)[:5] == pytest.approx([0.05, 0.05, 0.05 * 0.95, 0.05 * 0.95**2, 0.05 * 0.95**3])


def test_one_cycle_is_torchs() -> None:
    optim = Optim(lr=0.1, schedule="one_cycle")
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    steps = 1000
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, cycle_momentum=False)
    for step in range(steps - 1):
        assert learning_rate(optim, 10, 64, 10 * step / (steps - 1)) == pytest.approx(
            theirs.get_last_lr()[0], rel=5e-3, abs=1e-6
        )
        optimiser.step()
        theirs.step()


def test_cosine_with_warmup_and_constant() -> None:
    warm = rates(Optim(lr=1.0, schedule="cosine", warmup_epochs=2))
    assert warm[1:4] == pytest.approx([0.25, 0.5, 1.0])
    assert warm[-1] < 0.001
    assert rates(Optim(lr=1.0, schedule="constant")) == [1.0] * 7


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_learning_rate_scaling(scaling: str, factor: float) -> None:
    optim = Optim(lr=0.1, schedule="constant", lr_scaling=scaling, reference_batch=64)
    assert learning_rate(optim, 10, 256, 3) == pytest.approx(0.1 * factor)


def test_optimiser_has_the_trainable_parameters_and_spares_batch_norm_from_decay() -> None:
    optimiser = build_optimiser(build("resnet50", 10, "bn+head", seed=0), Optim(weight_decay=0.1))
    sizes = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimiser.param_groups}
    assert sizes == {0.1: 20_480, 0.0: 53_120}


def test_accuracy_line() -> None:
    confusion = torch.tensor([[130, 5], [5, 130]])
    assert Evaluation(0.1, confusion).line("test") == "test accuracy: 96.30% (260/270)"


@pytest.fixture
def state() -> Checkpoint:
    model = build("resnet18", 2, "head", seed=0)
    optimiser = build_optimiser(model, Optim())
    return Checkpoint(
        model=model.state_dict(),
        optimiser=optimiser.state_dict(),
        rank_buffers=torch.zeros(2, 3),
        epoch=1,
        step=10,
        config=Config().model_dump(mode="json"),
        classes=["a", "b"],
        digest="d",
        precision="fp32",
        history=[{"event": "valid", "epoch": 1, "accuracy": 0.5}],
    )


def test_checkpoint_round_trip(tmp_path: Path, state: Checkpoint) -> None:
    checkpoint.save(state, tmp_path / "c.pt")
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert all(torch.equal(tensor, loaded.model[name]) for name, tensor in state.model.items())
    assert loaded.history == state.history
    assert loaded.config == state.config
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_damaged_checkpoints(tmp_path: Path, state: Checkpoint) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(state, path)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged, or not a checkpoint"):
            checkpoint.load(path)
    torch.save({"something": "else"}, path)
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load(path)


def test_resuming_as_another_run_is_refused_by_name(state: Checkpoint) -> None:
    state.check_resumable(load(["--train.epochs", "99", "--run.keep", "2"]), ["a", "b"], "d")
    with pytest.raises(UserError, match=r"model\.arch was 'resnet50' and is 'resnet18' now"):
        state.check_resumable(load(["--model.arch", "resnet18"]), ["a", "b"], "d")
    with pytest.raises(UserError, match="knows the classes a, b"):
        state.check_resumable(load([]), ["a", "c"], "d")
    with pytest.raises(UserError, match="are not those that the run began with"):
        state.check_resumable(load([]), ["a", "b"], "e")


def test_folder_keeps_the_newest_and_the_best(tmp_path: Path, state: Checkpoint) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in range(1, 7):
        folder.add(Checkpoint(**{**vars(state), "epoch": epoch}), accuracy=0.9 if epoch == 2 else epoch / 10)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["epoch-0002.pt", "epoch-0005.pt", "epoch-0006.pt"]
    assert folder.last() == {"file": "epoch-0006.pt", "epoch": 6, "metric": 0.6}
    assert folder.best() == {"file": "epoch-0002.pt", "epoch": 2, "metric": 0.9}


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "f") as file:
        file.writelines([b"new", "not bytes"])  # type: ignore[list-item]
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failing_save_is_a_run_error(state: Checkpoint) -> None:
    with pytest.raises(RunError, match=r"cannot write /proc/c\.pt"):
        checkpoint.save(state, Path("/proc/c.pt"))
