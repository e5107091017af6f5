"""Maps measured: by real patches of which the answer is known, on a scene of a whole tile's size, and killed.

python -m tests.parallel.mapped patches --checkpoint FILE --data ROOT --ms EuroSAT_MS_100.zip
    a scene of 400 validation and test patches of EuroSAT RGB, prepared in ROOT, 20 x 20: are all its windows what
    `predict` says of the patches? And the patches of which the digital numbers are known: for how many does the network
    say the same of these, in a scene and as the 13-band set that `evaluate` reads, as of the JPEGs?
python -m tests.parallel.mapped tile --checkpoint FILE --ms EuroSAT_MS_100.zip --driver COG|JP2OpenJPEG --out FILE
    a scene of 10,980 x 10,980 pixels of 10 m (--side N: of fewer), uint16, B04, B03 and B02, of the patches over and
    over, drawn where FILE is not there: how fast is it mapped, beside the network alone, which is shown the same
    windows from memory in the batches of `predict`, before and after? How much memory does that take?
python -m tests.parallel.mapped ranks …      (as for tile)
    the same scene as one job of two ranks, beside its halves as two jobs at a time, before and after.
python -m tests.parallel.mapped kills --checkpoint FILE --scene FILE … [--seed N]      (as for `map`, without --out)
    the scene by one process, by 2 and 3 ranks of mpirun and of horovodrun, and by jobs of which five are killed by
    SIGKILL of one rank: four at random moments, one while it writes the map. Which files differ?
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio.io import MemoryFile
from rasterio.windows import Window

from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.scene.parts import FOLDER
from tests.parallel.conftest import command, run, survivors, variables, wait_for

NETWORK_ONLY = "tests.parallel.network_only"
WAYS = (("python", 1), ("mpirun", 2), ("horovodrun", 2), ("mpirun", 3), ("horovodrun", 3))
FILES = ("classes.tif.aux.xml", "classes.tif", "confidence.tif", "areas.csv", "map.geojson", "map.png", "map.html")
LATE = 0.5  # seconds after a block at most
SIDE, TILE = 64, 10_980
RED_GREEN_BLUE = (4, 3, 2)  # of the 13 bands' files, from 1
TURN = Affine(10, 0, 600_000, 0, -10, 5_200_000)
LIKE = {
    "COG": {"COMPRESS": "DEFLATE", "BLOCKSIZE": 512, "PREDICTOR": "YES"},
    "JP2OpenJPEG": {"QUALITY": 100, "REVERSIBLE": "YES", "BLOCKXSIZE": 1024, "BLOCKYSIZE": 1024},  # as products are
}


def rgb_patches(root: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The JPEGs of some splits of a prepared set, by name and in its order."""
    tree = open_tree(root)
    found = {Path(name).stem: tree.path(name) for split in splits for name in tree.files(split)}
    return dict(sorted(found.items()))


def ms_patches(archive: Path) -> dict[str, NDArray[np.uint16]]:
    """Digital numbers uint16 [3, 64, 64] of red, green and blue by name."""
    found = {}
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            if name.endswith(".tif"):
                with MemoryFile(files.read(name)) as memory, memory.open() as file:
                    found[Path(name).stem] = file.read(RED_GREEN_BLUE)
    return found


def mosaic(patches: Sequence[NDArray[np.generic]], columns: int) -> NDArray[np.generic]:
    """Patches [3, 64, 64] side by side, row by row."""
    rows = [np.concatenate(patches[n : n + columns], 2) for n in range(0, len(patches), columns)]
    return np.concatenate(rows, 1)


def write(path: Path, pixels: NDArray[np.generic], **options: object) -> Path:
    """A scene [3, h, w]."""
    _, height, width = pixels.shape
    shape = {"count": 3, "height": height, "width": width, "dtype": pixels.dtype.name}
    with rasterio.open(
        path, "w", **{"driver": "GTiff", **shape, "crs": "EPSG:32632", "transform": TURN, **options}
    ) as file:
        file.write(pixels)
    return path


