"""A new domain for an old network: every image with red and blue swapped and half the brightness.

    .venv/bin/python docs/new_domain.py data/EuroSAT_RGB data/EuroSAT_shifted

The split and the names stay; the files are PNG, so that nothing but colour and brightness changes.
"""

import sys
from pathlib import Path

from PIL import Image


def main(source: Path, out: Path) -> None:
    for path in sorted(source.glob("*/*/*.*")):
        red, green, blue = Image.open(path).split()
        target = (out / path.relative_to(source)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.merge("RGB", (blue, green, red)).point(lambda value: value // 2).save(target, compress_level=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
