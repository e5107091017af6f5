"""examples.json: of a tested run, the images worth a look.

Written once, after the test, from what rank 0 has then: the log-probabilities and the packed images.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXAMPLES = "examples.json"
MISTAKES, UNSURE, RIGHT = 200, 24, 4  # images: in all, in all, of each class
PIXELS = 96  # the most that a thumbnail has on a side
ROOM = 1_200_000  # bytes of thumbnails, so that the page stays under 2 MB

Indices = NDArray[np.intp]


def write_examples(
    path: Path,
    names: Sequence[str],
    values: NDArray[np.float32],
    labels: NDArray[np.int64],
    images: NDArray[np.uint8],
    epoch: int,
) -> None:
    """names: N, below the split's folder; values: log-probabilities [N, C]; labels: [N]; images: [N, S, S, 3].

    epoch: of the checkpoint that was tested. Raises RunError where it cannot be written.
    """
    from hvd_eurosat.training.files import write_text

    probabilities = np.exp(values.astype(np.float64))
    chosen, room = [], ROOM
    for index in choose(probabilities, labels):
        source = thumbnail(images[index])
        room -= len(source)
        if room < 0:
            break
        order = probabilities[index].argsort()[::-1][:2]
        chosen.append(
            {
                "name": names[index],
                "true": int(labels[index]),
                "given": int(order[0]),
                "second": int(order[1]),
                "probability": round(float(probabilities[index, order[0]]), 4),
                "second_probability": round(float(probabilities[index, order[1]]), 4),
                "source": source,
            }
        )
    content = {"epoch": epoch, "images": chosen}
    write_text(path, json.dumps(content) + "\n")


def choose(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> list[int]:
    """Indices of the images worth a look, the most telling first.

    Mistakes come first, those that the network was surest of, in turn of each pair of true and given class, so that no
    pair hides the others; then those that it was least sure of, and the least sure of the right ones of each class.
    """
    given, sure = probabilities.argmax(1), probabilities.max(1)
    pairs = labels * probabilities.shape[1] + given
    wrong = np.flatnonzero(given != labels)
    mistakes = in_turn(wrong[(-sure[wrong]).argsort(kind="stable")], pairs)
    unsure = in_turn(sure.argsort(kind="stable"), pairs)
    right = np.flatnonzero(given == labels)
    doubtful = in_turn(right[sure[right].argsort(kind="stable")], pairs)
    classes = len(np.unique(labels))
    order = [*mistakes[:MISTAKES], *unsure[:UNSURE], *doubtful[: RIGHT * classes]]
    return list(dict.fromkeys(int(index) for index in order))


def in_turn(indices: Indices, pairs: NDArray[np.int64]) -> list[int]:
    """The indices, one of each pair after the other, in each pair as they come. pairs: of all images."""
    seen: dict[int, int] = {}

    def turn(index: int) -> int:
        pair = int(pairs[index])
        seen[pair] = seen.get(pair, -1) + 1
        return seen[pair]

    turns = [turn(index) for index in indices]
    return [int(indices[n]) for n in sorted(range(len(indices)), key=turns.__getitem__)]


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A JPEG in a data: address. pixels: uint8 [S, S, 3]."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((PIXELS, PIXELS))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def read_examples(folder: Path) -> dict[str, Any]:
    """What examples.json of a run holds; nothing where it is missing or damaged, for the page can do without."""
    try:
        content = dict(json.loads((folder / EXAMPLES).read_bytes()))
        return content if content.keys() >= {"epoch", "images"} else {}
    except (OSError, ValueError, TypeError):
        return {}
