"""docs/recipes.md has every field as it is, and its example is a recipe."""

from __future__ import annotations

import textwrap
from pathlib import Path

from treering.launch.recipe.load import read_recipe
from treering.tests.launch.recipe.recipe_page import tables

PAGE = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    made = PAGE.partition("<!-- python -m tests.launch.recipe.recipe_page -->\n\n")[2]
    assert made == tables(), "write them anew: python -m tests.launch.recipe.recipe_page"


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    block = PAGE[PAGE.index("    name: small") : PAGE.index("All fields follow")]
    (tmp_path / "small.yaml").write_text(textwrap.dedent(block))
    recipe = read_recipe(str(tmp_path / "small.yaml"), []).recipe
    assert [spec.image.depth for spec in recipe.specs()] == [2, 4]
