"""Evaluation data: a folder of classes, and a table of captions."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from treering.tests.support.small_suites import NAMES, label, paint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """29 pictures of six kinds, as a folder of classes."""
    for i in range(29):
        paint(tmp_path / "kinds" / NAMES[label(i)] / f"{i:02}.png", i)
    return tmp_path / "kinds"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """17 pictures, picture i with 1 + i mod 3 captions, as a table."""
    rows = [["path", "caption", "swapped"]]
    for i in range(17):
        paint(tmp_path / "photos" / f"{i:02}.png", 100 + i)
        rows += [[f"{i:02}.png", f"a {NAMES[i % 6]} {i} by {j}", f"by a {j} {i}"] for j in range(1 + i % 3)]
    with (tmp_path / "photos" / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "photos" / "table.csv"
