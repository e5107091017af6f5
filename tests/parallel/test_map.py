"""Maps on any number of ranks and after any interruption: the same bytes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from hvd_eurosat.scene.parts import FOLDER
from tests.parallel.conftest import LAUNCHERS, Job, Launch, checkpoint_file, run
from tests.parallel.mapped import differing

HEIGHT, WIDTH, STRIDE = 900, 260, 16
# A rank gets a signal after so many of its blocks; the others are slow, so that some are left.
FAULTY = """
import os, runpy, sys, time
from hvd_eurosat.scene.parts import Parts
number, rank, left = (int(word) for word in sys.argv[1].split(","))
write = Parts.write
def faulty(parts, *of):
    global left
    write(parts, *of)
    if int(os.environ.get("OMPI_COMM_WORLD_RANK", 0)) != rank:
        return time.sleep(0.5)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
Parts.write = faulty
sys.argv[1:] = sys.argv[2:]
runpy.run_module("hvd_eurosat.map", run_name="__main__", alter_sys=True)
"""
# Maps one scene after the other without a network; prints the most memory, in KiB, that there was after each.
WITHOUT_NETWORK = """
import resource, sys, torch
from hvd_eurosat import map as maps
from hvd_eurosat.cluster.node import keep_freed_memory
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.scene import mapping
mapping.judge = lambda mapper, images: torch.zeros(len(images), 1 + mapper.model.fc.out_features, dtype=torch.uint8)
keep_freed_memory()  # as every job does
alone = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
words, scenes = sys.argv[1:-2], sys.argv[-2:]
for number, scene in enumerate(scenes):
    maps.main(alone, verbs.map_scenes([*words, "--scene", scene, "--out", f"{scene}-map"]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
Map = Callable[..., Path]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plots of noise, a corner of it without data."""
    rng = np.random.default_rng(0)
    plots = rng.integers(1, 256, (3, HEIGHT // 20, WIDTH // 20)).repeat(20, 1).repeat(20, 2)
    pixels = np.clip(plots + rng.integers(-20, 20, plots.shape), 1, 255).astype(np.uint8)
    pixels[:, :200, :100] = 0
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    shape = {"driver": "GTiff", "count": 3, "height": HEIGHT, "width": WIDTH, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **shape, crs="EPSG:32632", transform=Affine(10, 0, 6e5, 0, -10, 5.2e6)) as file:
        file.write(pixels)
    return path


@pytest.fixture(scope="module")
def words(trained: Path, scene: Path) -> list[object]:
    """What every map here is told."""
    best = checkpoint_file(trained, "best.json")
    return ["--checkpoint", best, "--scene", scene, "--stride", STRIDE, "--batch_size", 32, "--probabilities"]


@pytest.fixture(scope="module")
def alone(launch: Launch, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map by one process."""
    out = tmp_path_factory.mktemp("alone") / "map"
    job = launch("python", 1, "map", *words, "--out", out)
    assert job.returncode == 0, job.stderr
    assert f"windows in {out}" in job.stdout.splitlines()[-1]
    return out


def interrupted(warm: str, ranks: int, number: int, rank: int, blocks: int, *words: object) -> Job:
    """A job of which a rank gets a signal after so many of its blocks."""
    launcher = [*LAUNCHERS["mpirun"], str(ranks)] if ranks > 1 else []
    return run([*launcher, warm, "-c", FAULTY, f"{number},{rank},{blocks}", *map(str, words)])


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 2), ("mpirun", 3), ("horovodrun", 2), ("gloo", 2)])
def test_any_number_of_ranks_makes_the_same_bytes(
    launch: Launch, words: list[object], alone: Path, tmp_path: Path, launcher: str, ranks: int
) -> None:
    job = launch(launcher, ranks, "map", *words, "--out", tmp_path / "map")
    assert job.returncode == 0, job.stderr
    assert differing(tmp_path / "map", alone) == []


