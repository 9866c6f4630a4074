"""A cache folder of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set as the cache for the test, and returned."""
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
