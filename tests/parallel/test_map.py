"""Maps on any number of ranks and after any interruption: the same bytes."""

from __future__ import annotations

import random
import re
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from hvd_eurosat.scene.parts import FOLDER
from tests.parallel.conftest import Job, Launch, checkpoint_file, run, under
from tests.parallel.mapped import differing
from tests.waiting import side_by_side

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
# A rank hangs: in the thread that reads its second block, or while rank 0 writes the map. The others are slow.
HANGING = """
import os, runpy, sys, time
from hvd_eurosat.cluster.world import World
from hvd_eurosat.scene import mapping, products
from hvd_eurosat.scene.parts import Parts
def hang(*of):
    watchdog._limit = 2 / watchdog._patience  # seconds from here on: till now it had all the time of a busy machine
    watchdog.beat()
    time.sleep(60)
def watched(world, seconds):
    global watchdog
    watchdog = world._process.watchdog
    watch(world, seconds)
def read(scene, plan, block, tick):
    blocks.append(block)
    if len(blocks) == 2:
        hang()
    return read_block(scene, plan, block, tick)
def slowly(parts, *of):
    write(parts, *of)
    time.sleep(0.5)
watch, World.watch = World.watch, watched
blocks, read_block, write = [], mapping.read_block, Parts.write
if sys.argv.pop(1) == "writing":
    products.write_areas = hang
elif int(os.environ["OMPI_COMM_WORLD_RANK"]) == 1:
    mapping.read_block = read
else:
    Parts.write = slowly
runpy.run_module("hvd_eurosat.map", run_name="__main__", alter_sys=True)
"""
# Rank 1's clock goes on by 100 s, while rank 0 leaves it a block: no rank can be that slow by chance.
SLOW = """
import os, runpy, time, types
from hvd_eurosat.scene import mapping
from hvd_eurosat.scene.parts import Parts
late, write = 0, Parts.write
def clock():
    global late
    late += 100
    return time.perf_counter() + late
def after_the_other(parts, *of):
    while not parts.done():
        time.sleep(0.01)
    write(parts, *of)
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    mapping.time = types.SimpleNamespace(perf_counter=clock)
else:
    Parts.write = after_the_other
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


def programmed(warm: str, ranks: int, program: str, *words: object) -> Job:
    """A job whose ranks run a program that changes `map`."""
    return run(under("mpirun" if ranks > 1 else "python", ranks, warm, "-c", program, *words))


def interrupted(warm: str, ranks: int, number: int, rank: int, blocks: int, *words: object) -> Job:
    """A job of which a rank gets a signal after so many of its blocks."""
    return programmed(warm, ranks, FAULTY, f"{number},{rank},{blocks}", *words)


@pytest.mark.parametrize(
    ("launcher", "ranks"), [("mpirun", 2), ("mpirun", 3), ("horovodrun", 2), ("horovodrun", 3), ("gloo", 2)]
)
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


def test_a_rank_that_hangs_is_named_and_ends_the_job(warm: str, words: list[object], tmp_path: Path) -> None:
    """Although the thread that has the network is well, and only waits for the one that reads."""
    hung = {"reading": (1, "mapping scene", "read"), "writing": (0, "writing the map", "hang")}
    jobs = side_by_side(
        [partial(programmed, warm, 2, HANGING, where, *words, "--out", tmp_path / where) for where in hung], at_once=2
    )
    for (where, (rank, phase, stack)), job in zip(hung.items(), jobs, strict=True):
        assert job.returncode not in (0, 2, 75), where
        said = rf"error: rank {rank} of 2 \(.+\) made no progress for \d+ s in {phase}; its threads:"
        assert re.search(said, job.stderr), job.stderr
        assert re.search(rf'File "<string>", line \d+ in {stack}$', job.stderr, re.M), job.stderr
        assert not (tmp_path / where / "map.json").exists()


def test_the_slow_rank_is_named(warm: str, words: list[object], tmp_path: Path) -> None:
    job = programmed(warm, 2, SLOW, *words, "--out", tmp_path / "map")
    assert job.returncode == 0, job.stderr
    (warning,) = [line for line in job.stderr.splitlines() if "slower" in line]
    assert re.search(rf"warning: rank 1 \({socket.gethostname()}\) was [\d,]+% slower than the other ranks", warning)


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
