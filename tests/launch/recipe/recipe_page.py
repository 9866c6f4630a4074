"""The tables of docs/recipes.md, generated from the config fields: `python -m tests.launch.recipe.recipe_page`."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from treering.launch.recipe.schema import fields as fields_of
from treering.training.recipe import Recipe


def tables() -> str:
    """A heading and a table for each block, in the order of the recipe; nested blocks follow their parent."""
    return "\n\n".join(_tables("", Recipe)) + "\n"


def _tables(path: str, block: type[BaseModel]) -> Iterator[str]:
    fields = {name: field for name, field in fields_of(block).items() if _ours(field)}
    fields = dict(sorted(fields.items(), key=lambda item: item[0] != "kind"))
    rows = [_row(name, field) for name, field in fields.items()]
    title = f"## `{path}`" if path else "## The recipe"
    if path and typing.get_origin(kind := fields["kind"].annotation if "kind" in fields else None) is Literal:
        kinds = typing.get_args(kind)
        title += f", `kind: {kinds[0]}`" if len(kinds) == 1 else ""
    purpose = " ".join((block.__doc__ or "").split())
    yield "\n".join([title, "", purpose, "", "| key | default | meaning |", "|---|---|---|", *rows])
    for name, field in fields.items():
        for inner in _blocks(field.annotation):
            yield from _tables(f"{path}.{name}".lstrip("."), inner)


def _ours(field: FieldInfo) -> bool:
    """Whether the field belongs to this package; other installed packages may add objectives."""
    return all(block.__module__.startswith("treering.") for block in _blocks(field.annotation))


def _row(name: str, field: FieldInfo) -> str:
    description = field.description or ("; ".join(f"see `{name}`" for _ in _blocks(field.annotation)[:1]) or "")
    words = _words(field.annotation)
    what = " ".join(description.split()).replace("|", "\\|")
    return f"| `{name}` | {_default(field)} | {what}{f' ({words})' if words else ''} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()  # type: ignore[misc, call-arg]
    if isinstance(value, BaseModel):
        return ""
    return "" if value is None or value in ((), {}, "") else f"`{json.dumps(value)}`"


def _words(annotation: Any) -> str:
    """The choices of a Literal, as text."""
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    inner = [each for each in typing.get_args(annotation) if typing.get_origin(each) is Literal]
    return _words(inner[0]) if inner and typing.get_origin(annotation) in (types.UnionType, typing.Union) else ""


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in a field's annotation: directly, optional, in a list or in a table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(b for each in typing.get_args(annotation) for b in _blocks(each)))


if __name__ == "__main__":
    print(tables(), end="")
