"""Maps measured: by real patches of which the answer is known, and on a scene of a whole Sentinel-2 tile's size.

python -m tests.parallel.mapped patches --checkpoint FILE --rgb EuroSAT_RGB.zip --ms EuroSAT_MS_100.zip
    a scene of 400 patches, 20 x 20: are all its windows what `predict` says of the patches? And one of the patches of
    which the digital numbers are known: for how many does the network say the same of these as of the JPEGs?
python -m tests.parallel.mapped tile --ms EuroSAT_MS_100.zip --driver COG|JP2OpenJPEG --out FILE
    10,980 x 10,980 pixels of 10 m, uint16, B04, B03 and B02, of the patches over and over.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio.io import MemoryFile

from tests.parallel.conftest import command, run

SIDE, TILE = 64, 10_980
RED_GREEN_BLUE = (4, 3, 2)  # of the 13 bands' files, from 1
TURN = Affine(10, 0, 600_000, 0, -10, 5_200_000)
LIKE = {
    "COG": {"COMPRESS": "DEFLATE", "BLOCKSIZE": 512, "PREDICTOR": "YES"},
    "JP2OpenJPEG": {"QUALITY": 100, "REVERSIBLE": "YES", "BLOCKXSIZE": 1024, "BLOCKYSIZE": 1024},  # as products are
}


def rgb_patches(archive: Path) -> dict[str, bytes]:
    """The JPEGs by name."""
    with zipfile.ZipFile(archive) as files:
        return {Path(name).name: files.read(name) for name in files.namelist() if name.endswith(".jpg")}


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


def patches(checkpoint: Path, rgb: Path, ms: Path) -> None:
    """Both figures, printed."""
    every, numbers = rgb_patches(rgb), ms_patches(ms)
    chosen = [name for n, name in enumerate(sorted(every)) if n % (len(every) // 400) == 0][:400]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "patches").mkdir()
        for file in chosen:
            (folder / "patches" / file).write_bytes(every[file])
        grey = [np.asarray(Image.open(io.BytesIO(every[file]))).transpose(2, 0, 1) for file in chosen]
        scene = write(folder / "rgb.tif", mosaic(grey, 20), photometric="RGB")
        classes = mapped(checkpoint, scene, folder / "map").ravel()
        words = ("--checkpoint", checkpoint, "--input", folder / "patches", "--out", folder / "predictions")
        job = run(command("python", 1, "predict", *words))
        assert job.returncode == 0, job.stderr
        said = list(csv.DictReader((folder / "predictions" / "predictions.csv").read_text().splitlines()))
        names = [row["class"] for row in csv.DictReader((folder / "map" / "areas.csv").open())]
        same = sum(names[n] == row["class"] for n, row in zip(classes, said, strict=True))
        print(f"{same} of {len(said)} windows are what predict says of the patch")

        pairs = [np.asarray(Image.open(io.BytesIO(every[f"{file}.jpg"]))).transpose(2, 0, 1) for file in numbers]
        of_jpeg = mapped(checkpoint, write(folder / "jpeg.tif", mosaic(pairs, 10), photometric="RGB"), folder / "jpeg")
        dn = write(folder / "dn.tif", mosaic(list(numbers.values()), 10))
        of_dn = mapped(checkpoint, dn, folder / "dn", "--bands", "B04,B03,B02", "--offset", 0)
        print(f"{(of_jpeg == of_dn).sum()} of {of_dn.size} agree between digital numbers and JPEGs")


def tile(ms: Path, driver: str, out: Path) -> None:
    """A scene of a tile's size: each patch in another place, turned and brightened another way each time."""
    numbers = list(ms_patches(ms).values())
    rng = np.random.default_rng(0)
    count = -(-TILE // SIDE)
    shape = {"driver": "GTiff", "count": 3, "height": TILE, "width": TILE, "dtype": "uint16", "tiled": True}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain = Path(folder, "plain.tif")
        with rasterio.open(
            plain, "w", **shape, crs="EPSG:32632", transform=TURN, blockxsize=512, blockysize=512
        ) as file:
            for top in range(0, TILE, SIDE):
                row = [
                    np.rot90(numbers[rng.integers(len(numbers))], int(rng.integers(4)), (1, 2)) for _ in range(count)
                ]
                pixels = (np.concatenate(row, 2) * rng.uniform(0.9, 1.1)).astype(np.uint16)[:, : TILE - top, :TILE]
                file.write(pixels, window=rasterio.windows.Window(0, top, TILE, pixels.shape[1]))
        rasterio.shutil.copy(plain, out, driver=driver, **LIKE[driver])


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("patches", "tile"))
    for flag in ("--checkpoint", "--rgb", "--ms", "--out"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--driver", choices=sorted(LIKE), default="COG")
    options = parser.parse_args(words)
    if options.what == "patches":
        patches(options.checkpoint, options.rgb, options.ms)
    else:
        tile(options.ms, options.driver, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
