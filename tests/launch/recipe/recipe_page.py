"""The index and the tables of docs/recipes.md, generated from the config fields:
`python -m tests.launch.recipe.recipe_page`.

A key links to the page that explains it: the first of its block's pages that has the word.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from treering.launch.recipe.schema import fields as fields_of
from treering.models.spec import TowerSpec
from treering.training.recipe import Recipe

DOCS = Path(__file__).parents[3] / "docs"
SUBJECTS = {
    "data": ("order", "samples", "sources"),
    "data.train": ("sources", "samples", "order"),
    "data.augment": ("samples",),
    "data.cache": ("order", "sources"),
    "model": ("growth", "interchange"),
    "model.modalities": ("samples", "growth"),
    "objectives": ("objectives",),
    "stages": ("growth", "objectives", "order"),
    "optimizer": ("engines", "howto", "growth"),
    "schedule": ("howto",),
    "engine": ("engines", "objectives"),
    "checkpoint": ("checkpoints", "engines", "howto"),
    "eval": ("evaluation",),
    "log": ("checkpoints", "engines"),
    "watchdog": ("checkpoints", "slurm"),
    "recovery": ("checkpoints",),
    "init_from": ("checkpoints", "howto"),
}
"""the pages about a block and what is in it, the first one first"""
TOWERS = "The fields of every tower"


def tables() -> str:
    """The index, and a heading and a table for each block in the order of the recipe; blocks inside follow."""
    sections = list(_tables("", Recipe))
    at = next(i for i, section in enumerate(sections) if section.startswith("## `model.image`"))
    rows = _table("model", dict(TowerSpec.model_fields))
    sections.insert(
        at, f"## {TOWERS}\n\n`model.image`, `model.text`, `model.shared` and modalities have them.\n\n{rows}"
    )
    return "\n\n".join([_index([section.splitlines()[0][3:] for section in sections]), *sections]) + "\n"


def _index(titles: list[str]) -> str:
    """One line for each block of the recipe, with links to it and to the blocks inside it."""
    lines: dict[str, list[str]] = {}
    for title in titles:
        block = re.match(r"`(\w+)", title)
        lines.setdefault("model" if title == TOWERS else block[1] if block else "", []).append(_link(title))
    return "\n".join(f"- {', '.join(links)}" for links in lines.values())


def _link(title: str) -> str:
    """A link to a heading of this page, by the name that GitHub gives it."""
    return f"[{title}](#{re.sub(r'[^a-z0-9_ -]', '', title.lower()).replace(' ', '-')})"


def _tables(path: str, block: type[BaseModel]) -> Iterator[str]:
    fields = {name: field for name, field in fields_of(block).items() if _ours(field)}
    title = f"## `{path}`" if path else "## The recipe"
    if path and typing.get_origin(kind := fields["kind"].annotation if "kind" in fields else None) is Literal:
        kinds = typing.get_args(kind)
        title += f", `kind: {kinds[0]}`" if len(kinds) == 1 else ""
    purpose = " ".join((block.__doc__ or "").split())
    own = fields
    if issubclass(block, TowerSpec):
        own = {name: field for name, field in fields.items() if name not in TowerSpec.model_fields}
        purpose += f" It has {_link(TOWERS.lower())}{', and these:' if own else '.'}"
    yield "\n\n".join([title, purpose, *([_table(path, own)] if own else [])])
    for name, field in fields.items():
        for inner in _blocks(field.annotation):
            yield from _tables(f"{path}.{name}".lstrip("."), inner)


def _table(path: str, fields: dict[str, FieldInfo]) -> str:
    ordered = sorted(fields.items(), key=lambda item: item[0] != "kind")
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *(_row(path, *each) for each in ordered)])


def _ours(field: FieldInfo) -> bool:
    """Whether the field belongs to this package; other installed packages may add objectives."""
    return all(block.__module__.startswith("treering.") for block in _blocks(field.annotation))


def _row(path: str, name: str, field: FieldInfo) -> str:
    whole = f"{path}.{name}".lstrip(".")
    several = {0: "", 1: f"see {_link(f'`{whole}`')}"}
    description = field.description or several.get(len(_blocks(field.annotation)), "of one of the kinds below")
    words = _words(field.annotation)
    what = " ".join(description.split()).replace("|", "\\|")
    page = explained_in(whole)
    key = f"[`{name}`]({page}.md)" if page else f"`{name}`"
    return f"| {key} | {_default(field)} | {what}{f' ({words})' if words else ''} |"


def explained_in(path: str) -> str | None:
    """The name of the page that explains a key; None if none has more to say."""
    parts = path.split(".")
    block = next((b for n in range(len(parts), 0, -1) if (b := ".".join(parts[:n])) in SUBJECTS), None)
    word = re.compile(rf"(?<!\w){re.escape(parts[-1])}(?!\w)")
    return next((name for name in SUBJECTS.get(block or "", ()) if word.search(_page(name))), None)


@cache
def _page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


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
