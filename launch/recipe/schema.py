"""The keys a recipe may have, read off the config classes; for overrides and for "did you mean".

A *slot* is the annotation of a field, with Optional and Annotated taken off. Three kinds of slot have parts: a config
block (its fields), a list (`tuple[X, ...]`) and a table of free keys (`dict[str, X]`). Everything else is a value.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from ...training.recipe import Recipe
from .yaml_lines import Path


def block(slot: Any) -> type[BaseModel] | None:
    """The config class of a slot that is a block."""
    slot = _bare(slot)
    return slot if isinstance(slot, type) and issubclass(slot, BaseModel) else None


def is_list(slot: Any) -> bool:
    """Whether a slot holds a list."""
    return get_origin(_bare(slot)) in (tuple, list)


def is_table(slot: Any) -> bool:
    """Whether a slot holds a table of free keys."""
    return get_origin(_bare(slot)) is dict


def part(slot: Any, key: str | int) -> Any | None:
    """The slot of one part of `slot`; None if there is no such part."""
    slot = _bare(slot)
    if (config := block(slot)) is not None:
        return config.model_fields[key].annotation if key in config.model_fields else None
    if is_list(slot) and isinstance(key, int):
        return get_args(slot)[0]
    if is_table(slot) and isinstance(key, str):
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
    """The longest start of `path` that a recipe can have: drops the names of union members pydantic appends."""
    slot: Any = Recipe
    for length, key in enumerate(path):
        slot = part(slot, key)
        if slot is None:
            return path[:length]
    return path


def describe(path: Path) -> str:
    """What the field at `path` is for, in the words of its config; empty if it does not say."""
    owner = block(slot_at(path[:-1])) if path else None
    field = owner.model_fields.get(str(path[-1])) if owner is not None else None
    return (field.description or "") if field else ""


def all_paths() -> list[str]:
    """Every key of a recipe, dotted, with N for the place in a list."""

    def walk(slot: Any, prefix: str) -> Iterator[str]:
        if (config := block(slot)) is not None:
            for name, field in config.model_fields.items():
                yield prefix + name
                yield from walk(field.annotation, f"{prefix}{name}.")
        elif is_list(slot):
            yield from walk(part(slot, 0), f"{prefix}N.")

    return list(walk(Recipe, ""))


def suggestion(path: Path) -> str:
    """What to write instead of the unknown key at the end of `path`, as a sentence."""
    key, level = str(path[-1]), path[:-1]
    owner = block(slot_at(level))
    known = list(owner.model_fields) if owner is not None else []
    everywhere = all_paths()
    if "." in key and slot_at((*level, *key.split("."))) is not None:
        return f"write it nested, as {_nested(key)}"
    elsewhere = [p for p in everywhere if p.rpartition(".")[2] == key]
    if elsewhere:
        return f"{key} belongs to {' or '.join(elsewhere[:3])}"
    if near := get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?"
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
