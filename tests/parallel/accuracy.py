"""Whether the fast arithmetic costs accuracy, in turn, five seeds, on a stratified tenth of the images.

"fast" is as training is here without being told: in the precision that pays, with what set-up built in C++; "plain" is
in fp32 and with torch's own.

python -m tests.parallel.accuracy --data.root data/EuroSAT_RGB --config recipes/finetune.toml --model.weights FILE
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from hvd_eurosat.config.reading import load
from hvd_eurosat.data.tree import open_tree
from tests.parallel.conftest import command, run, summary

SEEDS, EPOCHS, EVERY = 5, 5, 10
FAST, PLAIN = "fast", "plain"
AS_TORCH = {"ATEN_CPU_CAPABILITY": "default"}  # for that, no library was built
SPLITS = ("valid", "test")


def link_tenth(source: Path, folder: Path) -> None:
    """Links to every tenth training image, which come class by class, and to all that validate and test."""
    tree = open_tree(source)
    for name in (*tree.files("train")[::EVERY], *(name for split in SPLITS for name in tree.files(split))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(tree.root.resolve() / name)


def train(folder: Path, what: str, seed: int) -> dict[str, float]:
    """Accuracy in percent: of the validation after the last epoch, and of the test with the best one."""
    run_dir = folder / f"{what}-{seed}"
    precision, variables = ("auto", {}) if what == FAST else ("fp32", AS_TORCH)
    keys = {"data.root": folder / "data", "run.dir": run_dir, "train.precision": precision, "train.seed": seed}
    flags = [f"--{key}={value}" for key, value in {**keys, "train.epochs": EPOCHS}.items()]
    job = run(command("mpirun", 2, "train", *sys.argv[1:], *flags), timeout=3600, **variables)
    if job.returncode:
        raise RuntimeError(job.stderr)
    assert ("not fused" in job.stdout) == (what == PLAIN), job.stdout
    return {split: 100 * summary(run_dir)[f"{split}_accuracy"] for split in SPLITS}


def main() -> None:
    """Prints each pair of runs, and the means of their differences."""
    differences: dict[str, list[float]] = {split: [] for split in SPLITS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_tenth(load(sys.argv[1:]).data.root, folder / "data")
        for seed in range(SEEDS):
            fast, plain = train(folder, FAST, seed), train(folder, PLAIN, seed)
            for split in SPLITS:
                differences[split].append(fast[split] - plain[split])
                print(f"seed {seed}, {split}: {FAST} {fast[split]:.2f} %, {PLAIN} {plain[split]:.2f} %", flush=True)
    for split, points in differences.items():
        error = statistics.stdev(points) / len(points) ** 0.5
        print(f"{split}: {FAST} - {PLAIN} = {statistics.mean(points):+.2f} points, standard error {error:.2f}")


if __name__ == "__main__":
    main()
