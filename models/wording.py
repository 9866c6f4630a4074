"""What is wrong with a value of a config, in a user's words: pydantic speaks of types, unions and inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping, as in {key: value}",
    "tuple_type": "a list, as in [a, b]",
    "list_type": "a list, as in [a, b]",
    "model_type": "a block of keys, as in {key: value}",
    "model_attributes_type": "a block of keys, as in {key: value}",
    # of configs that are not strict, as another package's may be
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "set_type": "a list, as in [a, b]",
    "path_type": "text",
}
_TYPES = ("int", "float", "str", "bool")
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}


def what_is_wrong(details: Sequence[ErrorDetails]) -> str:
    """What one value must be, from all of pydantic's errors about it; the sentence itself if a validator wrote one."""
    first, context, value = details[0], details[0].get("ctx", {}), details[0]["input"]
    kinds = dict.fromkeys(_KINDS[each["type"]] for each in details if each["type"] in _KINDS)
    if "a number" in kinds:
        kinds.pop("a whole number", None)
    if kinds:
        others = [each["ctx"]["expected"] for each in details if each["type"] == "literal_error"]  # such as 'auto'
        return f"must be {' or '.join([*kinds, *others])}{_rewritten(value, list(kinds))}"
    if first["type"] in ("literal_error", "enum"):
        return f"must be {context.get('expected')}"
    if first["type"] == "union_tag_invalid":
        return f"must be one of {context.get('expected_tags')}"
    for key, words in _LIMITS.items():
        if key in context:
            return f"must be {words} {context[key]}"
    if first["type"] == "finite_number":
        return "must be a finite number"
    if first["type"] == "string_pattern_mismatch":
        return "has characters that are not allowed"
    if first["type"] == "string_too_short":
        return "is empty; give a value"
    if first["type"] == "too_short":
        return f"must have {context.get('min_length', 1)} or more items"
    if first["type"] == "too_long":
        return f"must have at most {context.get('max_length')} items"
    said = re.sub("^(Value error|Assertion failed), ", "", first["msg"])
    return re.sub("^(Input|Value|String|Number) should ", "must ", said)


def _rewritten(value: Any, kinds: list[str]) -> str:
    """How to write the same value correctly, if that is clear; else empty."""
    if isinstance(value, float) and value.is_integer() and kinds == ["a whole number"]:
        return f"; write {int(value)}"
    if isinstance(value, str) and kinds == ["true or false"] and value.lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if isinstance(value, str) and "text" not in kinds and re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?", value):
        return "; remove the quotes"
    return ""


def first_mistake(error: ValidationError, known: Iterable[str] = ()) -> str:
    """The first thing that is wrong, with its place and value; `known` are the keys that the config has at its top."""
    every = [(_place(each), each) for each in error.errors()]
    (place, first), kind = every[0], every[0][1]["type"]
    if kind == "missing":
        return f"{place} is missing; add it"
    if kind == "extra_forbidden":
        near = get_close_matches(place, list(known), n=1)
        return f"{place}: no such key; {f'did you mean {near[0]}?' if near else 'correct its name or remove it'}"
    wrong = what_is_wrong([each for where, each in every if where == place])
    if kind in ("value_error", "assertion_error"):
        return f"{place}: {wrong}" if place else wrong
    return f"{place} = {str(first['input'])[:60]!r}: {wrong}" if place else wrong


def _place(detail: ErrorDetails) -> str:
    """The dotted path of a mistake, without the types of a union, each of which has a mistake of its own."""
    return ".".join(str(part) for part in detail["loc"] if part not in _TYPES)
