"""Which images a network was trained on, so that these can be told among others later.

They are noted once, beside the checkpoints: eight bytes of each image's sha256, 200 KB for EuroSAT. The folder of the
data may hold another split by then, or be elsewhere; and in the checkpoints themselves they would be saved every epoch.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_eurosat.data.batches import is_checked
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import Tree, open_tree
from hvd_eurosat.errors import UserError
from hvd_eurosat.training.checkpoint import Checkpoint
from hvd_eurosat.training.files import replacing
from hvd_eurosat.weights.stored import named


def note_images(folder: Path, tree: Tree) -> None:
    """Write down, beside the checkpoints in `folder`, the training images of a tree whose images' digests are known.

    Raises RunError where the disk is full or gone.
    """
    path = folder / _name(tree.digest)
    if path.exists() or not is_checked(tree):
        return
    buffer = io.BytesIO()
    np.save(buffer, _keys(tree, SPLITS[0]), allow_pickle=False)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def count_known(tree: Tree, split: str, saved: Checkpoint, path: Path) -> int | None:
    """How many images of another split the checkpoint at `path` was trained on; None where nobody can tell.

    Of the very split that it was trained on these are none, or those that were asked for.
    """
    same_place = tree.root.resolve() == Path(saved.config["data"]["root"]).expanduser().resolve()
    if saved.digest == tree.digest or (same_place and not is_checked(tree)):
        return 0
    if not is_checked(tree):
        return None
    trained = _trained_on(saved, path)
    return None if trained is None else int(np.isin(_keys(tree, split), trained).sum())


def _trained_on(saved: Checkpoint, path: Path) -> NDArray[np.uint64] | None:
    """From beside the checkpoint, from its run's folder, or from the data if they are where and what they were."""
    run = Path(saved.config["run"]["dir"] or ".").expanduser()
    for folder in (named(path).parent, run / "checkpoints"):
        try:
            return np.asarray(np.load(folder / _name(saved.digest), allow_pickle=False), dtype=np.uint64)
        except (OSError, ValueError, EOFError):
            continue
    try:
        tree = open_tree(Path(saved.config["data"]["root"]).expanduser())
    except UserError:
        return None
    return _keys(tree, SPLITS[0]) if tree.digest == saved.digest and is_checked(tree) else None


def _name(digest: str) -> str:
    return f"trained-on-{digest[:16]}.npy"


def _keys(tree: Tree, split: str) -> NDArray[np.uint64]:
    """uint64 [N]: the first eight bytes of each image's sha256."""
    return np.fromiter((int(checksum[:16], 16) for checksum in tree.sums(split)), np.uint64)
