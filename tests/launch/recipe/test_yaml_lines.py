"""YAML with lines: what is read, what is refused, and that writing and reading are inverse."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from treering.launch.recipe.load import RecipeError
from treering.launch.recipe.yaml_lines import read_yaml, write_scalar, write_yaml

# Numbers that read_yaml takes: 40 digits at most, and finite.
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029\ufeff"), max_size=20)
LOOKALIKES = st.sampled_from(
    [
        "1e-3",
        "1_000",
        "true",
        "null",
        "~",
        "",
        "no",
        "1:30",
        "-",
        "- a",
        "a: b",
        "#",
        "2024-01-01",
        ".5",
        "<<",
        "0x1f",
        "*a",
        "&a",
        "!x",
        "5\n",
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT | LOOKALIKES
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | LOOKALIKES, inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types all the way down: 1 is not 1.0 is not True."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(TREES)
def test_written_is_read_back(tree: Any) -> None:
    assert same(read_yaml(write_yaml(tree))[0], tree)


@given(SCALARS)
def test_a_written_scalar_is_one_line_and_reads_back(value: Any) -> None:
    line = write_scalar(value)
    assert "\n" not in line
    assert same(read_yaml(f"key: {line}  # comment")[0], {"key": value})


PLAIN_TEXT = ["no", "yes", "on", "1:30", "0x10", ".inf", ".nan", "2024-01-01", "1_", "=", "2min"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("20_000", 20000), ("1_000.5", 1000.5), ("-3", -3), (".5", 0.5), ("010", 10),
        ("True", True), ("~", None), ("", None), ("'1e-3'", "1e-3"), *[(text, text) for text in PLAIN_TEXT],
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    assert same(read_yaml(text)[0], value)


def test_lines_are_where_the_keys_stand() -> None:
    text = "a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n"
    tree, lines = read_yaml(text)
    assert tree == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    assert lines == {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("b", 1, "d"): 5}


@given(TREES)
def test_agrees_with_the_line_numbers_of_pyyaml(tree: Any) -> None:
    """Every key's line, against a walk over PyYAML's own nodes."""
    text = yaml.safe_dump({"top": tree}, allow_unicode=True, width=20)
    try:
        _, lines = read_yaml(text)
    except RecipeError:
        return  # safe_dump writes an alias or an infinity
    found = {}

    def walk(node: yaml.Node, path: tuple[Any, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[(*path, number)] = value.start_mark.line + 1
                walk(value, (*path, number))

    walk(yaml.compose(text), ())
    assert {path: line for path, line in lines.items() if path} == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ["line 3", "'a'", "duplicate key", "line 1"]),
        ("a: {b: 1, b: 2}", ["line 1", "duplicate key"]),
        ("a: [1, 2", ["YAML", "line 1"]),
        ("a: 1\n b: 2", ["YAML", "line 2"]),
        ("a: &x 1\nb: *x", ["line 1", "anchors"]),
        ("a: *x", ["anchors"]),
        ("a: !!python/object/apply:os.system [ls]", ["line 1", "tag"]),
        ("a: !!int many", ["tag"]),
        ("a: 1e999", ["line 1", "smaller"]),
        ("a: " + "9" * 50, ["line 1", "smaller"]),
        ("a: " + "9" * 5000, ["line 1", "smaller"]),
        ("[" * 5000, ["nested"]),
        ("[a]: 1", ["line 1", "key"]),
        ("a: 1\n---\nb: 2", ["YAML"]),
        ("a: \x07", ["remove"]),
        ("\tname: x", ["YAML", "line 1"]),
    ],
)  # fmt: skip
def test_what_is_not_a_recipe_is_refused_in_a_sentence(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 300
