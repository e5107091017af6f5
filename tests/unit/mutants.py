"""Scenes with damage: GeoTIFF, JPEG 2000, VRT, metadata, zips, the names in a product. Each is mapped or refused.

python -m tests.unit.mutants FOLDER COUNT
    so many, drawn from their numbers, given to `map`; it prints, as JSON, number, kind and outcome of each as it comes.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio.shutil
import torch

from hvd_eurosat import map as maps
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config import verbs
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.data.inputs import EUROSAT_CLASSES
from hvd_eurosat.errors import UserError
from hvd_eurosat.model.resnet import build
from hvd_eurosat.scene import mapping, products
from hvd_eurosat.training import checkpoint
from hvd_eurosat.training.checkpoint import Checkpoint
from tests.parallel.warm import make_small
from tests.unit.conftest import saved_checkpoint
from tests.unit.scenes import LOSSLESS, numbers, write_product, write_raster, zipped

NAMES = ("B04", "B03", "B02")
SECONDS = 10
PIXELS = numbers(0, (3, 48, 48))
SIDE = 32
TILES = {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}
WORDS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")
PIECES = ("..", "\u00e4", "\udcff", "\n", "{", "}", " ", "_B04", "'")
Random = np.random.Generator
Pair = tuple[Path, Path]


def raster(**options: object) -> Callable[[Path], Pair]:
    """A maker of a file of three bands; a maker makes a scene and the file in it that is to be damaged."""

    def make(folder: Path) -> Pair:
        path = write_raster(folder / ("a.jp2" if "driver" in options else "a.tif"), PIXELS, names=NAMES, **options)
        return path, path

    return make


def vrt(folder: Path) -> Pair:
    """Of a whole GeoTIFF."""
    path = folder / "a.vrt"
    rasterio.shutil.copy(write_raster(folder / "a.tif", PIXELS, names=NAMES), path, driver="VRT")
    return path, path


def product(level: str, file: str) -> Callable[[Path], Pair]:
    """A maker of a product whose file of such a name is to be damaged."""

    def make(folder: Path) -> Pair:
        path = write_product(folder, dict(zip(NAMES, PIXELS, strict=True)), level)
        return path, next(path.rglob(file))

    return make


def archive(folder: Path) -> Pair:
    """Of a product."""
    path = zipped(product("L1C", "*.xml")(folder)[0])
    return path, path


MAKERS: dict[str, Callable[[Path], Pair]] = {
    "strips": raster(),
    "tiles": raster(**TILES),
    "bands beside each other": raster(compress="lzw", interleave="pixel"),
    "JPEG 2000": raster(BLOCKXSIZE="32", BLOCKYSIZE="32", **LOSSLESS),
    "VRT": vrt,
    "metadata of L1C": product("L1C", "MTD_MSI*.xml"),
    "metadata of L2A": product("L2A", "MTD_MSI*.xml"),
    "a band of a product": product("L1C", "*_B03.jp2"),
    "zip": archive,
    "names": product("L1C", "MTD_MSI*.xml"),
}


def damaged(whole: bytes, rng: Random) -> bytes:
    """Bytes changed at random, or into numbers such as headers have, a piece lost or doubled; most at the start."""
    data = bytearray(whole)
    end = len(data) if rng.random() < 0.5 else min(len(data), 600)
    start, stop = sorted(rng.integers(0, len(data), 2))
    match rng.integers(5):
        case 0:
            del data[start:stop]
        case 1:
            data[stop:stop] = data[start:stop]
        case 2:
            for at in rng.integers(0, end, rng.integers(1, 4)):
                data[at : at + 4] = WORDS[rng.integers(len(WORDS))]
        case _:
            for at in rng.integers(0, end, rng.integers(1, 9)):
                data[at] = rng.integers(256)
    return bytes(data)


def renamed(whole: Path, folder: Path, rng: Random) -> Path:
    """A copy of a product of which a file or folder has another name, as a folder or a zip."""
    found = Path(shutil.copytree(whole, folder / whole.name))
    every = sorted([found, *found.rglob("*")])
    path = every[rng.integers(len(every))]
    at, letter, piece = rng.integers(len(path.name)), chr(rng.integers(33, 127)), PIECES[rng.integers(len(PIECES))]
    names = [path.name[:at] + more + path.name[at + lost :] for more, lost in ((letter, 1), ("", 1), (piece, 0))]
    name = [*names, path.name[:at]][rng.integers(4)].replace("/", "")
    other = path.with_name(name if name.strip(".") else "x")
    path.rename(other)
    found = other if path == found else found
    return zipped(found) if rng.random() < 0.5 and "\udcff" not in name else found


class Mapping:
    """`map` in this process, without computing what a network says, and without its picture, page and polygons."""

    def __init__(self, folder: Path) -> None:
        make_small()
        model, self.out = build("resnet18", len(EUROSAT_CLASSES), "all", seed=0).eval(), folder / "map"
        settings, data = Model(arch="resnet18"), Data(image_size=SIDE)
        path = saved_checkpoint(folder / "1.pt", model, list(EUROSAT_CLASSES), settings, data, image_side=SIDE)
        words = ["--checkpoint", str(path), "--scene", "scene.tif", "--out", str(self.out), "--offset", "0"]
        self.settings = verbs.map_scenes(words)
        saved = checkpoint.load(path)
        self.world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
        checkpoint.load = lambda path, frozen=True: saved
        Checkpoint.build_model = lambda self, device: model  # type: ignore[method-assign]
        World.watch = lambda self, seconds: None  # type: ignore[method-assign]
        mapping.judge = lambda network, images: torch.zeros(len(images), 1 + len(EUROSAT_CLASSES), dtype=torch.uint8)
        for name in ("write_picture", "write_page", "write_polygons"):
            setattr(products, name, lambda *_: None)

    def __call__(self, scene: Path, bands: tuple[str, ...]) -> str:
        """What becomes of a scene: mapped, or the error. Where that takes SECONDS of CPU, SIGPROF ends the process."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                maps.main(self.world, self.settings.model_copy(update={"scene": (scene,), "bands": bands}))
        except UserError as error:
            return f"refused: {error}" if not self.out.exists() else f"refused, and left {self.out}: {error}"
        shutil.rmtree(self.out)
        return "mapped"


def main(folder: Path, count: int) -> None:
    """All of them."""
    outcome, made = Mapping(folder), {}
    for kind, make in MAKERS.items():
        (folder / kind).mkdir()
        made[kind] = make(folder / kind)
    for number in range(count):
        kind, rng = list(MAKERS)[number % len(MAKERS)], np.random.default_rng(number)
        print(json.dumps([number, kind, "?"]), flush=True)  # in case that it is the last
        scene, victim = made[kind]
        whole, bands = victim.read_bytes(), NAMES if kind == "JPEG 2000" else ()
        if kind == "names":
            (folder / f"renamed-{number}").mkdir()
            said = outcome(renamed(scene, folder / f"renamed-{number}", rng), bands)
        elif scene == victim:  # GDAL knows a zip again by its name
            other = victim.with_stem(str(number))
            other.write_bytes(damaged(whole, rng))
            said = outcome(other, bands)
        else:
            victim.write_bytes(damaged(whole, rng))
            said = outcome(scene, bands)
            victim.write_bytes(whole)
        print(json.dumps([number, kind, said]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
