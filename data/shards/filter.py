"""The filter of a source: an expression over the columns of its samples, as in `similarity > 0.28 and not nsfw`.

Why not expressions of polars or DuckDB: a run would depend on them for comparing two columns, and neither reports in a
sentence which column is missing and which ones exist.

The language is a small subset of Python, parsed by `ast` and never executed: column names (with a dot for a nested
object in the metadata: `labels.role`), numbers, quoted texts, True and False, + - * / // %, comparisons (also chained),
`in` and `not in` a tuple, `and`, `or`, `not`. Everything else is refused. numpy evaluates it for all samples of a shard
at once, from the columns in the shard's index.

Missing values are unknown, as in SQL: a comparison with one (or a division by zero) is neither true nor false; `not` of
unknown is unknown, `unknown and False` is false, `unknown or True` is true. Only true accepts a sample, so a sample
without a column is rejected unless the rest of the expression decides. Numbers are 64-bit floats, booleans 0 and 1; a
number never equals a text, and < between them is unknown.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, shown
from .columns import MOST_TEXTS, Columns

_LONGEST = 2000  # characters
_DEEPEST = 40
_SHOWN = 12  # columns, and texts of one, in a message
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide,
    ast.FloorDiv: np.floor_divide, ast.Mod: np.mod,
}  # fmt: skip
_ORDER: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge
}  # fmt: skip
_EQUAL = (ast.Eq, ast.NotEq)
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of an expression, [samples] or [1]: numbers where `is_number`, texts where `is_text`, otherwise
    missing."""

    numbers: NDArray[np.float64]
    is_number: Mask
    texts: NDArray[np.object_]
    is_text: Mask


@dataclass(frozen=True, slots=True)
class _Truth:
    """Three-valued truth per sample: `true`, `false`, unknown where neither."""

    true: Mask
    false: Mask


class Filter:
    """A valid filter expression."""

    def __init__(self, text: str) -> None:
        """Parses `text`. Raises ValueError with a message that includes the remedy."""
        self.text = text
        if len(text) > _LONGEST:
            raise ValueError(f"the filter is {len(text):,} characters long; at most {_LONGEST:,} are allowed")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(
                f"the filter {shown(text)} is not a valid expression; write one such as similarity > 0.28 and not nsfw"
            ) from None
        names: set[str] = set()
        _check(self._tree, names, 0)
        self.names = frozenset(names)
        if not names:
            raise ValueError(f"the filter {shown(text)} names no column; write one such as similarity > 0.28")

    def accepted(self, columns: Columns) -> Mask:
        """Whether each sample of a shard is accepted, bool [samples]."""
        with np.errstate(all="ignore"):
            true = _truth(self._tree, columns).true
        return np.broadcast_to(true, columns.rows).copy()


def _refused(node: ast.AST) -> ValueError:
    what = {
        ast.Call: "a call", ast.Subscript: "a part in []", ast.Lambda: "a function", ast.IfExp: "if ... else",
        ast.Pow: "**", ast.BitAnd: "& (write `and`)", ast.BitOr: "| (write `or`)", ast.Invert: "~ (write `not`)",
        ast.Is: "`is` (a missing value is never accepted)", ast.IsNot: "`is not` (a missing value is never accepted)",
        ast.JoinedStr: "an f-string", ast.NamedExpr: ":=",
    }.get(type(node), type(node).__name__)  # fmt: skip
    return ValueError(
        f"a filter cannot contain {what}; it consists of columns, numbers, texts, + - * / // %, comparisons, in (...), "
        f"and, or, not"
    )


