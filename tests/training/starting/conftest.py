"""Folders of weights as open_clip publishes them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from treering.tests.support.open_clip_models import published


@pytest.fixture(scope="module")
def coca(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(open_clip, tmp_path_factory.mktemp("theirs") / "coca", "coca_ViT-B-32")


@pytest.fixture(scope="module")
def clip(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(open_clip, tmp_path_factory.mktemp("theirs") / "clip", "ViT-B-32-quickgelu")
