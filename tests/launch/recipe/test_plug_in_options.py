"""The options of another package's objective are refused in the words of ours, whatever its config is made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.training.objectives import registry

MODULE = """
from enum import Enum
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from treering.training.objectives.config import ObjectiveConfig
from treering.training.objectives.registry import register

class Kind(Enum):
    near = "near"
    far = "far"

class Loose(ObjectiveConfig, frozen=True, extra="forbid", strict=False):
    number: int = Field(3, multiple_of=3)
    rate: float = 0.5
    on: bool = False
    kind: Kind = Kind.near
    own: str = "x"
    sure: int = 1

    @field_validator("own")
    @classmethod
    def _own(cls, value):
        if value != "x":
            raise PydanticCustomError("another", "{value} is not x; write x", {"value": value})
        return value

    @field_validator("sure")
    @classmethod
    def _sure(cls, value):
        assert value == 1, f"sure = {value} must be 1"
        return value

@register("loose", Loose)
def build(config, seed):
    raise NotImplementedError
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages: one offers the objective `loose`, and one an objective that cannot be loaded."""
    info = tmp_path / "loose-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loose\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[treering.objectives]\nloose = of_another\nbroken = of_nobody\n")
    (tmp_path / "of_another.py").write_text(MODULE)
    (tmp_path / "of_nobody.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    registry._registry.pop("loose", None)
    sys.modules.pop("of_another", None)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("number: abc", "objectives.loose.number = 'abc' (override): must be a whole number"),
        ("number: 4", "objectives.loose.number = 4 (override): must be a multiple of 3"),
        ("rate: abc", "objectives.loose.rate = 'abc' (override): must be a number"),
        ("on: maybe", "objectives.loose.on = 'maybe' (override): must be true or false"),
        ("kind: c", "objectives.loose.kind = 'c' (override): must be 'near' or 'far'"),
        ("own: y", "objectives.loose.own = 'y' (override): y is not x; write x"),
        ("sure: 5", "objectives.loose: sure = 5 must be 1 (override)"),
        ("wieght: 1", "objectives.loose.wieght (override): no such key; did you mean weight?"),
    ],
)
def test_an_option(site: Path, option: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read_recipe("emoji", [f"objectives.loose={{{option}}}"])
    assert str(refused.value) == f"the recipe emoji: {said}"


def test_a_package_that_cannot_be_loaded(site: Path) -> None:
    wrong = r"'broken' cannot be loaded from of_nobody \(ModuleNotFoundError: .*\); repair that package"
    with pytest.raises(RecipeError, match=wrong):
        read_recipe("emoji", ["objectives.broken={}"])
