"""Reads YAML with the line number of every value.

Why not tyro, jsonargparse, Hydra or ruamel.yaml: the first three do not report the file and line of a wrong value;
ruamel.yaml does, but also accepts the rest of YAML, which is refused here.

It is a subset of YAML 1.2 in which no value is silently converted: numbers may be written 1e-3 and 20_000; only `true`
and `false` are booleans (`no` is text, and so is 1:30); duplicate keys, anchors, tags and infinities are refused. The
result consists of mappings, lists, text, numbers, booleans and null only.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import yaml

from ..errors import RecipeError, safe_text, show

Path: TypeAlias = tuple[str | int, ...]

DEEPEST = 16
LONGEST_NUMBER = 40
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?\d+(?:_\d+)*", "-+0123456789"),
    ("float", r"[-+]?(?:\d+(?:_\d+)*(?:\.(?:\d+(?:_\d+)*)?)?|\.\d+(?:_\d+)*)(?:[eE][-+]?\d+)?", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above, without anchors, and with limited nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"line {_line(event)}: anchors (&) and aliases (*) are not allowed; write the value out")
        if getattr(event, "tag", None):
            raise RecipeError(f"line {_line(event)}: the tag {show(event.tag)} is not allowed; write the plain value")
        if self.depth >= DEEPEST:
            raise RecipeError(f"line {_line(event)}: nested more than {DEEPEST} deep; a recipe needs no more than 5")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as another type, and writes no aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    for _name, _pattern, _first in _SCALARS:
        _kind.add_implicit_resolver(_PREFIX + _name, re.compile(rf"^{_pattern}\Z"), list(_first))


def read_yaml(text: str) -> tuple[Any, dict[Path, int]]:
    """The value of `text`, and the line (from 1) of every value in it by path.

    Raises RecipeError with the line of the mistake.
    """
    lines: dict[Path, int] = {}
    try:
        node = _Loader(text).get_single_node()
        return (None if node is None else _plain(node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = safe_text(", ".join(part for part in (error.context, error.problem) if part))
        raise RecipeError(f"{where}not valid YAML: {problem}; check colons, brackets, quotes and indentation") from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"character {error.position} is {show(chr(int(error.character)))}; remove it") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {safe_text(str(error))}") from None


def write_yaml(value: object) -> str:
    """`value` as YAML that `read_yaml` reads back equal; innermost mappings and lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def write_scalar(value: object) -> str:
    """One value, or an empty list or mapping, on one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.dump(
        value, Dumper=_Dumper, allow_unicode=True, width=float("inf"), default_flow_style=True, default_style=style
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _line(at: yaml.Event | yaml.Node) -> int:
    return int(at.start_mark.line) + 1 if at.start_mark else 1


def _plain(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    """The value of `node` as plain Python data; notes the line of everything in it."""
    lines[path] = _line(node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, number), lines) for number, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"line {_line(key_node)}: a key must be a word, not a list or a mapping")
        key = key_node.value
        if key in mapping:
            first = lines[(*path, key)]
            raise RecipeError(f"line {_line(key_node)}: duplicate key {show(key)} (first on line {first}); keep one")
        mapping[key] = _plain(value_node, (*path, key), lines)
        lines[(*path, key)] = _line(key_node)
    return mapping


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix(_PREFIX), node.value
    if kind == "str":
        return str(text)
    if kind == "null":
        return None
    if kind == "bool":
        return bool(text.lower() == "true")
    digits = text.replace("_", "")
    try:
        number = int(digits) if kind == "int" else float(digits)
    except ValueError:  # more digits than Python converts
        number = float("inf")
    if len(digits) > LONGEST_NUMBER or abs(number) == float("inf"):
        raise RecipeError(f"line {_line(node)}: {show(text)} is too large for a number; write a smaller one")
    return number