def mapped(checkpoint: Path, scene: Path, out: Path, *words: object) -> NDArray[np.uint8]:
    """The numbers of the classes, [rows, columns]."""
    job = run(command("python", 1, "map", "--checkpoint", checkpoint, "--scene", scene, "--out", out, *words))
    assert job.returncode == 0, job.stderr
    with rasterio.open(out / "classes.tif") as file:
        classes: NDArray[np.uint8] = file.read(1)
    return classes


def rgb_scene(path: Path, patches: Sequence[Path], columns: int) -> Path:
    """A scene of JPEGs."""
    return write(
        path, mosaic([np.asarray(Image.open(one)).transpose(2, 0, 1) for one in patches], columns), photometric="RGB"
    )


def told_of(verb: str, out: Path, *words: object) -> dict[str, str]:
    """The class of each image by the file's name without its ending, of `predict` or `evaluate`."""
    job = run(command("python", 1, verb, "--out", out, *words))
    assert job.returncode == 0, job.stderr
    rows = csv.DictReader((out / "predictions.csv").read_text().splitlines())
    return {Path(row["name"]).stem: row["class"] for row in rows}


def patches(checkpoint: Path, data: Path, ms: Path) -> None:
    """The three figures, printed."""
    unseen, numbers, classes = rgb_patches(data, ("valid", "test")), ms_patches(ms), open_tree(data).classes
    unseen = dict(list(unseen.items())[:: len(unseen) // 400][:400])
    trust = ("--checkpoint", checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "patches").mkdir()
        for path in unseen.values():
            shutil.copy(path, folder / "patches")
        scene = rgb_scene(folder / "rgb.tif", list(unseen.values()), 20)
        of_map = mapped(checkpoint, scene, folder / "map").ravel()
        predicted = told_of("predict", folder / "predictions", *trust, "--input", folder / "patches")
        same = sum(classes[number] == predicted[one] for one, number in zip(unseen, of_map, strict=True))
        print(f"{same} of {len(predicted)} windows are what predict says of the patch")

        every = rgb_patches(data, SPLITS)
        pairs = rgb_scene(folder / "jpeg.tif", [every[one] for one in numbers], 10)
        of_jpeg = mapped(checkpoint, pairs, folder / "jpeg")
        dn = write(folder / "dn.tif", mosaic(list(numbers.values()), 10))
        of_dn = mapped(checkpoint, dn, folder / "dn", "--bands", "B04,B03,B02", "--offset", 0)
        print(f"{(of_jpeg == of_dn).sum()} of {of_dn.size} agree between a scene of digital numbers and the JPEGs")

        job = run(command("python", 1, "prepare", "--source", ms, "--out", folder / "ms"))
        assert job.returncode == 0, job.stderr
        evaluated: dict[str, str] = {}
        for split in SPLITS:
            asked = ("--data.root", folder / "ms", "--data.cache_dir", folder / "cache", "--split", split)
            evaluated |= told_of("evaluate", folder / split, *trust, *asked)
        same = sum(evaluated[one] == classes[n] for one, n in zip(numbers, of_jpeg.ravel(), strict=True))
        print(f"{same} of {len(evaluated)} agree between the 13-band set and the JPEGs")


def tile(ms: Path, driver: str, out: Path, side: int) -> None:
    """A scene: each patch in another place, turned and brightened another way each time."""
    numbers = list(ms_patches(ms).values())
    rng = np.random.default_rng(0)
    count = -(-side // SIDE)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain = Path(folder, "plain.tif")
        with rasterio.open(plain, "w", **like(side, side), transform=TURN) as file:
            for top in range(0, side, SIDE):
                row = [
                    np.rot90(numbers[rng.integers(len(numbers))], int(rng.integers(4)), (1, 2)) for _ in range(count)
                ]
                pixels = (np.concatenate(row, 2) * rng.uniform(0.9, 1.1)).astype(np.uint16)[:, : side - top, :side]
                file.write(pixels, window=Window(0, top, side, pixels.shape[1]))
        rasterio.shutil.copy(plain, out, driver=driver, **LIKE[driver])


def like(height: int, width: int) -> dict[str, object]:
    """A tiled GeoTIFF of digital numbers."""
    shape = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": "uint16", "crs": "EPSG:32632"}
    return {**shape, "tiled": True, "blockxsize": 512, "blockysize": 512}


def halves(scene: Path, driver: str, folder: Path) -> list[Path]:
    """The upper and the lower half of a scene, of whole windows; the lower begins with whole ones."""
    found = []
    with rasterio.open(scene) as whole:
        middle = whole.height // 2 // SIDE * SIDE
        for name, top, end in (("upper", 0, middle), ("lower", middle, whole.height)):
            plain, half = folder / f"{name}-plain.tif", folder / f"{name}{scene.suffix}"
            with rasterio.open(plain, "w", **like(end - top, whole.width), transform=TURN) as file:
                file.write(whole.read(window=Window(0, top, whole.width, end - top)))
            rasterio.shutil.copy(plain, half, driver=driver, **LIKE[driver])
            plain.unlink()
            found.append(half)
    return found


@dataclass(frozen=True)
class Measured:
    """A job of `map`: windows, seconds from the scene to the map, and from the start; bytes of its largest rank."""

    windows: int
    seconds: float
    all_seconds: float
    memory: int


def environment(threads: int | None = None) -> dict[str, str]:
    """Of a job whose ranks have so many threads, or their share of the cores."""
    found = variables()
    del found["OMP_NUM_THREADS"]
    return found if threads is None else {**found, "OMP_NUM_THREADS": str(threads)}


def started(
    launcher: str, ranks: int, out: Path, *words: object, threads: int | None = None, stderr: Any = None
) -> Popen[bytes]:
    """A job of `map`."""
    arguments = command(launcher, ranks, "map", *words, "--out", out)
    return Popen(arguments, env=environment(threads), stdout=DEVNULL, stderr=stderr)


def measured(job: Popen[bytes], began: float, out: Path) -> Measured:
    """When it is done."""
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    assert job.returncode == 0
    run = json.loads((out / "map.json").read_text())["run"]
    return Measured(run["windows"], run["seconds"], time.perf_counter() - began, usage.ru_maxrss * 1024)


def beside_network(folder: Path, words: Sequence[str]) -> None:
    """How fast the scene is mapped, printed."""

    def alone() -> dict[str, Any]:
        arguments = [sys.executable, "-m", NETWORK_ONLY, *words, "--out", str(folder / "none")]
        return dict(json.loads(subprocess.run(arguments, env=environment(), stdout=PIPE, check=True).stdout))

    before, began = alone(), time.perf_counter()
    found = measured(started("python", 1, folder / "map", *words), began, folder / "map")
    after = alone()
    rate, network = found.windows / found.seconds, [one["windows"] / one["seconds"] for one in (before, after)]
    print(
        f"{found.windows:,} windows of {before['pixels'] / 1e6:,.1f} Mpx, {before['precision']}\n"
        f"the network alone, in batches of {before['batch_size']}, before and after: {network[0]:,.1f} and "
        f"{network[1]:,.1f} windows/s, with {before['memory'] / 1e9:.2f} GB\n"
        f"from the scene to the map: {rate:,.1f} windows/s, {before['pixels'] / found.seconds / 1e6:.2f} Mpx/s, "
        f"{found.seconds:.1f} s ({found.all_seconds:.1f} s with the start), with {found.memory / 1e9:.2f} GB\n"
        f"{2 * rate / sum(network):.1%} of the network's rate, {(found.memory - before['memory']) / 1e9:.2f} GB more"
    )


def two_ranks(scene: Path, driver: str, folder: Path, words: Sequence[str]) -> None:
    """One job of two ranks beside two jobs, printed."""
    parts = halves(scene, driver, folder)

    def apart(name: str) -> float:
        outs, began = [folder / f"{name}-{n}" for n in range(2)], time.perf_counter()
        jobs = [
            started("python", 1, out, "--scene", part, *words, threads=1) for part, out in zip(parts, outs, strict=True)
        ]
        both = [measured(job, began, out) for job, out in zip(jobs, outs, strict=True)]
        return sum(one.windows for one in both) / max(one.seconds for one in both)

    before, began = apart("before"), time.perf_counter()
    found = measured(started("mpirun", 2, folder / "map", "--scene", scene, *words), began, folder / "map")
    after, rate = apart("after"), found.windows / found.seconds
    print(
        f"two jobs of a half each, before and after: {before:,.1f} and {after:,.1f} windows/s together\n"
        f"one job of two ranks: {rate:,.1f} windows/s, with {found.memory / 1e9:.2f} GB a rank\n"
        f"{2 * rate / (before + after):.1%} of two jobs"
    )


def differing(one: Path, other: Path) -> list[str]:
    """The files of two maps that differ in a byte, but for the job in map.json, or that one of them lacks."""
    names = {path.name for folder in (one, other) for path in folder.iterdir()}
    return sorted(name for name in names if content(one / name) != content(other / name))


def content(path: Path) -> object:
    """Of a file of a map."""
    if path.name != "map.json" or not path.exists():
        return path.read_bytes() if path.exists() else None
    return {**json.loads(path.read_text()), "run": None}


def kills(words: Sequence[str], seed: int) -> None:
    """Jobs of every kind, of which some are killed: what differs, printed."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, out = folder / "python-1", folder / "killed"
        for launcher, ranks in WAYS:
            finish(launcher, ranks, folder / f"{launcher}-{ranks}", *words)
            if ranks > 1:
                told(f"{launcher} -np {ranks}", whole, folder / f"{launcher}-{ranks}")
        for launcher, ranks in WAYS:
            at = rng.choice(FILES) if (launcher, ranks) == WAYS[-1] else rng.uniform(0, LATE)
            with (folder / "errors").open("a") as errors:
                job = started(launcher, ranks, out, *words, stderr=errors)
                said = kill(out, rng.randrange(2), at, rng)
                print(f"{launcher} -np {ranks}: {said}, status {job.wait()}", flush=True)
        finish("mpirun", 3, out, *words)
        told("killed five times", whole, out)


def finish(launcher: str, ranks: int, out: Path, *words: object) -> None:
    """A map, to its end."""
    with (out.parent / "errors").open("w+") as errors:
        if started(launcher, ranks, out, *words, stderr=errors).wait():
            errors.seek(0)
            raise SystemExit(errors.read())


def told(what: str, one: Path, other: Path) -> None:
    """What differs, printed."""
    print(f"{what}: differing: {', '.join(differing(one, other)) or 'nothing'}", flush=True)


def kill(out: Path, blocks: int, at: str | float, rng: random.Random) -> str:
    """Kill a rank of a job so many blocks and seconds after it went on, or when it has written that file of the map."""

    def done() -> int:
        return len(list((out / FOLDER).glob("*.part")))

    before, began = done(), time.time()
    work = out / FOLDER / "work.json"
    wait_for(lambda: work.exists() and work.stat().st_mtime > began, pause=0.01)
    if isinstance(at, str):
        wait_for((out / at).exists, pause=0.001)
    else:
        wait_for(lambda: done() >= before + blocks or not work.exists(), pause=0.01)
        time.sleep(at)
    ranks = [process for process in survivors(out) if is_rank(process)]
    if not ranks:
        return "none killed, for the map was finished"
    os.kill(rng.choice(ranks), signal.SIGKILL)
    when = f"when {at} was written" if isinstance(at, str) else f"{at:.2f} s after {blocks} more blocks"
    return f"one of {len(ranks)} killed {when}, with {done()} blocks done"


def is_rank(process: int) -> bool:
    """Whether it is a rank, and no launcher."""
    return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", b"hvd_eurosat.map"]


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("patches", "tile", "ranks", "kills"))
    for flag in ("--checkpoint", "--data", "--ms", "--out"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--driver", choices=sorted(LIKE), default="COG")
    parser.add_argument("--side", type=int, default=TILE)
    parser.add_argument("--seed", type=int, default=0)
    options, others = parser.parse_known_args(words)
    if options.what == "patches":
        return patches(options.checkpoint, options.data, options.ms)
    if options.what == "kills":
        return kills(["--checkpoint", str(options.checkpoint), *others], options.seed)
    if not options.out.exists():
        tile(options.ms, options.driver, options.out, options.side)
    said = ["--checkpoint", str(options.checkpoint), "--bands", "B04,B03,B02", "--offset", "0", *others]
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        if options.what == "tile":
            beside_network(Path(name), ["--scene", str(options.out), *said])
        else:
            two_ranks(options.out, options.driver, Path(name), said)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
