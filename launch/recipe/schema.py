"""The valid keys of a recipe, derived from the config classes; for overrides and for "did you mean".

A *slot* is the annotation of a field, without Optional and Annotated. Three kinds of slot have parts: a config
block (its fields; of a union of blocks, such as the engines, the fields of all), a list (`tuple[X, ...]`) and a table
of free keys (`dict[str, X]`). Everything else is a value.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ...training.recipe import Recipe
from .yaml_lines import Path


def blocks(slot: Any) -> tuple[type[BaseModel], ...]:
    """The config classes of a block: one, or several among which the key `kind` selects; empty for other slots."""
    slot = _bare(slot)
    members = get_args(slot) if get_origin(slot) in (Union, types.UnionType) else (slot,)
    bare = [_bare(member) for member in members]
    return tuple(each for each in bare if isinstance(each, type) and issubclass(each, BaseModel))


def fields(slot: Any, key: str = "") -> dict[str, FieldInfo]:
    """The fields of a block, or of all blocks of a union. A block to which other packages may add fields has a function
    `recipe_fields`, which also looks for `key` in those packages."""
    found: dict[str, FieldInfo] = {}
    for config in reversed(blocks(slot)):
        of = getattr(config, "recipe_fields", None)
        found |= of(key) if of else config.model_fields
    return found


def is_list(slot: Any) -> bool:
    """Whether a slot holds a list."""
    return get_origin(_bare(slot)) in (tuple, list)


def is_free_table(slot: Any) -> bool:
    """Whether a slot holds a table of free keys."""
    return get_origin(_bare(slot)) is dict


def part(slot: Any, key: str | int) -> Any | None:
    """The slot of one part of `slot`; None if it does not exist."""
    slot = _bare(slot)
    if blocks(slot):
        field = fields(slot, str(key)).get(str(key))
        return field.annotation if field else None
    if is_list(slot) and isinstance(key, int):
        return get_args(slot)[0]
    if is_free_table(slot) and isinstance(key, str):
        return get_args(slot)[1]
    return None


def slot_at(path: Path) -> Any | None:
    """The slot at `path`, or None."""
    slot: Any = Recipe
    for key in path:
        slot = part(slot, key)
        if slot is None:
            return None
    return slot


def known_part(path: Path) -> Path:
    """The longest valid prefix of `path`, without the names of union members that pydantic inserts."""
    slot: Any = Recipe
    known: Path = ()
    for key in path:
        inner = part(slot, key)
        if inner is None and len(blocks(slot)) > 1 and key in _kinds(slot):
            continue
        if inner is None:
            return known
        slot, known = inner, (*known, key)
    return known


def _kinds(slot: Any) -> dict[str, type[BaseModel]]:
    """The blocks of a union by the value of `kind` that selects each."""
    return {get_args(config.model_fields["kind"].annotation)[0]: config for config in blocks(slot)}


def field_purpose(path: Path) -> str:
    """The description of the field at `path`; empty if it has none."""
    field = fields(slot_at(path[:-1])).get(str(path[-1])) if path else None
    return (field.description or "") if field else ""


def all_paths() -> list[str]:
    """Every key of a recipe as a dotted path, with N for the index in a list."""

    def walk(slot: Any, prefix: str) -> Iterator[str]:
        if blocks(slot):
            for name, field in fields(slot).items():
                yield prefix + name
                yield from walk(field.annotation, f"{prefix}{name}.")
        elif is_list(slot):
            yield from walk(part(slot, 0), f"{prefix}N.")

    return list(walk(Recipe, ""))


def unknown(path: Path) -> str:
    """The message about the unknown key at the end of `path`: what is wrong, and what to write instead."""
    key, level = str(path[-1]), path[:-1]
    if kinds := [kind for kind, config in _kinds_of(level).items() if key in config.model_fields]:
        block = ".".join(map(str, level))
        whole = f"as in '{block}={{kind: ...}}', which replaces the block"
        return f"only for {block}.kind = {' or '.join(kinds)}; set that, or leave {key} out, {whole}"
    return f"no such key; {_suggestion(key, level)}"


def _kinds_of(level: Path) -> dict[str, type[BaseModel]]:
    slot = slot_at(level)
    return _kinds(slot) if len(blocks(slot)) > 1 else {}


def _suggestion(key: str, level: Path) -> str:
    """What to write instead of an unknown key of the block at `level`."""
    known = list(fields(slot_at(level)))
    everywhere = all_paths()
    if "." in key and slot_at((*level, *key.split("."))) is not None:
        return f"write it nested, as {_nested(key)}"
    elsewhere = [p for p in everywhere if p.rpartition(".")[2] == key]
    if elsewhere:
        return f"{key} belongs to {' or '.join(elsewhere[:3])}"
    if near := get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?"
    if longer := next((name for name in known if name.startswith(f"{key}_")), None):
        return f"did you mean {longer}?"
    names = {p.rpartition(".")[2]: p for p in reversed(everywhere)}
    if near := get_close_matches(key, names, n=1, cutoff=0.75):
        return f"did you mean {names[near[0]]}?"
    return f"known here: {', '.join(known)}" if known else "remove it"


def _nested(dotted: str) -> str:
    head, *rest = dotted.split(".")
    return f"{head}: " + "".join(f"{{{name}: " for name in rest) + "..." + "}" * len(rest)


def _bare(slot: Any) -> Any:
    """`slot` without Annotated and without None."""
    while get_origin(slot) is Annotated:
        slot = get_args(slot)[0]
    if get_origin(slot) in (Union, types.UnionType):
        members = [member for member in get_args(slot) if member is not types.NoneType]
        if len(members) == 1:
            return _bare(members[0])
    return slot
