"""Two thousand steps of everything; what is measured, and over what, says the benchmark."""

from __future__ import annotations

import pytest

from treering.tests.benchmarks.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_grows_and_nothing_fades_in_two_thousand_steps() -> None:
    figures = soak(2000)
    assert figures["skipped"] == 0
    assert figures["memory_growth"] < 0.02
    assert figures["slower"] < 0.2, "processor time, on a machine that may do other things"
