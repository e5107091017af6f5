"""Small generated images for the data tests."""

import contextlib
import dataclasses
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hvd_eurosat import prepare
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config, Data, Model, Valid
from hvd_eurosat.data.names import Checksums
from hvd_eurosat.data.tree import Tree
from hvd_eurosat.model import native
from hvd_eurosat.model.resnet import BLOCKS, DEFAULT, Details, LandCoverResNet, build
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState

EUROSAT = Path(__file__).parents[3] / "shared" / "data" / "EuroSAT_RGB.zip"
EUROSAT_13 = EUROSAT.with_name("EuroSAT_MS_100.zip")  # 100 of the patches of 13 bands
DATA = Data()
needs_eurosat = pytest.mark.skipif(not EUROSAT.exists(), reason=f"the real data set is not at {EUROSAT}")

Encode = Callable[..., bytes]
Grow = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode() -> Encode:
    """encode(seed, size, format, mode): the bytes of a noise image."""

    def encoded(seed: int, size: tuple[int, int] = (64, 64), kind: str = "JPEG", mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        stream = BytesIO()
        Image.fromarray(pixels).convert(mode).save(stream, kind)
        return stream.getvalue()

    return encoded


@pytest.fixture
def grow(tmp_path: Path, encode: Encode) -> Grow:
    """grow(name, {"Forest": 5, ...}): a folder of class folders with that many 64x64 JPEGs each."""

    def grown(name: str, counts: dict[str, int], **options: object) -> Path:
        root = tmp_path / name
        for label, count in counts.items():
            (root / label).mkdir(parents=True)
            for number in range(1, count + 1):
                seed = sum(map(ord, label)) * 1000 + number
                (root / label / f"{Path(label).name}_{number}.jpg").write_bytes(encode(seed, **options))
        return root

    return grown


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(source, *options): status, stdout and stderr of `prepare --source … --out tmp_path/out`."""

    def ran(source: object, *options: object, out: str = "out") -> tuple[int, str, str]:
        status = prepare.main(["--source", str(source), "--out", str(tmp_path / out), *map(str, options)])
        return status, *capsys.readouterr()

    return ran


def manifest(out: Path) -> dict[str, Any]:
    """What a prepared folder says of itself."""
    loaded: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return loaded


def zipped(path: Path, root: Path, top: str = "", order: int | None = None) -> Path:
    """A zip of the files below root, each under top, in an order drawn with `order`."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if order is not None:
        random.Random(order).shuffle(files)
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, top + file.relative_to(root).as_posix())
    return path


def left(tmp_path: Path) -> list[str]:
    """What a run that failed left behind: the out folder or parts of it."""
    return [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> World:
    """The world of a process in which `train` can be called: it leaves signals and the watchdog alone."""
    monkeypatch.setattr("hvd_eurosat.train.StopRequest", lambda: lambda: False)
    monkeypatch.setattr(World, "watch", lambda world, seconds: None)
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)


@contextlib.contextmanager
def libraries_for(instructions: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with those built for AVX2 or AVX512, if this CPU can; which of them training takes is torch's word."""
    if torch.backends.cpu.get_cpu_capability() not in (instructions, "AVX512"):
        pytest.skip(f"this CPU has no {instructions}")
    find = native.library
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    find.cache_clear()
    yield
    find.cache_clear()


def saved_checkpoint(
    path: Path, model: LandCoverResNet, classes: list[str], settings: Model, data: Data = DATA, **facts: Any
) -> Path:
    """A checkpoint of the model after 3 epochs."""
    state = Checkpoint(
        model=model.state_dict(),
        frozen=[],
        optimiser={},
        rank_buffers=torch.zeros(1, 1),
        sums=torch.zeros(1, 4, dtype=torch.float64),
        epoch=3,
        samples=0,
        step=30,
        config=Config(model=settings, data=data, valid=Valid(batch_size=8)).model_dump(mode="json"),
        classes=classes,
        digest="d",
        precision="fp32",
    )
    state = dataclasses.replace(state, **facts)
    checkpoint.write(state, path, frozen=None)
    return path


@contextlib.contextmanager
def narrow(*arches: str, depths: Sequence[int] = ()) -> Iterator[None]:
    """These networks, or all, have a quarter of their channels: few questions are of their size.

    depths: of their stages, if not the usual ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        for arch in arches or tuple(BLOCKS):
            block, usual, width = BLOCKS[arch]
            patch.setitem(BLOCKS, arch, (block, list(depths or usual), width // 4))
        yield


@pytest.fixture(name="narrow")
def _narrow() -> Iterator[None]:
    with narrow():
        yield


@pytest.fixture(scope="module")
def narrow_resnet18() -> Iterator[None]:
    """For all tests of a file."""
    with narrow("resnet18"):
        yield


def blank(
    details: Details = DEFAULT, trainable: str = "all", arch: str = "resnet50", classes: int = 10
) -> LandCoverResNet:
    """A network whose weights and statistics are all 0, to be loaded: drawing random ones takes half a second."""
    with torch.device("meta"):
        model = LandCoverResNet(arch, classes, trainable, details)
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """The networks of libraries have shapes alone; nothing is drawn, for which torch would import its compiler."""
    with torch.device("meta"), mock.patch.object(nn.init, "kaiming_normal_"):
        yield


class Canary:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def averaging(folder: Path, trainable: str) -> TrainingState:
    """A state of one rank, with an average of the weights that has taken in nothing yet."""
    config = load(["--run.dir", str(folder), "--model.arch", "resnet18", "--train.ema", "0.9"])
    tree = Tree(folder, ("a", "b"), "d", synthetic=True, image_size=None, checksums=Checksums.of({}))
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    return TrainingState(world, config, tree, build("resnet18", 2, trainable, seed=0), Precision("fp32"))
