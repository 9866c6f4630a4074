"""`treering recipes`: the bundled recipes, with what their first lines say: command, machine, time and score."""

from __future__ import annotations

from typing import Any

from ..errors import RecipeError, show
from ..recipe.load import BUNDLED, bundled_names


def list_recipes() -> list[dict[str, Any]]:
    """The bundled recipes: name, file, and the comments that its file begins with, line by line."""
    return [_described(name) for name in bundled_names()]


def read_bundled(name: str) -> dict[str, Any]:
    """One bundled recipe, with the whole text of its file. Raises RecipeError."""
    if name not in bundled_names():
        raise RecipeError(f"{show(name)} is not a bundled recipe; these are: {', '.join(bundled_names())}")
    return _described(name) | {"text": (BUNDLED / f"{name}.yaml").read_text(encoding="utf-8")}


def as_text(recipes: list[dict[str, Any]]) -> str:
    """The recipes for a terminal, their first lines below their names."""
    parts = ["\n".join([each["name"], *(f"  {line}" for line in each["about"])]) for each in recipes]
    return "\n\n".join(parts)


def _described(name: str) -> dict[str, Any]:
    file = BUNDLED / f"{name}.yaml"
    about = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("#").removeprefix(" "))
    return {"name": name, "file": str(file), "about": about}
