"""What a node tells whoever decides what comes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from treering.launch.errors import RunError
from treering.launch.jobs import attempts, node


def test_a_node_of_a_attempt_that_lost_the_run_leaves_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cut off, comes back, and what it has to say is of no attempt that anybody decides about."""
    about = {"used": "n1", "job": "7", "nodes": "n1", "restart": "0"}
    attempts.begin(tmp_path, {"attempt": "7.0.0", **about})
    monkeypatch.setenv(attempts.ATTEMPT, "7.0.0")
    node._report_failure(tmp_path, "n1", RunError("it burns", 1))
    assert [path.name for path in (tmp_path / "job" / "failures").iterdir()] == ["n1-0.json"]
    attempts.begin(tmp_path, {"attempt": "7.1.0", **about})
    node._report_failure(tmp_path, "n1", RunError("it burns", 1))
    assert not list((tmp_path / "job" / "failures").iterdir())