def _check(node: ast.AST, names: set[str], depth: int) -> None:
    """Checks that a tree uses only the filter language, and collects the column names. Raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"the filter is nested more than {_DEEPEST} levels deep; simplify it")
    inner: Iterable[ast.AST] = ()
    match node:
        case ast.Name(id=name):
            names.add(name)
        case ast.Attribute(value=ast.Name(id=outer), attr=name):
            names.add(f"{outer}.{name}")
        case ast.Constant(value=value):
            _check_constant(value)
        case ast.BoolOp(values=inner):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=operand):
            if not isinstance(node.op, ast.Not):
                _check_value(operand)
            inner = (operand,)
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) not in _ARITHMETIC:
                raise _refused(op)
            _check_value(left, right)
            inner = (left, right)
        case ast.Compare(left=left, ops=ops, comparators=others):
            inner = _operands(left, ops, others)
            _check_value(*inner)
        case ast.UnaryOp(op=op):
            raise _refused(op)
        case _:
            raise _refused(node)
    for each in inner:
        _check(each, names, depth + 1)


def _check_value(*operands: ast.AST) -> None:
    """Refuses `(a or b) > 1`, which in Python compares only one of the two and is hardly ever intended."""
    if any(isinstance(operand, ast.BoolOp) for operand in operands):
        raise ValueError("a filter compares before it joins with and/or; write a > 1 or b > 1, not (a or b) > 1")


def _check_constant(value: object) -> None:
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            raise ValueError("a number in the filter is too large for a 64-bit float") from None
    elif not isinstance(value, float | str):
        raise ValueError(f"a filter compares with numbers, texts, True or False, not with {shown(repr(value), 20)}")


def _operands(left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr]) -> list[ast.expr]:
    """The operands of a comparison, including the items of tuples. Raises ValueError."""
    operands = [left]
    for op, other in zip(ops, others, strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(other, ast.Tuple | ast.List | ast.Set) or len(ops) > 1:
                raise ValueError('the `in` of a filter needs a list of values; write NSFW in ("UNLIKELY", "UNSURE")')
            operands += other.elts
        elif type(op) in _ORDER or isinstance(op, _EQUAL):
            operands.append(other)
        else:
            raise _refused(op)
    return operands


# Evaluation


def _truth(node: ast.AST, columns: Columns) -> _Truth:
    """The truth of an expression: a comparison, a Boolean operation, or a value (0 and "" are false)."""
    match node:
        case ast.BoolOp(op=op, values=values):
            every = [_truth(value, columns) for value in values]
            true, false = [each.true for each in every], [each.false for each in every]
            if isinstance(op, ast.And):
                return _Truth(_fold(np.logical_and, true), _fold(np.logical_or, false))
            return _Truth(_fold(np.logical_or, true), _fold(np.logical_and, false))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            found = _truth(operand, columns)
            return _Truth(found.false, found.true)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compared(left, ops, others, columns)
    value = _values(node, columns)
    true = (value.is_number & (value.numbers != 0)) | (value.is_text & (value.texts != ""))
    return _Truth(true, (value.is_number | value.is_text) & ~true)


def _compared(left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], columns: Columns) -> _Truth:
    value, links = _values(left, columns), []
    for op, other in zip(ops, others, strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            assert isinstance(other, ast.Tuple | ast.List | ast.Set)
            known = value.is_number | value.is_text
            equal = [_Truth(np.zeros_like(known), known)]  # nothing is `in` an empty list
            equal += [_link(ast.Eq(), value, _values(each, columns)) for each in other.elts]
            link = _Truth(
                _fold(np.logical_or, [e.true for e in equal]), _fold(np.logical_and, [e.false for e in equal])
            )
            links.append(link if isinstance(op, ast.In) else _Truth(link.false, link.true))
        else:
            right = _values(other, columns)
            links.append(_link(op, value, right))
            value = right
    return _Truth(
        _fold(np.logical_and, [link.true for link in links]), _fold(np.logical_or, [link.false for link in links])
    )


def _link(op: ast.cmpop, left: _Values, right: _Values) -> _Truth:
    numbers, texts = left.is_number & right.is_number, left.is_text & right.is_text
    if isinstance(op, _EQUAL):
        known = (left.is_number | left.is_text) & (right.is_number | right.is_text)
        equal = (numbers & (left.numbers == right.numbers)) | (texts & (left.texts == right.texts))
        found = _Truth(equal, known & ~equal)
        return found if isinstance(op, ast.Eq) else _Truth(found.false, found.true)
    order = _ORDER[type(op)]
    true = (numbers & order(left.numbers, right.numbers)) | (texts & order(left.texts, right.texts))
    return _Truth(true, (numbers | texts) & ~true)


def _values(node: ast.AST, columns: Columns) -> _Values:
    match node:
        case ast.Constant(value=str(text)):
            return _Values(np.zeros(1), np.zeros(1, bool), np.array([text], object), np.ones(1, bool))
        case ast.Constant(value=bool() | int() | float() as number):
            return _numbers(np.array([float(number)]), np.ones(1, bool))
        case ast.Name(id=name):
            return _column(columns, name)
        case ast.Attribute(value=ast.Name(id=outer), attr=name):
            return _column(columns, f"{outer}.{name}")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            value = _values(operand, columns)
            return _numbers(-value.numbers if isinstance(op, ast.USub) else value.numbers, value.is_number)
        case ast.BinOp(left=left, op=op, right=right):
            one, two = _values(left, columns), _values(right, columns)
            known = one.is_number & two.is_number
            if not isinstance(op, ast.Add | ast.Sub | ast.Mult):
                known = known & (two.numbers != 0)
            return _numbers(_ARITHMETIC[type(op)](one.numbers, two.numbers), known)
    found = _truth(node, columns)  # a comparison or `not`, as a value
    return _numbers(found.true.astype(np.float64), found.true | found.false)


def _numbers(numbers: NDArray[np.float64], known: Mask) -> _Values:
    known = known & ~np.isnan(numbers)
    return _Values(numbers, known, np.full(1, "", object), np.zeros(1, bool))


def _column(columns: Columns, name: str) -> _Values:
    try:
        column = columns[name]
    except KeyError:
        return _numbers(np.zeros(1), np.zeros(1, bool))
    texts = np.array(["", *column.texts], object)[column.codes]
    return _Values(column.numbers, column.is_number, texts, column.codes > 0)


def _fold(join: np.ufunc, masks: list[Mask]) -> Mask:
    found = masks[0]
    for mask in masks[1:]:
        found = join(found, mask)
    return found


# The columns of a source, for messages


@dataclass
class Known:
    """The columns of a source, with the facts that a filter's error messages show."""

    names: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    too_many: bool = False
    numbers: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # count, minimum, maximum
    texts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, columns: Columns, ranges: bool = False) -> Known:
        """Adds the columns of a shard; with `ranges` also the ranges of their values."""
        self.names.update(columns.names)
        self.left_out.update(columns.left_out)
        self.too_many |= columns.too_many
        for name in columns.names if ranges else ():
            column = columns[name]
            numbers = column.numbers[column.is_number]
            if len(numbers):
                self._add_numbers(name, len(numbers), float(numbers.min()), float(numbers.max()))
            counts = np.bincount(column.codes, minlength=1).tolist()[1:]
            self.texts.setdefault(name, Counter()).update(dict(zip(column.texts, counts, strict=False)))
        return self

    def merge(self, other: Known) -> None:
        """Adds the facts of another `Known`."""
        self.names |= other.names
        self.left_out |= other.left_out
        self.too_many |= other.too_many
        for name, (count, least, most) in other.numbers.items():
            self._add_numbers(name, count, least, most)
        for name, counts in other.texts.items():
            self.texts.setdefault(name, Counter()).update(counts)

    def _add_numbers(self, name: str, count: int, least: float, most: float) -> None:
        before = self.numbers.get(name, (0, least, most))
        self.numbers[name] = (before[0] + count, min(before[1], least), max(before[2], most))

    def check(self, wanted: Filter, where: str) -> None:
        """Checks that a filter names only existing columns. Raises DataError."""
        for name in sorted(wanted.names):
            if name in self.left_out:
                raise DataError(
                    f"{where}: the filter names {shown(name)}, whose texts are too long, or more than {MOST_TEXTS} "
                    f"distinct ones in a shard; filter by another column"
                )
            if name not in self.names:
                near = get_close_matches(name, self.names, 1)
                hint = f"; did you mean {_name(near[0])}?" if near else ""
                raise DataError(
                    f"{where}: the filter names {shown(name)}, which no sample has{hint} "
                    f"{'Available are' if hint else '; available are'} {self._listed()}"
                )

    def _listed(self) -> str:
        names = sorted(self.names)
        if not names:
            return "no columns: the samples have no .json with numbers, booleans or short texts"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"the columns {', '.join(map(_name, names[:_SHOWN]))}{more}"

    def ranges(self, wanted: Filter) -> str:
        """The values of the columns that a filter names, one line per column."""
        lines = []
        for name in sorted(wanted.names & self.names):
            parts = []
            if name in self.numbers:
                count, least, most = self.numbers[name]
                parts.append(f"{count:,} numbers from {least:.6g} to {most:.6g}")
            if common := self.texts.get(name, Counter()).most_common(_SHOWN):
                parts.append("texts " + ", ".join(f"{shown(text, 40)} ({count:,})" for text, count in common))
            lines.append(f"  {_name(name)}: {'; '.join(parts)}")
        return "\n".join(lines)


def _name(name: str) -> str:
    return shown(name)[1:-1]
