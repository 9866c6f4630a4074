"""The versions that are promised: lower bounds are what constraints-oldest.txt pins, and constraints.txt is allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def required() -> list[Requirement]:
    """What the product needs, its extras included; `test` is what its developers need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for name, some in project["optional-dependencies"].items() if name != "test" for each in some]
    return [Requirement(each) for each in [*project["dependencies"], *extras]]


def pinned(name: str) -> dict[str, Version]:
    lines = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(line.name): Version(str(line.specifier).removeprefix("==")) for line in lines}


@pytest.mark.parametrize("each", required(), ids=lambda each: each.name)
def test_lower_bounds_are_what_is_tested(each: Requirement) -> None:
    name = canonicalize_name(each.name)
    lowest = [bound.version for bound in each.specifier if bound.operator == ">="]
    assert [Version(version) for version in lowest] == [pinned("constraints-oldest.txt")[name]]
    assert each.specifier.contains(pinned("constraints.txt")[name])
