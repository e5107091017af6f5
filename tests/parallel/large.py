"""A set of many synthetic patches from nothing to training: memory, seconds, images/s beside those of EuroSAT.

python -m tests.parallel.large --images 1000000 --out DIR --eurosat data/EuroSAT_RGB

DIR gets the patches (4 KB of disk each), links to them, and the packed images (12 KB each); what is there already is
taken as it is. Both sets are trained on in turn, for as many steps, and then `benchmark data` measures both. More
keys are those of `train`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from hvd_eurosat.data.inputs import EUROSAT_CLASSES
from hvd_eurosat.data.processes import cores, in_processes
from hvd_eurosat.errors import STOPPED
from tests.parallel.conftest import command, variables

MB = 1e6
PATTERNS = 50  # of a class
PERIOD = 1.0  # seconds between two looks at a process, which cost it a hundredth of that
COMMENT = 0xFFFE  # JPEG's marker of a segment that nobody shows
KEYS = ("--model.weights", "none")
ENVIRONMENT = {**variables(OMP_NUM_THREADS=str(cores())), **os.environ}


def patterns(label: int) -> list[bytes]:
    """JPEGs of 64x64 pixels in the class's own colour and grain."""
    draw = np.random.default_rng(label)
    colour, cells = draw.integers(40, 200, 3), 2 + label
    found = []
    for _ in range(PATTERNS):
        pixels = (colour + draw.normal(0, 30, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
        stream = BytesIO()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def grow(source: Path, count: int) -> None:
    """So many patches, no two with the same bytes: each has its number in a comment."""
    images = [patterns(label) for label in range(len(EUROSAT_CLASSES))]
    for name in EUROSAT_CLASSES:
        (source / name).mkdir(parents=True)

    def write(numbers: range) -> None:
        for number in numbers:
            of_class, label = divmod(number, len(images))
            image, name = images[label][of_class % PATTERNS], EUROSAT_CLASSES[label]
            comment = struct.pack(">HHQ", COMMENT, 10, number)
            (source / name / f"{name}_{of_class}.jpg").write_bytes(image[:2] + comment + image[2:])

    for _ in in_processes(write, count, "drawing", cores()):
        pass


def watch(words: list[str], tell: Callable[[subprocess.Popen[bytes]], None] = lambda _: None) -> dict[str, float]:
    """Runs a command; its seconds, its "status", and in MB the largest of its processes and all of them at their peak.

    "rank": of the private memory of one process; "all": pages that several share count once. `tell` sees it meanwhile.
    """
    began, rank, every = time.monotonic(), 0.0, 0.0
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            tell(process)
            sizes = []
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                try:
                    sizes.append(one.memory_full_info())
                except psutil.Error:  # it is over
                    continue
            rank = max(rank, *(size.uss / MB for size in sizes), 0.0)
            every = max(every, sum(size.pss for size in sizes) / MB)
            time.sleep(PERIOD)
    return {"status": process.returncode, "seconds": time.monotonic() - began, "rank": rank, "all": every}


def train(data: Path, folder: Path, steps: int, keys: list[str]) -> dict[str, float]:
    """A run of `train` that is asked to stop after so many steps: as `watch`, and its images/s and start-up seconds."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    found: dict[str, Any] = {}

    def tell(process: subprocess.Popen[bytes]) -> None:
        try:
            status = json.loads((folder / "status.json").read_text())
        except (OSError, ValueError):
            return
        found["start"] = status["starts"][-1]["time"] - began
        if status.get("step", 0) >= steps and "rate" not in found:
            found["rate"] = status["images_per_second"]
            process.send_signal(signal.SIGUSR1)

    began = time.time()
    words = command("python", 1, "train", "--data.root", data, "--run.dir", folder, *KEYS, *keys)
    done = watch(words, tell)
    assert done["status"] == STOPPED
    return done | found


def main() -> int:
    """Prints what was measured, as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eurosat", type=Path, required=True, help="EuroSAT RGB, prepared")
    parser.add_argument("--steps", type=int, default=300)
    options, keys = parser.parse_known_args()
    out = options.out.resolve()
    source, data = out / f"source-{options.images}", out / f"data-{options.images}"
    if not source.exists():
        began = time.monotonic()
        grow(source, options.images)
        print(f"drawn: {options.images:,} patches in {time.monotonic() - began:,.0f} s", flush=True)
    if not data.exists():
        words = command("python", 1, "prepare", "--source", source, "--out", data, "--link")
        print("prepare --link:", _said(watch(words)), flush=True)
    first = train(data, out / "first", 1, keys)
    print("first start, which packs:", _said({**first, "rate": 0.0}), flush=True)
    for _ in range(2):
        for name, folder in (("EuroSAT", options.eurosat), (f"{options.images:,} patches", data)):
            print(
                f"{options.steps} steps on {name}:", _said(train(folder, out / "run", options.steps, keys)), flush=True
            )
    for name, folder in (("eurosat", options.eurosat), ("many", data)):
        words = command("python", 1, "benchmark", "data", "--data.root", folder, "--run.dir", out / f"benchmark-{name}")
        subprocess.run([*words, "--steps", str(options.steps), *KEYS, *keys], env=ENVIRONMENT, check=True)
    return 0


def _said(found: dict[str, float]) -> str:
    parts = [f"status {found['status']:.0f}, {found['seconds']:,.0f} s"]
    parts += [f"start-up {found['start']:,.1f} s"] if "start" in found else []
    parts += [f"{found['rate']:,.1f} images/s"] if found.get("rate") else []
    parts.append(f"a process's own memory {found['rank']:,.0f} MB at its peak, of all together {found['all']:,.0f} MB")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
