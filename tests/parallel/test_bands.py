"""Training on bands of 16 bits: on any number of ranks, resumed, evaluated; a set that lacks a band is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvd_eurosat import prepare
from hvd_eurosat.data.inputs import EUROSAT_CLASSES
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.model.resnet import BLOCKS
from hvd_eurosat.training import checkpoint
from tests.parallel import bands as whole_way
from tests.parallel.conftest import Launch, checkpoint_file, small, summary
from tests.unit.conftest import EUROSAT_13
from tests.unit.patches import grow_bands

BANDS = ("B02", "B03", "B04", "B08", "B8A")
CHANNELS = 16  # of the first convolution of ranks' networks (warm.py)
PARAMETERS = 703_920  # of a resnet18 of so many, for two classes and five bands
NORMS, HEAD, KERNELS = 2_400, 256, 5 * 49 * CHANNELS
FOUND = {"head": HEAD, "bn+head": NORMS + HEAD + KERNELS, "all": PARAMETERS}
ALL_13 = PARAMETERS + 4 * HEAD + 8 * 49 * CHANNELS  # for ten classes and 13 bands
FOUND_13 = {"head": 5 * HEAD, "bn+head": NORMS + 5 * HEAD + 13 * 49 * CHANNELS, "all": ALL_13}


def made(root: Path, bands: tuple[str, ...]) -> Path:
    """A prepared set: 24 training, 8 validation and 8 test images."""
    source = grow_bands(root / "source", ("Field", "Wood"), len(bands), count=20, side=32)
    words = ["--bands", ",".join(bands), "--image-size", "32", "--ratios", "60,20,20"]
    assert prepare.main(["--source", str(source), "--out", str(root / "data"), *words]) == 0
    return root / "data"


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("five"), BANDS)


@pytest.fixture(scope="module")
def rgb_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for red, green and blue."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "resnet18", (*BLOCKS["resnet18"][:2], CHANNELS))
        return whole_way.rgb_weights(tmp_path_factory.mktemp("weights") / "resnet18.safetensors", "resnet18")


@pytest.fixture(scope="module")
def two_epochs(launch: Launch, five: Path, rgb_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bn+head on two ranks."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    words = small(five, run_dir, model__weights=rgb_weights, train__epochs=2, train__batch_size=6)
    job = launch("mpirun", 2, "train", *words)
    assert job.returncode == 0, job.stderr
    assert "trainable (bn+head,conv1)" in job.stdout
    assert "they know no B08, B8A, whose kernels begin small" in job.stdout
    assert "5 bands, B02, B03, B04, B08, B8A: digital numbers" in job.stdout
    return run_dir


@pytest.mark.parametrize(("trainable", "launcher", "ranks"), [("head", "python", 1), ("all", "mpirun", 2)])
def test_it_trains(trainable: str, launcher: str, ranks: int, launch: Launch, five: Path, tmp_path: Path) -> None:
    words = small(five, tmp_path / "run", train__epochs=1, train__batch_size=6, model__trainable=trainable)
    job = launch(launcher, ranks, "train", *words)
    assert job.returncode == 0, job.stderr
    facts = summary(tmp_path / "run")
    assert (facts["parameters"], facts["trainable_parameters"]) == (PARAMETERS, FOUND[trainable])


def test_a_run_goes_on_bit_for_bit(
    launch: Launch, five: Path, rgb_weights: Path, two_epochs: Path, tmp_path: Path
) -> None:
    for epochs in (1, 2):
        words = small(five, tmp_path / "run", model__weights=rgb_weights, train__epochs=epochs, train__batch_size=6)
        job = launch("mpirun", 2, "train", *words)
        assert job.returncode == 0, job.stderr
    once, twice = (checkpoint.load(checkpoint_file(run)).model for run in (two_epochs, tmp_path / "run"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())
    facts = summary(two_epochs)
    assert (facts["parameters"], facts["trainable_parameters"]) == (PARAMETERS, FOUND["bn+head"])


def test_it_is_evaluated_the_same_on_any_number_of_ranks(
    launch: Launch, five: Path, two_epochs: Path, tmp_path: Path
) -> None:
    best = checkpoint_file(two_epochs, "best.json")
    said, values = set(), set()
    for launcher, ranks in (("python", 1), ("mpirun", 2), ("mpirun", 3)):
        out = tmp_path / str(ranks)
        words = ("--checkpoint", best, "--data.root", five, "--out", out, "--batch_size", 2)
        job = launch(launcher, ranks, "evaluate", *words)
        assert job.returncode == 0, job.stderr
        said.add(job.stdout.splitlines()[-1])
        values.add((out / "output_1.h5").read_bytes())
    assert len(said) == len(values) == 1


def test_a_set_without_a_band_is_refused_by_its_name(launch: Launch, two_epochs: Path, tmp_path: Path) -> None:
    less = made(tmp_path, BANDS[:4])
    job = launch("mpirun", 2, "evaluate", "--checkpoint", checkpoint_file(two_epochs), "--data.root", less)
    assert job.returncode == 2
    assert f"{less} has no band B8A, which the network was trained with; it has B02, B03, B04, B08" in job.stderr
    assert job.stderr.count("error:") == 1


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EuroSAT's 13 bands: 100 real patches where they are at hand, else as many made-up ones."""
    root = tmp_path_factory.mktemp("thirteen")
    source = EUROSAT_13 if EUROSAT_13.exists() else grow_bands(root / "source", EUROSAT_CLASSES, 13, count=10, side=64)
    assert prepare.main(["--source", str(source), "--out", str(root / "data"), "--ratios", "60,20,20"]) == 0
    return root / "data"


@pytest.mark.long
@pytest.mark.parametrize(("trainable", "ranks"), [("head", 1), ("bn+head", 2), ("all", 2)])
def test_eurosat_s_13_bands_go_the_whole_way(
    trainable: str, ranks: int, thirteen: Path, rgb_weights: Path, warm: str, tmp_path: Path
) -> None:
    assert whole_way.furthest(open_tree(thirteen)) < 1e-6
    words = ["--model.arch", "resnet18", "--model.weights", str(rgb_weights)]
    seen = whole_way.see(thirteen, tmp_path, trainable, ranks, words, warm)
    assert seen.is_right((ALL_13, FOUND_13[trainable])), seen
