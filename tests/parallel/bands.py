"""EuroSAT's 13 bands the whole way: prepared, trained, stopped, resumed and evaluated, in each mode, on 1 and 2 ranks.

python -m tests.parallel.bands --ms EuroSAT_MS_100.zip --out DIR

The archive is taken as it is, the network is the real ResNet-50, from made-up weights for red, green and blue, and
mpirun starts each job, of warm ranks (warm.py). A run goes on for three epochs. Its twin is stopped in the second, by a
SIGUSR1 to mpirun, and resumed: its newest checkpoint must then be the run's, to the last bit. Its best one is evaluated
on 1, 2 and 3 ranks. Prints a row for each; the exit status is 1 if one shows anything that must not be. More keys are
those of `train`. DIR is a new folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import rasterio
from safetensors.torch import save_file

from hvd_eurosat.data.inputs import LEVELS
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.errors import STOPPED
from hvd_eurosat.model.resnet import build
from tests.faults.conftest import STEP, fingerprint, launched
from tests.parallel.conftest import checkpoint_file, command, run, summary, warm_python

MODES, RANKS = ("head", "bn+head", "all"), (1, 2)
EPOCHS, BATCH = 3, 8
HANGS = 3600.0  # seconds, in which a job of a ResNet-50 is done on the busiest machine
ALL = 23_528_512 + 10 * 3_136
FIRST = 13 * 3_136  # of the first convolution, which trains with the head because the weights lack ten bands
PARAMETERS = {"head": (ALL, 20_480), "bn+head": (ALL, 73_600 + FIRST), "all": (ALL, ALL)}
ROW = "{:9} {:>5} {:>12} {:>12} {:>12} {:>15} {:>22}  {}"
HEADINGS = ("trainable", "ranks", "parameters", "that train", "stopped at", "resumed", "on 1, 2 and 3 ranks", "test")


@dataclass(frozen=True)
class Seen:
    """What became of a run.

    parameters: all, and those that train; stopped, last: the step after which it was stopped, and its last; resumed:
    whether it then was its twin; evaluated: whether counts and predictions are the same on 1, 2 and 3 ranks; test:
    the last line of `evaluate`.
    """

    parameters: tuple[int, int]
    stopped: int
    last: int
    resumed: bool
    evaluated: bool
    test: str

    def is_right(self, parameters: tuple[int, int]) -> bool:
        """Whether all is as it must be, with so many parameters."""
        inside = self.last // EPOCHS < self.stopped < self.last
        return self.parameters == parameters and inside and self.resumed and self.evaluated


def furthest(tree: Tree) -> float:
    """How far the statistics of the bands in the manifest are from numpy's, at most."""
    found = []
    for name in tree.files("train"):
        with rasterio.open(tree.path(name)) as file:
            found.append(file.read())
    pixels, axes = np.stack(found).astype(np.float64), (0, 2, 3)
    said = tree.inputs.mean, tree.inputs.std, tree.inputs.quantiles
    expected = pixels.mean(axes), pixels.std(axes), np.quantile(pixels, LEVELS, axes).T
    return max(float(np.abs(np.subtract(*both)).max()) for both in zip(said, expected, strict=True))


def rgb_weights(path: Path, arch: str) -> Path:
    """Weights for red, green and blue, which mean nothing."""
    model = build(arch, classes=10, trainable="all", seed=7)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def see(data: Path, folder: Path, trainable: str, ranks: int, words: Sequence[str], python: str) -> Seen:
    """A run and its twin, which is stopped and resumed and evaluated, below folder. Asserts that each job ends well."""
    whole, twin = folder / "whole", folder / "twin"
    keys = [*words, "--model.trainable", trainable, "--data.root", data, "--train.epochs", EPOCHS]
    keys += ["--train.batch_size", BATCH, "--run.dir"]
    steps = -(-len(open_tree(data).files("train")) // (BATCH * ranks))
    faults = {str(whole): "", str(twin): f"0 {steps + 2} {STEP} usr1-launcher"}
    job = run(
        launched("mpirun", ranks, "tests.faults.inject", *keys, whole, python=python), HANGS, FAULTS=json.dumps(faults)
    )
    assert job.returncode == STOPPED, job.stderr
    stopped = json.loads((twin / "checkpoints" / "last.json").read_text())["step"]
    resumed = run(command("mpirun", ranks, "train", *keys, twin, python=python), HANGS)
    assert resumed.returncode == 0, resumed.stderr
    facts = summary(twin)
    parameters = facts["parameters"], facts["trainable_parameters"]
    assert "{:,} parameters, {:,} trainable".format(*parameters) in job.stdout, job.stdout

    said, values = [], []
    for count in (1, 2, 3):
        out = folder / f"predictions-{count}"
        asked = ("--checkpoint", checkpoint_file(twin, "best.json"), "--data.root", data, "--out", out)
        judged = run(command("mpirun", count, "evaluate", *asked, "--batch_size", 3, python=python), HANGS)
        assert judged.returncode == 0, judged.stderr
        said.append(judged.stdout.splitlines()[-1])
        values.append((out / "output_1.h5").read_bytes())
    same = len(set(said)) == len(set(values)) == 1
    return Seen(parameters, stopped, EPOCHS * steps, fingerprint(whole) == fingerprint(twin), same, said[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=Path, required=True, help="EuroSAT's 13 bands, or a part of them")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options, words = parser.parse_known_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True)
    data = out / "data"
    job = run(command("python", 1, "prepare", "--source", options.ms, "--out", data, "--ratios", "60,20,20"))
    assert job.returncode == 0, job.stderr
    distance = furthest(open_tree(data))
    print(f"{job.stderr}{job.stdout}statistics of the bands: {distance:.1e} from numpy's at most\n")
    print(ROW.format(*HEADINGS), flush=True)

    words = [*words, "--model.weights", str(rgb_weights(out / "rgb.safetensors", "resnet50"))]
    right = [distance < 1e-6]
    with warm_python() as python:
        for trainable, ranks in product(MODES, RANKS):
            seen = see(data, out / f"{trainable}-{ranks}", trainable, ranks, words, python)
            right.append(seen.is_right(PARAMETERS[trainable]))
            numbers = (f"{number:,}" for number in seen.parameters)
            same = ("same" if one else "DIFFERENT" for one in (seen.resumed, seen.evaluated))
            where = f"{seen.stopped} of {seen.last}"
            print(ROW.format(trainable, ranks, *numbers, where, *same, seen.test.rpartition(": ")[2]), flush=True)
    print("all as it must be" if all(right) else "NOT as it must be")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
