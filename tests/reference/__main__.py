"""Any number of cases: python -m tests.reference --examples 500 --seed 1."""

from __future__ import annotations

import argparse

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.reference.cases import Case, cases, check

PHASES = (Phase.generate, Phase.shrink)


def main() -> None:
    """Draw, compare, and shrink what differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    checked = 0

    @seeded(asked.seed)
    @settings(
        max_examples=asked.examples,
        deadline=None,
        database=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def compare(case: Case) -> None:
        nonlocal checked
        check(case)
        checked += 1

    compare()
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main()
