"""What the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """\
name: tiny
data:
  train: [{source: samples://emoji}]
  batch: 8
model:
  embed_dim: 16
  image: {width: 16, depth: 1, heads: 2, patch: 16, resolution: 32}
  text: {width: 16, depth: 1, heads: 2, context: 16}
objectives: {contrastive: {weight: 1.0}}
stages: [{samples: 32}]
schedule: {warmup: 8}
log: {every: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of a small recipe that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def treering(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real command in an empty folder, as a person would."""
    here = tmp_path / "here"
    here.mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "treering.launch", *arguments],
            cwd=here,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def refused(treering: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused (exit code 2, one screen, no traceback, nothing written); its message."""

    def run(*arguments: str, **environment: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = treering(*arguments, **environment)
        message = done.stderr
        assert done.returncode == 2, message
        assert "Traceback" not in message
        assert message.startswith("error: ")
        assert not done.stdout
        assert message.count("\n") <= 24
        assert len(message) < 24 * 100
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run
