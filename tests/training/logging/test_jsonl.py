"""The run folder's records: one attempt writes them, the last one that began."""

from __future__ import annotations

from pathlib import Path

import pytest

from treering.training.logging.jsonl import RunRecords
from treering.training.state import TrainingError


def test_a_later_attempt_takes_the_records_over(tmp_path: Path) -> None:
    first = RunRecords(tmp_path)
    first.clear()
    for step in range(1, 7):
        first.event("step", step, step)
    second = RunRecords(tmp_path)
    second.cut_back(4)
    with pytest.raises(TrainingError, match="taken over by a later attempt"):
        first.event("step", 7, 7)
    with pytest.raises(TrainingError, match="taken over by a later attempt"):
        first.ledger.append({"step": 7})
    second.event("resume", 4, 4)
    second.event("step", 5, 5)
    assert [row["step"] for row in second.metrics.rows()] == [1, 2, 3, 4, 4, 5]
    assert second.ledger.rows() == []
    second.ledger.append({"step": 5})
    assert second.ledger.rows() == [{"step": 5}]


def test_records_that_a_person_removed_begin_again(tmp_path: Path) -> None:
    log = RunRecords(tmp_path)
    log.clear()
    log.event("step", 1, 1)
    log.metrics.path.unlink()
    log.event("step", 2, 2)
    assert [row["step"] for row in log.metrics.rows()] == [2]
