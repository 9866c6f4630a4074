"""The run folder's text records: metrics.jsonl and ledger.jsonl, one JSON object a line.

After a kill they are cut back to the commit the run continues from, so that they read as the log of one run that was
never interrupted, with a line that says where it was. The file is then a new one under the old name: an attempt that
was taken for dead and still runs holds the file that was, and whatever it writes there is seen by nobody.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ...data.storage.atomic_write import atomic_write, partial_path, remove_partials
from ..state import TrainingError

_AFTER_A_COMMIT = ("search", "grow", "resume", "rollback", "end")
"""events that follow the commit of their step"""


class JsonLines:
    """An append-only file of JSON objects, which one attempt of a run writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, *rows: dict[str, Any]) -> None:
        """Add rows; they are in the file when this returns. Raises TrainingError if a later attempt has the file."""
        if self._file is None or not self.path.exists():  # a person may have removed it
            self.close()
            self._file = self.path.open("a", encoding="utf-8")
        self._file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
        self._file.flush()
        if not _is_still(self.path, self._file):
            raise TrainingError(f"{self.path} was taken over by a later attempt of this run, and this one ends")

    def rows(self) -> list[dict[str, Any]]:
        """Every complete row; a line torn by a kill is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def cut(self, keep: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """Take the file over: from now on it holds the rows that `keep` returns of all rows, and is this attempt's."""
        self.close()
        partial = partial_path(self.path)  # not `atomic_file`: the file that is renamed stays open, as this attempt's
        self._file = partial.open("w", encoding="utf-8")
        self._file.writelines(json.dumps(row) + "\n" for row in keep(self.rows()))
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(partial, self.path)

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()
            self._file = None


def _is_still(path: Path, file: TextIO) -> bool:
    """Whether the open `file` is the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


class RunRecords:
    """What rank 0 writes into the run folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.ledger = JsonLines(folder / "ledger.jsonl")
        for place in (folder, folder / "evaluations"):
            remove_partials(place)

    def close(self) -> None:
        """Let go of the files."""
        self.metrics.close()
        self.ledger.close()

    def event(self, event: str, step: int, samples: int, **detail: Any) -> dict[str, Any]:
        """Write a line of metrics.jsonl and return it."""
        row = {"event": event, "step": step, "samples": samples, "time": time.time(), **detail}
        self.metrics.append(row)
        return row

    def evaluation_before(self, event: str) -> dict[str, Any] | None:
        """The last evaluation before the last event of this kind, as its file has it; None if there is none."""
        rows = self.metrics.rows()
        last = max((i for i, row in enumerate(rows) if row["event"] == event), default=0)
        steps = [row["step"] for row in rows[:last] if row["event"] == "eval"]
        path = self.folder / "evaluations" / f"step-{steps[-1]:09d}.json" if steps else None
        if path is None or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if "bits" in found else None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run folder, whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(value))

    def cut_back(self, step: int) -> None:
        """Drop what happened after the commit of `step`. Its own line may stand anywhere: it is written in the end."""

        def before(row: dict[str, Any]) -> bool:
            return row["step"] < step or (row["step"] == step and row["event"] not in _AFTER_A_COMMIT)

        self.metrics.cut(lambda rows: [row for row in rows if before(row)])
        self.ledger.cut(lambda rows: [row for row in rows if row["step"] <= step])
        for path in self.folder.glob("evaluations/step-*.json"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def clear(self) -> None:
        """Start over: an earlier attempt left no commit, so nothing it wrote happened."""
        self.metrics.cut(lambda rows: [])
        self.ledger.cut(lambda rows: [])
        for path in self.folder.glob("evaluations/step-*.json"):
            path.unlink()
