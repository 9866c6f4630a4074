"""The run folder's records: one attempt writes them, the last one that began."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.data.ledger import LedgerEntry
from treering.training.logging.jsonl import RunRecords
from treering.training.state import TrainingError


def bad(step: int, position: int = -1) -> dict[str, Any]:
    entry = LedgerEntry("source", "shard", "key", 0, "does not decode", position)
    return {"step": step, **asdict(entry)}


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"[]", b'"x"', b"3", b'{"step": 1}', b"[" * 9999]))))
def test_other_bytes_than_lines_are_skipped(between: list[bytes]) -> None:
    """As a power cut or a full disk leaves them: rows before and after count, and the run can go on."""
    with TemporaryDirectory() as folder:
        log = RunRecords(Path(folder))
        for step in range(3):
            log.event("step", step, step)
            log.ledger.append(bad(step, 4 * step))
            for each in (log.metrics, log.ledger):
                with each.path.open("ab") as file:
                    file.writelines(b"%s\n" % line for line in between)
        log.cut_back(1, 8)
        assert [row["step"] for row in log.metrics.rows()] == [0, 1]
        assert log.ledger.rows() == [bad(0, 0), bad(1, 4)]
        log.close()


def test_a_later_attempt_takes_the_records_over(tmp_path: Path) -> None:
    first = RunRecords(tmp_path)
    first.clear()
    for step in range(1, 7):
        first.event("step", step, step)
    second = RunRecords(tmp_path)
    second.cut_back(4, 16)
    with pytest.raises(TrainingError, match="taken over by a later attempt"):
        first.event("step", 7, 7)
    with pytest.raises(TrainingError, match="taken over by a later attempt"):
        first.ledger.append(bad(7))
    second.event("resume", 4, 4)
    second.event("step", 5, 5)
    assert [row["step"] for row in second.metrics.rows()] == [1, 2, 3, 4, 4, 5]
    assert second.ledger.rows() == []
    second.ledger.append(bad(5))
    assert second.ledger.rows() == [bad(5)]


def test_records_that_a_person_removed_begin_again(tmp_path: Path) -> None:
    log = RunRecords(tmp_path)
    log.clear()
    log.event("step", 1, 1)
    log.metrics.path.unlink()
    log.event("step", 2, 2)
    assert [row["step"] for row in log.metrics.rows()] == [2]


def test_what_a_rollback_passes_over_stays_in_the_ledger(tmp_path: Path) -> None:
    """Batches of four: back from step 6 to step 2, on with batch 6. Then a resume at step 3, which has read batch 6."""
    log = RunRecords(tmp_path)
    log.ledger.append(*(bad(1 + batch, 4 * batch) for batch in range(6)), bad(6))
    log.cut_back(2, 4 * 6)
    assert [row["position"] for row in log.ledger.rows()] == [0, 4, 8, 12, 16, 20]
    log.ledger.append(bad(3, 24), bad(4, 28))
    log.cut_back(3, 4 * 7)
    assert [row["position"] for row in log.ledger.rows()] == [0, 4, 8, 12, 16, 20, 24]
    log.cut_back(2, 4 * 2)  # killed before a commit knows of the rollback: the batches are read again
    assert [row["position"] for row in log.ledger.rows()] == [0, 4]


@given(st.lists(st.sampled_from(["step", "eval", "grow"]), max_size=30), st.integers(0, 30))
def test_the_evaluation_before_the_last_growth(events: list[str], cut: int) -> None:
    """Against a search through all rows; also after a resume from some step, on records that were read anew."""
    with TemporaryDirectory() as folder:
        records = RunRecords(Path(folder))
        for step, event in enumerate(events):
            records.event(event, step, 4 * step)
            if event == "eval":
                records.write_json(f"evaluations/step-{step:09d}.json", {"step": step, "bits": {}})
            assert _compared(records) == _truth(events[: step + 1])
        records.close()
        again = RunRecords(Path(folder))
        again.cut_back(cut, 0)
        kept = [event for step, event in enumerate(events) if step < cut or (step == cut and event != "grow")]
        assert _compared(again) == _truth(kept)
        again.close()


def _compared(records: RunRecords) -> int | None:
    found = records.evaluation_before_growth()
    return found["step"] if found else None


def _truth(events: list[str]) -> int | None:
    if "grow" not in events:
        return None
    last = len(events) - 1 - events[::-1].index("grow")
    return max((step for step in range(last) if events[step] == "eval"), default=None)