def parts(out: Path) -> set[str]:
    return {path.name for path in (out / FOLDER).glob("*.part")}


def test_a_map_is_killed_five_times_and_goes_on(
    warm: str, launch: Launch, words: list[object], alone: Path, tmp_path: Path
) -> None:
    out, rng, done = tmp_path / "map", random.Random(0), set[str]()
    for ranks in (1, 2, 1, 1, 1):
        job = interrupted(warm, ranks, signal.SIGKILL, ranks - 1, rng.randrange(1, 3), *words, "--out", out)
        assert job.returncode not in (0, 2), job.stderr
        assert parts(out) > done
        done = parts(out)
        assert not (out / "map.json").exists()
    job = launch("mpirun", 3, "map", *words, "--out", out)
    assert job.returncode == 0, job.stderr
    assert differing(out, alone) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_map_is_asked_to_stop(
    warm: str, launch: Launch, words: list[object], alone: Path, tmp_path: Path, number: int
) -> None:
    """One rank is, and all leave with their blocks done."""
    out = tmp_path / "map"
    job = interrupted(warm, 2, number, 1, 2, *words, "--out", out)
    assert job.returncode == 75, job.stderr
    assert f"stopped: the same command goes on with what is missing in {out}" in job.stdout
    assert parts(out)
    job = launch("python", 1, "map", *words, "--out", out)
    assert job.returncode == 0, job.stderr
    assert differing(out, alone) == []


def test_bad_scenes_are_said_once_and_the_others_mapped(
    launch: Launch, words: list[object], scene: Path, alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.tif").write_bytes(scene.read_bytes()[:300])
    both = [*words[:3], tmp_path / "bad.tif", scene, *words[4:]]
    job = launch("mpirun", 2, "map", *both, "--out", tmp_path / "maps")
    assert job.returncode == 1
    assert len([line for line in job.stderr.splitlines() if "error: " in line]) == 2
    names = ("classes.tif", "confidence.tif", "areas.csv", "map.png", "map.geojson", "map.html")
    assert all((tmp_path / "maps" / "scene" / name).read_bytes() == (alone / name).read_bytes() for name in names)
    job = launch("mpirun", 2, "map", *words[:3], tmp_path / "bad.tif", "--out", tmp_path / "one")
    assert job.returncode == 2
    assert len([line for line in job.stderr.splitlines() if "error: " in line]) == 1
    assert not (tmp_path / "one").exists()


def test_a_scene_takes_no_more_than_memory_beside_what_any_takes(warm: str, trained: Path, tmp_path: Path) -> None:
    """Decoded, it would fill that memory: GDAL's cache is a part of it."""
    scenes, memory = [], 0.12
    rng, kind = np.random.default_rng(0), {"driver": "GTiff", "count": 3, "dtype": "uint16", "crs": "EPSG:32632"}
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate", "zlevel": 1}
    for side in (1000, 5000):  # with pictures of the same size
        path = tmp_path / f"{side}.tif"
        with rasterio.open(
            path, "w", width=side, height=side, transform=Affine(10, 0, 6e5, 0, -10, 5.2e6), **kind, **tiles
        ) as file:
            plots = rng.integers(1, 3000, (3, side // 100, side // 100), np.uint16)
            file.write(plots.repeat(100, 1).repeat(100, 2))
        scenes.append(str(path))
    assert 3 * 2 * side**2 > memory * 1e9
    best = str(checkpoint_file(trained, "best.json"))
    words = ["--checkpoint", best, "--bands", "B04,B03,B02", "--offset", "0", "--memory", str(memory)]
    job = run([warm, "-c", WITHOUT_NETWORK, *words, *scenes])
    assert job.returncode == 0, job.stderr
    peaks = [int(line) * 1024 for line in job.stdout.splitlines() if line.isdigit()]
    assert peaks[1] - peaks[0] < memory * 1e9
