"""rmldnn's files in, rmldnn's files out: a whole run under mpirun, and its predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.config.verbs import ExportSettings
from hvd_eurosat.export import export
from tests.parallel.conftest import Launch, summary

# What somebody with nothing but h5py and numpy does with the predictions.
ACCURACY = """
import sys
import h5py
import numpy as np

right = total = 0
with h5py.File(sys.argv[1]) as file:
    for label, group in enumerate(sorted(file)):
        for name in file[group]:
            right += np.argmax(file[group][name][()]) == label
            total += 1
print(f"{100 * right / total:.2f}% ({right}/{total})")
"""


def accuracy(predictions: Path) -> str:
    """As the last line of train and evaluate says it."""
    done = subprocess.run(
        [sys.executable, "-c", ACCURACY, str(predictions / "output_1.h5")], capture_output=True, text=True, check=True
    )
    return f"test accuracy: {done.stdout.strip()}"


@pytest.fixture(scope="module")
def run(launch: Launch, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The tutorial's configuration, of two epochs, on two ranks; and what was printed."""
    folder = tmp_path_factory.mktemp("rmldnn")
    images = Data(image_size=32)
    export(ExportSettings(format="keras", out=folder, data=images, model=Model(weights="none", variant="v1")))
    network = {
        "num_epochs": 3,
        "outfile": str(folder / "out.txt"),
        "layers": str(folder / "layers.json"),
        "checkpoints": {"load": str(folder / "model.h5"), "save": str(folder / "saved"), "interval": 2},
        "data": {
            "input_type": "images",
            "target_type": "labels",
            "input_path": f"{data}/train/",
            "test_input_path": f"{data}/valid/",
            "test_output_path": str(folder / "predictions"),
            "batch_size": 16,
            "test_batch_size": 8,
            "preload": True,
            "transforms": [{"random_horizontal_flip": 0.5}, {"random_rotate": 20}, {"resize": [32, 32]}],
        },
        "optimizer": {"type": "Adam", "learning_rate": 0.05, "lr_scheduler": {"type": "Exponential", "gamma": 0.95}},
        "loss": {"function": "NLL", "weight": [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]},
    }
    (folder / "config_train.json").write_text(json.dumps({"neural_network": network}))
    arguments = ("--config", folder / "config_train.json", "--run.dir", folder / "run")
    job = launch("mpirun", 2, "train", *arguments, "--train.epochs", "2")
    assert job.returncode == 0, job.stderr
    job = launch("mpirun", 2, "train", *arguments)
    assert job.returncode == 0, job.stderr
    assert "resuming after epoch 2" in job.stdout
    return folder, job.stdout


def test_checkpoints_logs_and_predictions(run: tuple[Path, str]) -> None:
    folder, printed = run
    assert sorted(path.name for path in (folder / "saved").iterdir()) == [
        "model_checkpoint_2.json",
        "model_checkpoint_2.pt",
    ]
    train, test = ((folder / f"out_{kind}.txt").read_text().splitlines() for kind in ("train", "test"))
    assert train[0] == "time epoch batch loss gradient_norm learning_rate"
    assert test[0] == "time epoch loss accuracy"
    rows = np.loadtxt(train[1:])
    assert rows[:, 1].tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert rows[:, 2].tolist() == [1, 2, 3] * 3
    assert (np.diff(rows[:, 0]) > 0).all()
    assert rows[::3, 5] == pytest.approx([0.05, 0.0475, 0.045125])
    assert np.loadtxt(test[1:])[:, 1].tolist() == [1, 2, 3]
    events = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    valid = [event["accuracy"] for event in events if event["event"] == "valid"]
    assert np.loadtxt(test[1:])[:, 3] == pytest.approx(valid)
    assert accuracy(folder / "predictions") == printed.splitlines()[-1]
    assert summary(folder / "run")["trainable_parameters"] == 73_600


def test_evaluation_by_configuration(launch: Launch, data: Path, run: tuple[Path, str]) -> None:
    folder = run[0]
    network = {
        "layers": str(folder / "layers.json"),
        "checkpoints": {"load": str(folder / "saved" / "model_checkpoint_2.pt")},
        "data": {
            "input_type": "images",
            "test_input_path": f"{data}/test/",
            "test_output_path": str(folder / "evaluated"),
            "transforms": [{"resize": [32, 32]}],
        },
    }
    path = folder / "config_test.json"
    path.write_text(json.dumps({"neural_network": network}))
    job = launch("mpirun", 2, "evaluate", "--config", path)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1] == accuracy(folder / "evaluated")
    network["data"]["transforms"] = [{"resize": [64, 64]}]  # type: ignore[index]
    path.write_text(json.dumps({"neural_network": network}))
    job = launch("mpirun", 2, "evaluate", "--config", path)
    assert job.returncode == 2
    assert job.stderr.count("error: neural_network.data.transforms mean image_size 64; the checkpoint has 32") == 1
    network["data"]["transforms"] = []  # type: ignore[index]
    path.write_text(json.dumps({"neural_network": network}))
    job = launch("python", 1, "evaluate", "--config", path)
    assert job.returncode == 2
    assert job.stderr.count(" files: 64x64 pixels; 32x32 is wanted") == 1
    resized = {"test_input_path": f"{data}/test/Forest", "transforms": [{"resize": [32, 32]}]}
    network["data"] |= resized  # type: ignore[operator]
    path.write_text(json.dumps({"neural_network": network}))
    job = launch("python", 1, "evaluate", "--config", path, "--precision", "fp32")
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-2:] == ["2 images, fp32", f"2 predictions in {folder / 'evaluated'}"]


def test_bad_files_of_weights_are_said_once(launch: Launch, data: Path, run: tuple[Path, str], tmp_path: Path) -> None:
    whole = (run[0] / "model.h5").read_bytes()
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    arguments = ("--data.root", data, "--run.dir", tmp_path / "run", "--train.batch_size", 16)
    job = launch("mpirun", 2, "train", *arguments, "--model.weights", tmp_path / "short.h5")
    assert job.returncode == 2
    assert job.stderr.count(f"error: model.weights {tmp_path / 'short.h5'}: not a whole HDF5 file") == 1
    assert not (tmp_path / "run").exists()
