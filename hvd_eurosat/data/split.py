"""The stratified split of class folders into train, valid and test."""

import hashlib
from collections.abc import Collection
from fractions import Fraction
from math import floor

from hvd_eurosat.errors import UserError

Ratios = tuple[Fraction, Fraction, Fraction]


def sizes(count: int, ratios: Ratios) -> tuple[int, int, int]:
    """How many of a class's `count` images go to train, valid and test.

    valid and test get their share rounded half up, at least 1; train gets the rest, which may be 0 or less.
    """
    valid, test = (max(1, floor(count * ratio / sum(ratios) + Fraction(1, 2))) for ratio in ratios[1:])
    return count - valid - test, valid, test


def split_class(label: str, names: Collection[str], ratios: Ratios, seed: int) -> dict[str, list[str]]:
    """The names of one class's images by split. Depends on names, ratios and seed, not on the names' order.

    Copies of an image are named once. Raises UserError, which names the class, when a split would stay empty.
    """
    if len(names) < 3:
        raise UserError(
            f"class {label} has {len(names)} usable images, copies counted once; train, valid and test need 1 each"
        )
    train, valid, _ = sizes(len(names), ratios)
    if train < 1:
        raise UserError(f"class {label} has {len(names)} images, and these ratios leave none of them to train")

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{label}/{name}".encode()).digest()

    drawn = sorted(names, key=draw)
    return {
        "valid": drawn[:valid],
        "test": drawn[valid : len(drawn) - train],
        "train": drawn[len(drawn) - train :],
    }
