"""What `prepare` tells its user, on stderr, of how a source's images came into a folder."""

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hvd_eurosat.data.copying import HARD, SYMBOLIC, WRITTEN, Copies
from hvd_eurosat.data.images import list_flaws
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.tree import Manifest, Rule, Skipped
from hvd_eurosat.errors import UserError


def of_groups(copies: Copies, groups: Sequence[Sequence[int]], spec: str, rule: Rule) -> None:
    """A warning where images are there several times: in several splits, where the source makes them."""
    if rule.kind == "random" and groups:
        more = sum(len(group) - 1 for group in groups)
        print(
            f"warning: {more:,} of {len(copies):,} images of {spec} are copies of others; copies share a split",
            file=sys.stderr,
        )
    places = [sorted({int(copies.splits[number]) for number in group}) for group in groups]
    torn = Counter(" and ".join(SPLITS[place] for place in splits) for splits in places if len(splits) > 1)
    if torn:
        counts = ", ".join(f"{count:,} in {splits}" for splits, count in sorted(torn.items()))
        why = ", as the lists say" if rule.kind == "lists" else ""
        print(f"warning: {torn.total():,} images of {spec} are in several splits{why}: {counts}", file=sys.stderr)


def of_blocks(manifest: Manifest, rule: Rule) -> None:
    """How near to the ratios whole blocks came."""
    totals = [sum(manifest.counts[split].values()) for split in SPLITS]
    got = ":".join(f"{100 * total / sum(totals):.1f}" for total in totals)
    asked = ":".join(f"{100 * part / sum(manifest.ratios or (1,)):.1f}" for part in manifest.ratios or ())
    blocks = ", ".join(f"{count:,} {split}" for split, count in rule.blocks.items())
    print(f"note: blocks of {rule.degrees:g} degrees, {blocks}: {got} of the images, for {asked}", file=sys.stderr)


def of_sizes(copies: Copies, spec: str, side: int) -> None:
    """A note on what was resized, for afterwards all look alike."""
    sizes = copies.found.sizes[copies.there].astype(np.int64)
    resized = sizes[(sizes != side).any(1)]
    if len(resized):
        (width, height), others = resized[resized.prod(1).argmax()], np.count_nonzero(resized[:, 0] != resized[:, 1])
        squeezed = f"; squeezed, for they are no squares: {others:,}" if others else ""
        what = f"resized {len(resized):,} images of {spec} to {side}x{side}, the largest from {width}x{height}"
        print(f"note: {what}{squeezed}", file=sys.stderr)


def of_links(copies: Copies, spec: str) -> None:
    """A note on what the folder has in place of copies."""
    how = copies.found.how
    if links := {kind: how[kind] for kind in (HARD, SYMBOLIC) if how[kind]}:
        counts = " and ".join(f"{count:,} {kind}" for kind, count in links.items())
        made = f", and {how[WRITTEN]:,} written anew" if how[WRITTEN] else ""
        why = "; symbolic are those to other file systems, or to files of other users" if SYMBOLIC in links else ""
        print(f"note: the folder has {counts} to images of {spec}{made}{why}", file=sys.stderr)


def of_skipped(skipped: Sequence[Skipped], total: int, spec: str, allowed: bool) -> None:
    """A warning of files that are left out, if that is allowed. Raises UserError, which names them, if not."""
    if not skipped:
        return
    flaws = {bad.file: bad.reason for bad in skipped}
    summary = f"{len(flaws):,} of {total:,} files of {spec} cannot be used"
    if not allowed:
        raise UserError(list_flaws(f"{summary} (--skip-bad leaves them out)", flaws))
    print(f"warning: {list_flaws(f'{summary} and are left out', flaws)}", file=sys.stderr)


def of_converted(copies: Copies, spec: str) -> dict[str, tuple[str, ...]]:
    """The converted images of the source by what they were, which is told."""
    kinds: dict[str, list[str]] = {}
    for number, kind in copies.found.was.items():
        if copies.there[number]:
            kinds.setdefault(kind, []).append(copies.items[number].path)
    if kinds:
        counts = ", ".join(f"{len(files):,} of {kind}" for kind, files in sorted(kinds.items()))
        total = sum(map(len, kinds.values()))
        print(f"note: converted {total:,} images of {spec} to 8-bit RGB: {counts}", file=sys.stderr)
    return {kind: tuple(sorted(files)) for kind, files in sorted(kinds.items())}
