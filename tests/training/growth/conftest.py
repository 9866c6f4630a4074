"""The run that nothing happens to, which resumed and sharded ones are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.training.loop import train


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the module's `recipe()`, by one process from start to end; made once a module."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(request.module.recipe(), out).finished
    return out
