"""A run's folder: the names and files in it that several parts of the launcher read and write.

Only the standard library is imported: the batch script waits for what `attempts` prints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.yaml"
LAUNCHER = "TREERING_LAUNCHER"
"""environment variable with the process id of the launcher that a worker belongs to"""
STOPPED = 130
"""exit code of a run that was asked to stop and committed"""


def is_first_process() -> bool:
    """Whether this is the process of a run that prints and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a file of JSON objects; none where there is no file."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    except FileNotFoundError:
        pass
    return rows
