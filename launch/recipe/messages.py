"""Sentences about what is wrong with a recipe: path, value, line, what is wrong, remedy.

Turns pydantic's errors, which speak of types and unions, into messages a user can act on, and limits them to one
screen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ...models.wording import what_is_wrong
from ..errors import safe_text, show
from . import schema
from .overrides import dotted
from .yaml_lines import Path

MOST = 8
_NAMED_VALUE = re.compile(r"([\w.]+) = (\S+?)(?=[\s;,:]|$)")


def error_messages(error: ValidationError, tree: Any, places: Mapping[Path, str]) -> str:
    """Everything that is wrong, one line each. `places` has the origin of each value of `tree`."""
    grouped: dict[Path, list[ErrorDetails]] = {}
    errors = error.errors(include_url=False)
    inside = {detail["loc"][:-n] for detail in errors for n in range(1, len(detail["loc"]) + 1)}
    for detail in errors:
        if detail["type"] == "too_short" and detail["loc"] in inside:
            continue  # pydantic counts only the valid items of a list
        grouped.setdefault(_path(detail), []).append(detail)
    lines = [_message(path, details, tree, places) for path, details in grouped.items()]
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "\n".join(lines[:MOST] + more)


def _path(detail: ErrorDetails) -> Path:
    """The path of the error, without the names of union members; unknown and missing keys stay at its end."""
    path: Path = detail["loc"]
    if detail["type"] in ("extra_forbidden", "missing", "unknown_objective"):
        return (*schema.known_part(path[:-1]), path[-1])
    known = schema.known_part(path)
    return (*known, "kind") if detail["type"] == "union_tag_invalid" else known


def _message(path: Path, details: list[ErrorDetails], tree: Any, places: Mapping[Path, str]) -> str:
    kind = details[0]["type"]
    name = show(dotted(path), 80)[1:-1]
    if kind in ("value_error", "assertion_error"):
        return _from_validator(path, what_is_wrong(details), tree, places)
    if kind == "unknown_objective":
        return f"{name} ({_where(path, places)}): {details[0]['msg']}"
    if kind == "extra_forbidden":
        return f"{name} ({_where(path, places)}): {schema.unknown(path)}"
    if kind == "missing":
        purpose = schema.field_purpose(path)
        return f"{name} is missing ({_where(path[:-1], places)}); add it" + (f": {purpose}" if purpose else "")
    value, purpose = details[0]["input"], schema.field_purpose(path)
    if kind == "union_tag_invalid":
        value = value.get("kind") if isinstance(value, dict) else value
    wrong = safe_text(what_is_wrong(details))
    return f"{name} = {show(value)} ({_where(path, places)}): {wrong}" + (f" ({purpose})" if purpose else "")


def _from_validator(path: Path, message: str, tree: Any, places: Mapping[Path, str]) -> str:
    """The sentence of a config's validator, which has field, value and remedy, with the block and the line added."""
    message = safe_text(message)
    for named, value in _NAMED_VALUE.findall(message):
        for place in places:
            ours = place[: len(path)] == path and f".{dotted(place)}".endswith(f".{named}")
            ours = ours and ("grow" in place or not message.startswith("grow: "))  # a stage's size, not the model's
            if ours and str(_value(tree, place)) == value:
                owner = dotted(place).removesuffix(named).rstrip(".")
                if owner.endswith(".grow"):
                    message = message.removeprefix("grow: ")
                return f"{owner}{': ' if owner else ''}{message} ({places[place]})"
    return f"{dotted(path)} ({_where(path, places)}): {message}" if path else message


def _where(path: Path, places: Mapping[Path, str]) -> str:
    """The origin of the value, or of the innermost enclosing block that has one."""
    # An override of a value inside a block that the recipe does not have sets no place for the block itself.
    inside = next((place for at, place in places.items() if path and at[: len(path)] == path), None)
    if path not in places and inside:
        return inside
    for length in range(len(path), -1, -1):
        if path[:length] in places:
            return places[path[:length]]
    return "default"


def _value(tree: Any, path: Path) -> Any:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree
