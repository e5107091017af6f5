"""What a command line can be told before any rank is joined, and before torch is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from hvd_eurosat.cluster.environment import is_parallel, launched
from hvd_eurosat.errors import UserError


def answer(configure: Callable[[Sequence[str]], object]) -> None:
    """Print the help that was asked for, or a process's own mistake, and end; return where there is work to do.

    Ranks of a job check their command lines together instead, once they have joined it (`job.run`).
    """
    asked = {"-h", "--help"} & set(sys.argv[1:])
    rank, _ = launched()
    if asked and rank > 0:
        sys.exit(0)
    if asked or not is_parallel():
        try:
            configure(sys.argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
