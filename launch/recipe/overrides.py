"""`key=value` on the command line: sets one value, or a whole block, in the recipe's tree before it is checked.

A key is a dotted path, with list items by index from 0 (`stages.0.samples=320`). A value is YAML, as in the recipe
(`stages=[{samples: 40000}]`, `model.captioner=null`). Overrides are applied in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...data.storage.credentials import holds_secret
from ...training.recipe import Recipe
from ..errors import RecipeError, safe_text, show
from . import schema
from .yaml_lines import Path, read_yaml


class Override(NamedTuple):
    """One `key=value`, parsed."""

    key: str
    value: Any


def parse_override(text: str) -> Override:
    """Split and parse `key=value`. Raises RecipeError."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise RecipeError(
            f"the override {show(text)} is not of the form key=value, as in optimizer.lr=3e-4 or stages.0.samples=320"
        )
    try:
        parsed, wrong = read_yaml(value)[0], None
    except RecipeError as error:
        parsed, wrong = None, error
    if any(map(holds_secret, [key, *(_texts(parsed) if isinstance(parsed, dict | list) else [value])])):
        raise RecipeError(secret_found(f"the override {show(key)}"))
    if wrong:
        raise RecipeError(f"the override {show(key)}: {wrong}; if it has spaces, quote it for the shell") from None
    return Override(key, parsed)


def _texts(value: Any) -> Iterator[str]:
    """Every text and key in a parsed value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def secret_found(where: str) -> str:
    """The message for credentials in a recipe, without repeating them."""
    return (
        f"{where} holds credentials inside a URL. A recipe is stored in the run folder and in every commit; remove "
        f"them, and set environment variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) or the "
        f"credentials file (~/.aws/credentials) instead"
    )


def apply_override(tree: Any, override: Override) -> Path:
    """Set the value in `tree` (changed in place) and return its path. Raises RecipeError if that path cannot exist."""
    parts = override.key.split(".")
    branch: Any = tree
    slot: Any = Recipe
    path: Path = ()
    while True:
        key, used = _next_key(branch, slot, parts, path, override)
        parts = parts[used:]
        path = (*path, key)
        if not parts:
            branch[key] = override.value
            return path
        slot = schema.part(slot, key) if slot is not None else None
        branch = _enter(branch, key, slot, path, override)


def _next_key(branch: Any, slot: Any, parts: list[str], path: Path, override: Override) -> tuple[str | int, int]:
    """The next key to follow in `branch`, and how many dotted parts it takes."""
    if isinstance(branch, list):
        number = int(parts[0]) if parts[0].isascii() and parts[0].isdecimal() and len(parts[0]) < 6 else None
        if number is None or number >= len(branch):
            last = f"0 to {len(branch) - 1}" if branch else "none, it is empty"
            raise _refused(
                override,
                f"{dotted(path)} is a list and has no item {show(parts[0])} (items: {last}); "
                f"give the index of an item, or the whole list as {dotted(path)}=[...]",
            )
        return number, 1
    for used in range(len(parts), 1, -1):  # keys of a table may contain dots, as in grow: {image.depth: 8}
        if ".".join(parts[:used]) in branch:
            return ".".join(parts[:used]), used
    blocks = bool(schema.blocks(schema.part(slot, parts[0])))  # a table of blocks: after the name comes a field
    if schema.is_free_table(slot) and not blocks and parts[0] not in branch:
        return ".".join(parts), len(parts)
    return parts[0], 1


def _enter(branch: Any, key: str | int, slot: Any, path: Path, override: Override) -> Any:
    """The mapping or list at `key` of `branch`; a missing mapping is created."""
    inside = branch[key] if isinstance(key, int) else branch.get(key)
    if inside is None:
        if schema.is_list(slot):
            here = dotted(path)
            raise _refused(override, f"the recipe does not set {here}; give the whole list as {here}=[...]")
        inside = branch[key] = {}
    if not isinstance(inside, dict | list):
        here = dotted(path)
        raise _refused(override, f"{here} is the value {show(inside)} and has no parts; set {here}=...")
    return inside


def _refused(override: Override, why: str) -> RecipeError:
    return RecipeError(f"the override {show(override.key)}: {why}")


def dotted(path: Path) -> str:
    """`path` with dots, safe to print."""
    return safe_text(".".join(str(key) for key in path))
