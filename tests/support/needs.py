"""What a test needs of its machine. On a person's it is skipped where that is missing; in CI, which has all of it, it
fails."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """End the test, which cannot run here."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; where CI is set, no test is skipped for that", pytrace=False)
    pytest.skip(reason)
