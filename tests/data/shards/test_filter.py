"""Filters against plain Python, sample by sample; hostile expressions; and a filtered source against a list."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data import DataConfig, DataError, Loader, open_source
from treering.data.config import SourceConfig
from treering.data.shards.columns import Collector, Columns
from treering.data.shards.filter import Filter

WriteTar = Callable[..., Path]
Sample = dict[str, Any]
OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
NAMES = ("a", "b", "nsfw", "labels.role")


def columns_of(samples: list[Sample]) -> Columns:
    collector = Collector()
    for row, sample in enumerate(samples):
        collector.add(row, json.dumps(sample).encode())
    return Columns(collector.table(len(samples)))


def accepted(text: str, samples: list[Sample]) -> list[bool]:
    return Filter(text).accepted(columns_of(samples)).tolist()


# Plain Python, one sample at a time: a tree of tuples is both written as a text and worked out. None is unknown.


def text_of(tree: tuple[Any, ...]) -> str:
    match tree:
        case ("column", name):
            return name
        case ("constant", value):
            return repr(value)
        case ("not", inner):
            return f"not ({text_of(inner)})"
        case ("minus", inner):
            return f"-({text_of(inner)})"
        case ("in", word, left, items):
            return f"({text_of(left)}) {word} ({', '.join(map(text_of, items))},)"
        case ("chain", first, *rest):
            return f"({text_of(first)})" + "".join(f" {op} ({text_of(right)})" for op, right in rest)
        case (op, left, right):
            return f"({text_of(left)}) {op} ({text_of(right)})"
    raise AssertionError(tree)


def value_of(tree: tuple[Any, ...], sample: Sample) -> Any:
    """A float, a text, a bool or None."""
    match tree:
        case ("column", name):
            found: Any = sample
            for part in name.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            return known(found)
        case ("constant", value):
            return known(value)
        case ("not", inner):
            truth = truth_of(inner, sample)
            return None if truth is None else not truth
        case ("minus", inner):
            value = value_of(inner, sample)
            return None if value is None or isinstance(value, str) else -value
        case ("and", left, right):
            both = (truth_of(left, sample), truth_of(right, sample))
            return False if False in both else None if None in both else True
        case ("or", left, right):
            both = (truth_of(left, sample), truth_of(right, sample))
            return True if True in both else None if None in both else False
        case ("in", word, left, items):
            each = [compared("==", value_of(left, sample), value_of(item, sample)) for item in items]
            found = True if True in each else None if None in each else False
            return found if found is None or word == "in" else not found
        case ("chain", first, *rest):
            values = [value_of(first, sample), *(value_of(right, sample) for _, right in rest)]
            links = [compared(op, *two) for (op, _), two in zip(rest, pairwise(values), strict=True)]
            return False if False in links else None if None in links else True
        case (op, left, right):
            one, two = value_of(left, sample), value_of(right, sample)
            if one is None or two is None or isinstance(one, str) or isinstance(two, str):
                return None
            try:
                return known(OPERATORS[op](float(one), float(two)))
            except ZeroDivisionError:
                return None
    raise AssertionError(tree)


def known(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float) or math.isnan(value):
        return None
    return float(value)


def compared(op: str, one: Any, two: Any) -> bool | None:
    if one is None or two is None:
        return None
    if op in ("==", "!="):
        return (one == two) == (op == "==")
    if isinstance(one, str) != isinstance(two, str):
        return None
    return bool(OPERATORS[op](one, two))


def truth_of(tree: tuple[Any, ...], sample: Sample) -> bool | None:
    value = value_of(tree, sample)
    return None if value is None else bool(value)


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.booleans(),
    st.sampled_from(
        [0.5, 0.28, -0.0, 1e300, -1e308, 1e-310, math.inf, -math.inf, 2**53 + 1, -(2**60), 255, 256, 70_000]
    ),
    st.floats(allow_nan=False, width=32),
)
TEXTS = st.sampled_from(["", "UNLIKELY", "NSFW", "ünï\U0001f98a", "0.5", "a'b"])
VALUES = st.one_of(NUMBERS, TEXTS)
SAMPLES = st.fixed_dictionaries(
    {},
    optional={
        "a": st.one_of(NUMBERS, st.none(), st.just(math.nan)),
        "b": st.one_of(VALUES, st.lists(st.integers(), max_size=1)),
        "nsfw": st.booleans(),
        "labels": st.fixed_dictionaries({}, optional={"role": TEXTS, "deep": st.just({"x": 1})}),
    },
)
LEAVES = st.one_of(
    st.sampled_from(NAMES).map(lambda name: ("column", name)),
    VALUES.filter(lambda v: not isinstance(v, float) or math.isfinite(v)).map(lambda value: ("constant", value)),
)


def values(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner, inner), st.tuples(st.just("minus"), inner)
    )


OPERANDS = st.recursive(LEAVES, values, max_leaves=5)
COMPARISONS = st.one_of(
    st.builds(
        lambda first, rest: ("chain", first, *rest),
        OPERANDS,
        st.lists(st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), OPERANDS), min_size=1, max_size=3),
    ),
    st.tuples(
        st.just("in"), st.sampled_from(["in", "not in"]), OPERANDS, st.lists(LEAVES, min_size=1, max_size=3)
    ),
)  # fmt: skip
FILTERS = st.recursive(
    st.one_of(COMPARISONS, LEAVES),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)
    ),
    max_leaves=6,
)  # fmt: skip


@given(FILTERS.filter(lambda tree: any(name in text_of(tree) for name in NAMES)), st.lists(SAMPLES, max_size=12))
@settings(max_examples=400, deadline=None)
def test_filters_agree_with_plain_python(tree: tuple[Any, ...], samples: list[Sample]) -> None:
    text = text_of(tree)
    if all(not isinstance(node, ast.Name) for node in ast.walk(ast.parse(text))):  # the names are all inside texts
        return
    assert accepted(text, samples) == [truth_of(tree, sample) is True for sample in samples]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similarity > 0.28 and not nsfw", [1, 0, 1, 0, 0]),
        ("0.28 < similarity <= 0.3", [1, 1, 0, 0, 0]),
        ("similarity * 100 - 1 >= 29 or width // 2 == 5", [1, 0, 1, 1, 0]),
        ('NSFW in ("UNLIKELY", "UNSURE") and similarity', [1, 0, 1, 0, 0]),
        ('labels.role == "cook"', [0, 1, 0, 0, 0]),
        ('labels.role != "cook"', [0, 0, 0, 1, 0]),
        ("not nsfw", [1, 0, 1, 1, 0]),
        ("nsfw == False", [1, 0, 1, 1, 0]),
        ('similarity > 0.1 or NSFW == "NSFW"', [1, 1, 1, 0, 0]),
        ("width > 5", [1, 1, 0, 1, 0]),
        ("1 / (width - 10) > 0", [0, 1, 0, 0, 0]),
    ],
)
def test_some_filters_by_hand(text: str, expected: list[int]) -> None:
    samples = [
        {"similarity": 0.3, "nsfw": False, "NSFW": "UNLIKELY", "width": 10},
        {"similarity": 0.29, "nsfw": True, "NSFW": "NSFW", "width": 12, "labels": {"role": "cook"}},
        {"similarity": 0.5, "nsfw": 0, "NSFW": "UNSURE", "width": None},
        {"similarity": None, "nsfw": False, "width": 10, "labels": {"role": "pilot"}},
        {"url": "x"},
    ]
    assert accepted(text, samples) == [bool(each) for each in expected]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("__import__('os').system('x') > a", "cannot contain a call"),
        ("().__class__.__bases__ == a", "cannot contain Attribute"),
        ("a.__class__.__mro__ == 1", "cannot contain Attribute"),
        ("a[0] > 1", r"cannot contain a part in \[\]"),
        ("[x for x in a] == 1", "cannot contain ListComp"),
        ("(lambda: a) == 1", "cannot contain a function"),
        ("a ** 9 ** 9 ** 9 > 1", r"cannot contain \*\*"),
        ("a << 9999999 > 1", "cannot contain LShift"),
        ("a > 1 & b > 1", "write `and`"),
        ("~a", "write `not`"),
        ("a is None", "a missing value is never accepted"),
        ("a if b else c", r"if \.\.\. else"),
        ("f'{a}' == 'x'", "an f-string"),
        ("(a := 1) > 0", ":="),
        ("a == None", "not with 'None'"),
        ("a == ...", "compares with numbers"),
        ("a == b'x'", "compares with numbers"),
        ("a == 1j", "compares with numbers"),
        ("a in b", "needs a list of values"),
        ("a in 'abc'", "needs a list of values"),
        ("a in (1, 2) in (3,)", "needs a list of values"),
        ("(a or b) > 1", "write a > 1 or b > 1"),
        ("1 < 2", "names no column"),
        ("", "is not a valid expression"),
        ("a >", "is not a valid expression"),
        ("a\0b", "is not a valid expression"),
        ("import os", "is not a valid expression"),
        ("a; b", "is not a valid expression"),
        ("(" * 900 + "a" + ")" * 900, "is not a valid expression"),
        ("-" * 1900 + "a", "nested more than"),
        ("not " * 400 + "a", "nested more than"),
        ("+".join("a" * 300), "nested more than"),
        ("a == " + "9" * 1500, "too large"),
        ("a == '" + "x" * 2000 + "'", "characters long"),
    ],
)
def test_hostile_and_mistaken_filters_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        Filter(text)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match="filter"):
        SourceConfig.model_validate({"source": "x", "filter": text})


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_filter_or_a_sentence(text: str) -> None:
    try:
        wanted = Filter(text)
    except ValueError:
        return
    wanted.accepted(columns_of([{"a": 1}, {}]))


@given(st.lists(st.one_of(st.binary(max_size=40), SAMPLES.map(lambda s: json.dumps(s).encode())), max_size=20))
@settings(max_examples=300, deadline=None)
def test_columns_hold_what_the_metadata_holds(metadata: list[bytes]) -> None:
    collector = Collector()
    for row, data in enumerate(metadata):
        collector.add(row, data)
    columns = Columns(collector.table(len(metadata)))
    for row, data in enumerate(metadata):
        try:
            sample = json.loads(data)
        except ValueError:
            sample = {}
        for name in columns.names:
            column = columns[name]
            number = float(column.numbers[row]) if column.is_number[row] else None
            text = column.texts[column.codes[row] - 1] if column.codes[row] else None
            expected = value_of(("column", name), sample if isinstance(sample, dict) else {})
            assert expected == (number if text is None else text)


def test_hostile_metadata() -> None:
    collector = Collector()
    collector.add(0, b'{"deep": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    collector.add(1, json.dumps({f"name{n}": n for n in range(5000)}).encode())
    collector.add(2, b'{"a": "\\ud800", "b": 1e999, "c": ' + b"9" * 4000 + b', "d": "' + b"x" * 300 + b'"}')
    collector.add(3, json.dumps({"n" * 101: 1, "name1": {"name2": {"x": 1}}, "name3": "\x1b[2J"}).encode())
    columns = Columns(collector.table(4))
    assert len(columns.names) == 256
    assert columns.too_many
    assert columns["name3"].texts == ["\x1b[2J"]


# A source with a filter


def write(folder: Path, write_tar: WriteTar, picture: Callable[[int], bytes], shards: int = 3, each: int = 8) -> str:
    for shard in range(shards):
        members = []
        for n in range(shard * each, (shard + 1) * each):
            metadata = {"similarity": n / 20, "nsfw": n % 5 == 0, "url": "u" * 200, "kind": "photo" if n % 2 else "art"}
            members += [(f"{n:03}.png", picture(n)), (f"{n:03}.txt", b"caption %d" % n)]
            members += [(f"{n:03}.json", json.dumps(metadata).encode())] if n != 9 else []
        write_tar(folder / f"{shard}.tar", members)
    return str(folder / "*.tar")


def test_the_accepted_samples_are_the_source(
    tmp_path: Path, write_tar: WriteTar, picture: Callable[[int], bytes]
) -> None:
    url = write(tmp_path, write_tar, picture)
    wanted = [n for n in range(24) if n / 20 > 0.28 and n % 5 != 0 and n != 9]
    for _ in range(2):  # worked out, then from the cache folder
        source = open_source(url, filter="similarity > 0.28 and not nsfw")
        assert [source.key(n) for n in range(len(source))] == [f"{n:03}" for n in wanted]
        assert source.shard_lengths.tolist() == [sum(n // 8 == shard for n in wanted) for shard in range(3)]
        assert source.samples_before_filter == 24
        whole = open_source(url)
        for number, n in enumerate(wanted):
            assert source.record(number) == whole.record(n)
            assert (source.shard(number), source.offset(number)) == (whole.shard(n), whole.offset(n))
    with pytest.raises(IndexError):
        source.key(len(wanted))
    first = open_source(url, filter="similarity < 0.05")  # of one shard alone
    assert first.shard_lengths.tolist() == [1]
    assert first.size == (tmp_path / "0.tar").stat().st_size


def test_a_filtered_pass_sees_each_accepted_sample_once(
    tmp_path: Path, write_tar: WriteTar, picture: Callable[[int], bytes]
) -> None:
    url = write(tmp_path, write_tar, picture)
    config = DataConfig.model_validate({"train": [{"source": url, "filter": "kind == 'photo'"}], "batch": 4})
    loader = Loader(config, 24, 16, seed=1)
    seen = [key for step in range(3) for key in loader.keys(step)]
    assert sorted(seen[:11]) == [f"{n:03}" for n in range(24) if n % 2 and n != 9]


def test_a_filter_that_cannot_be_says_why(tmp_path: Path, write_tar: WriteTar, picture: Callable[[int], bytes]) -> None:
    url = write(tmp_path, write_tar, picture)
    with pytest.raises(
        DataError, match=r"names 'similarty', which no sample has; did you mean similarity\? Available are"
    ):
        open_source(url, filter="similarty > 0.28")
    with pytest.raises(DataError, match="the columns kind, nsfw, similarity"):
        open_source(url, filter="completely_else > 0.28")
    with pytest.raises(DataError, match="names 'url', whose texts are too long, or more than"):
        open_source(url, filter="url == 'x'")
    with pytest.raises(DataError, match="accepts 0 of 24 samples") as error:
        open_source(url, filter="similarity > 7 and kind == 'x'")
    assert "similarity: 23 numbers from 0 to 1.15" in str(error.value)
    assert "kind: texts 'art' (12), 'photo' (11)" in str(error.value)
    with pytest.raises(DataError, match="cannot contain a call"):
        open_source(url, filter="open('x') > 7")


def test_a_filter_is_reevaluated_when_a_shard_changes(
    tmp_path: Path, write_tar: WriteTar, picture: Callable[[int], bytes]
) -> None:
    url = write(tmp_path, write_tar, picture)
    assert len(open_source(url, filter="similarity >= 1")) == 4
    members = [(f"x{n}.{kind}", b'{"similarity": 2}') for n in range(5) for kind in ("png", "txt", "json")]
    write_tar(tmp_path / "0.tar", members)
    source = open_source(url, filter="similarity >= 1")
    assert [source.key(n) for n in range(6)] == ["x0", "x1", "x2", "x3", "x4", "020"]
