"""Product strings are plain technical English: phrases of the old dialect are refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("launch", "training", "models", "data")
REFUSED = {
    r"(?<!there )\b(?:is|are) no (?!longer|more than|larger|smaller|more)\w+": "is not a valid size",
    r"\btold\b": "say what is passed, logged or shown",
    r"\bmade again\b": "recomputed, retried",
    r"\bin vain\b": "without progress",
    r"\bpass(?:ed|es) over (?!each)": "skip",
    r"\bby chance from\b|\bdrawn by chance\b": "drawn at random",
    r"\b(?:small|large|little) beside\b": "small compared with",
    r"\bleapt\b": "rose suddenly",
    r"\bupright lines?\b": "vertical lines",
    r"\bthe same words\b": "equal texts, the same command",
    r"\bsettled\b": "decided, fixed",
    r"\blives? of (?:a|the) run\b": "attempts",
    r"\bsoftening\b": "label_smoothing",
    r"\bstretch(?:es)?\b": "range, slice, period",
    r"\bforsake\b": "release",
}


def words(path: Path) -> list[tuple[int, str]]:
    """Every string of a source file, docstrings too, and its comments, by line."""
    text = path.read_text(encoding="utf-8")
    found = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    comments = [(n, line.partition("#")[2]) for n, line in enumerate(text.splitlines(), 1) if "# " in line]
    return found + comments


def refused(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}: {match[0]!r}; {better}"
        for line, text in words(path)
        for phrase, better in REFUSED.items()
        for match in re.finditer(phrase, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_strings_are_plain_english(room: str) -> None:
    assert [each for path in sorted((ROOT / room).rglob("*.py")) for each in refused(path)] == []


def test_pages_are_plain_english() -> None:
    """README and docs, and the texts of the pages and recipes that the package holds."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += [path for room in ROOMS for kind in ("html", "yaml") for path in (ROOT / room).rglob(f"*.{kind}")]
    found = [
        f"{page.name}:{n}: {match[0]!r}"
        for page in pages
        for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        for phrase in REFUSED
        for match in re.finditer(phrase, line, re.IGNORECASE)
    ]
    assert found == []


def test_the_walk_sees_strings_docstrings_and_comments(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text('"""It is told."""\nx = f"{1} is no size"  # made again\n')
    assert len(refused(source)) == 3
