"""The run folder's records: one attempt writes them, the last one that began."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.training.logging.jsonl import RunRecords
from treering.training.state import TrainingError


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


def test_what_a_rollback_passes_over_stays_in_the_ledger(tmp_path: Path) -> None:
    """Batches of four: back from step 6 to step 2, on with batch 6. Then a resume at step 3, which has read batch 6."""
    log = RunRecords(tmp_path)
    log.ledger.append(*({"step": 1 + batch, "position": 4 * batch} for batch in range(6)), {"step": 6, "position": -1})
    log.cut_back(2, 4 * 6)
    assert [row["position"] for row in log.ledger.rows()] == [0, 4, 8, 12, 16, 20]
    log.ledger.append({"step": 3, "position": 24}, {"step": 4, "position": 28})
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
