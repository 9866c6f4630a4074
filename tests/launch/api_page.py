"""docs/api.md below its mark, made from signatures and docstrings: `python -m tests.launch.api_page`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

PUBLIC = {
    "treering": ("train", "load", "Loaded", "import_open_clip"),
    "treering.training.objectives.base": ("Objective", "Inputs"),
    "treering.training.objectives.config": ("ObjectiveConfig",),
    "treering.training.objectives.registry": ("register",),
    "treering.training.world": ("World",),
    "treering.models.model": ("ModelOutput",),
    "treering.models.towers": ("TowerOutput",),
    "treering.launch.errors": ("RecipeError", "RunError"),
    "treering.data": ("DataError", "as_webdataset"),
    "treering.data.builtin": ("SampleSet",),
}
"""what others may build on, by the module it is imported from"""
_WIDTH = 110


def page() -> str:
    """A heading and the public names of each module."""
    return "\n\n".join(part for module, names in PUBLIC.items() for part in _module(module, names)) + "\n"


def _module(module: str, names: tuple[str, ...]) -> Iterator[str]:
    yield f"## `{module}`"
    for name in names:
        found = getattr(import_module(module), name)
        yield f"### `{name}`"
        if inspect.isclass(found):
            yield inspect.getdoc(found) or ""
            rows = [*_fields(found), *_members(found)]
            yield from ["\n".join(rows)] if rows else []
        else:
            yield f"```python\n{_signature(name, found)}\n```"
            yield inspect.getdoc(found) or ""


def _fields(found: type) -> Iterator[str]:
    """The fields of a data class with what stands below each, read from the source: values there have no text."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in pairwise([*definition.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_":
            said = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            said = said or _description(found, field.target.id)
            yield f"- `{field.target.id}: {ast.unparse(field.annotation)}`{f': {_one_line(said)}' if said else ''}"


def _description(found: type, name: str) -> str | None:
    fields = getattr(found, "model_fields", {})
    return fields[name].description if name in fields else None


def _members(found: type) -> Iterator[str]:
    """The methods and properties that a class defines, with the first paragraph of what they say."""
    for name, member in vars(found).items():
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        said = inspect.getdoc(inner)
        if name[0] != "_" and inspect.isfunction(inner) and said:
            shown = name if isinstance(member, property) else _one_line(_signature(name, inner, method=True))
            yield f"- `{shown}`: {_one_line(said.split(chr(10) * 2)[0])}"


def _signature(name: str, found: Any, method: bool = False) -> str:
    """`name(parameters) -> result`, on one line or a parameter a line where that is too long."""
    signature = inspect.signature(found)
    shown = [_parameter(each) for each in signature.parameters.values() if not (method and each.name == "self")]
    line = f"{name}({', '.join(shown)}) -> {signature.return_annotation}"
    if method or len(line) <= _WIDTH:
        return line
    return f"{name}(\n    " + ",\n    ".join(shown) + f",\n) -> {signature.return_annotation}"


def _parameter(each: inspect.Parameter) -> str:
    prefix = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
    default = "" if each.default is each.empty else f" = {each.default!r}"
    return f"{prefix}{each.name}: {each.annotation}{default}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
