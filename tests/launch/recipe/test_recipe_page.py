"""docs/recipes.md has every field as it is, and its example is a recipe."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from treering.launch.recipe.load import read_recipe
from treering.tests.launch.recipe.recipe_page import DOCS, SUBJECTS, explained_in, tables

PAGE = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    made = PAGE.partition("<!-- python -m tests.launch.recipe.recipe_page -->\n\n")[2]
    assert made == tables(), "write them anew: python -m tests.launch.recipe.recipe_page"


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    block = PAGE[PAGE.index("    name: small") : PAGE.index("## The learning rate")]
    (tmp_path / "small.yaml").write_text(textwrap.dedent(block))
    recipe = read_recipe(str(tmp_path / "small.yaml"), []).recipe
    assert [spec.image.depth for spec in recipe.specs()] == [2, 4]


def test_both_schedules_of_the_page_are_valid() -> None:
    written = [line.strip() for line in PAGE.splitlines() if line.startswith("    schedule: {kind")]
    kinds = [read_recipe("emoji", [line.replace(": ", "=", 1)]).recipe.schedule.kind for line in written]
    assert kinds == ["wsd", "cosine"]


def test_every_link_leads_somewhere() -> None:
    """To a page of docs/, or to a heading of this page by the name that GitHub gives it."""
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    names = {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in headings}
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 150
    assert [link for link in links if link[0] == "#" and link[1:] not in names] == []
    assert [link for link in links if link[0] != "#" and not (DOCS / link).is_file()] == []
    assert all((DOCS / f"{page}.md").is_file() for pages in SUBJECTS.values() for page in pages)


def test_a_key_links_to_the_page_about_it() -> None:
    expected = {
        "data.train.filter": "sources",
        "data.train.caption_weights": "samples",
        "data.lanes": "order",
        "model.modalities.frames": "samples",
        "stages.replay": "growth",
        "schedule.cooldown": "howto",
        "checkpoint.max_bandwidth": "checkpoints",
        "eval.suites.protocol.broader": "evaluation",
    }
    assert {path: explained_in(path) for path in expected} == expected
    assert explained_in("optimizer.grad_clip") is None


def test_the_fields_of_every_tower_are_there_once() -> None:
    assert PAGE.count("[`mlp_ratio`]") == 1
    assert "## `model.shared`" in PAGE
