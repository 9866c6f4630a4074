"""The run folder: names and files in it that several parts of the launcher read and write.

Imports only the standard library, because the batch script waits for the output of `attempts`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.yaml"
LAUNCHER = "TREERING_LAUNCHER"
"""environment variable with the process id of a worker's launcher"""
STOPPED = 130
"""exit code of a run that was asked to stop and committed"""


def is_first_process() -> bool:
    """Whether this process prints and writes for the run: rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The readable rows of a JSON-lines file; empty if the file does not exist."""
    try:
        return list(parsed_rows(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        return []


def parsed_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The readable rows among the lines of a JSON-lines file."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row
