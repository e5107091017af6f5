"""The resolved configuration of every recipe, so that a default that changes shows in review.

After a change that is meant: python -m tests.unit.test_recipes
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_eurosat.config.reading import load

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def resolved(recipe: Path) -> str:
    return load(["--config", str(recipe)]).to_toml()


def test_every_recipe_has_one() -> None:
    assert [path.name for path in sorted(GOLDEN.iterdir())] == [path.name for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.stem))
def test_recipe_as_resolved(recipe: Path) -> None:
    assert resolved(recipe) == (GOLDEN / recipe.name).read_text(), "meant? then python -m tests.unit.test_recipes"


if __name__ == "__main__":
    for path in RECIPES:
        (GOLDEN / path.name).write_text(resolved(path))
