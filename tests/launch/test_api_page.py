"""docs/api.md is what the code says, and has every name that the package exports."""

from __future__ import annotations

from pathlib import Path

import treering
from treering.tests.launch.api_page import PUBLIC, page

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
MARK = "<!-- python -m tests.launch.api_page -->\n\n"


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.partition(MARK)[2] == page(), "write it anew: python -m tests.launch.api_page"


def test_every_name_of_the_package_stands_there() -> None:
    assert set(PUBLIC["treering"]) == set(treering._MODULES)
