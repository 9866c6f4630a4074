"""The run folder's text records: metrics.jsonl and ledger.jsonl, one JSON object per line.

After a kill they are truncated to the commit that the run continues from, so that they read like the log of an
uninterrupted run, with a line that marks the resume. Truncation writes a new file under the old name. An earlier
attempt that was presumed dead but still runs keeps the old file open, and its writes do not reach the new one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ...data.storage.atomic_write import atomic_write, partial_path, remove_partials, sync_folder
from ..report.losses import RECENT
from ..state import TrainingError

_AFTER_A_COMMIT = ("search", "grow", "resume", "rollback", "end")
"""events that happen after the commit of the same step"""
_ENTRY = {"source": str, "shard": str, "key": str, "offset": int, "reason": str}
"""of a bad sample"""


class JsonLines:
    """An append-only file of JSON objects, written by one attempt of a run at a time."""

    def __init__(self, path: Path, fields: Mapping[str, type]) -> None:
        """`fields` that every row has, with their types."""
        self.path, self._fields = path, fields
        self._file: TextIO | None = None

    def append(self, *rows: dict[str, Any]) -> None:
        """Append rows and flush. Raises TrainingError if a later attempt has taken the file over."""
        if self._file is None or not self.path.exists():  # the user may have removed it
            self.close()
            self._file = self.path.open("a", encoding="utf-8")
        self._file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
        self._file.flush()
        if not _is_same_file(self.path, self._file):
            raise TrainingError(f"{self.path} was taken over by a later attempt of this run; this attempt ends")

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a line that a kill cut off, or that a power cut left as other bytes, is skipped."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in self._fields.items()):
                rows.append(row)
        return rows

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Take the file over for this attempt, with only the rows that `keep` accepts; returns them."""
        kept = [row for row in self.rows() if keep(row)]
        self.close()
        partial = partial_path(self.path)  # not `atomic_write`: the renamed file stays open for this attempt
        self._file = partial.open("w", encoding="utf-8")
        self._file.writelines(json.dumps(row) + "\n" for row in kept)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(partial, self.path)
        sync_folder(self.path.parent)
        return kept

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


def _is_same_file(path: Path, file: TextIO) -> bool:
    """Whether `path` still names the open `file`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity replaced by None, because JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class RunRecords:
    """The records that rank 0 writes into the run folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics = JsonLines(folder / "metrics.jsonl", {"event": str, "step": int, "samples": int})
        self.ledger = JsonLines(folder / "ledger.jsonl", {"step": int, **_ENTRY})
        self._evaluated: int | None = None
        """the step of the last evaluation"""
        self._compared: int | None = None
        """that of the last evaluation before the last growth"""
        self.steps: deque[dict[str, Any]] = deque(maxlen=RECENT)
        """the newest step lines"""
        for place in (folder, folder / "evaluations"):
            remove_partials(place)

    def close(self) -> None:
        """Close the files."""
        self.metrics.close()
        self.ledger.close()

    def event(self, event: str, step: int, samples: int, **detail: Any) -> dict[str, Any]:
        """Write a line of metrics.jsonl and return it."""
        row = {"event": event, "step": step, "samples": samples, "time": time.time(), **detail}
        self.metrics.append(row)
        self._note(row)
        return row

    def last_step(self, first: int) -> int:
        """The last step with a line, of a run that began at step `first`."""
        return max((row["step"] for row in self.metrics.rows() if row["event"] == "step"), default=first)

    def _note(self, row: dict[str, Any]) -> None:
        """Remember which evaluation was the last one before the last growth, and the newest steps."""
        if row["event"] == "step":
            self.steps.append(row)
        elif row["event"] == "grow":
            self._compared = self._evaluated
        elif row["event"] == "eval":
            self._evaluated = row["step"]

    def evaluation_before_growth(self) -> dict[str, Any] | None:
        """The file content of the last evaluation before the last growth; None if there is none."""
        if self._compared is None:
            return None
        path = self.folder / "evaluations" / f"step-{self._compared:09d}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if "bits" in found else None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the run folder atomically."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(_finite(value)))

    def cut_back(self, step: int, position: int) -> None:
        """Remove the records after the commit of `step`, from which the data continues at `position` of the stream.

        The commit's line may come after later steps, because it is written when the upload ends. Bad samples that a
        rollback skips stay in the ledger: they are not read again.
        """

        def before(row: dict[str, Any]) -> bool:
            return row["step"] < step or (row["step"] == step and row["event"] not in _AFTER_A_COMMIT)

        self._evaluated = self._compared = None
        self.steps.clear()
        for row in self.metrics.cut(before):
            self._note(row)
        self.ledger.cut(lambda row: row["position"] < position if row.get("position", -1) >= 0 else row["step"] <= step)
        for path in self.folder.glob("evaluations/step-*.json"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def clear(self) -> None:
        """Remove all records: an earlier attempt left no commit, so the run starts from the beginning."""
        self.steps.clear()
        self.metrics.cut(lambda row: False)
        self.ledger.cut(lambda row: False)
        for path in self.folder.glob("evaluations/step-*.json"):
            path.unlink()
