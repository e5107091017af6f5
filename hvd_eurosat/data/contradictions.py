"""An image that is in two classes: nobody can tell the right one, so no command uses it.

`prepare` knows copies by their bytes. Where files are not read beforehand, links to one file are known by its inode.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvd_eurosat.data.layout import Item


def contradictions(groups: Iterable[Sequence[Item]]) -> dict[str, str]:
    """Why images of two classes cannot be used, by their paths. groups: items that are one image."""
    flaws = {}
    for items in groups:
        first = items[0]
        other = next((item for item in items if item.label != first.label), None)
        if other is None:
            continue
        for item in items:
            twin = first if item.label != first.label else other
            flaws[item.path] = f"the same image as {twin.path} of another class"
    return flaws


def linked(items: Iterable[Item], statuses: Mapping[str, os.stat_result]) -> dict[str, str]:
    """The contradictions among files that are one by hard or symbolic links. statuses: by the items' paths."""
    files: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        status = statuses[item.path]
        files.setdefault((status.st_dev, status.st_ino), []).append(item)
    return contradictions(files.values())


def status_of(path: Path) -> os.stat_result:
    """Of the file that a path leads to."""
    try:
        return path.stat()
    except OSError:  # a link that leads nowhere is a bad image, named with the others
        return path.lstat()
