"""Two hundred random recipes; what must hold of each is in `recipes`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .recipes import live


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(200))
def test_a_random_recipe(seed: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    live(seed, tmp_path, on_ranks)


@pytest.mark.parametrize("seed", [1])
def test_one_of_them(seed: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    assert live(seed, tmp_path, on_ranks).startswith("died at")
