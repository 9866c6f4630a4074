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

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of a small recipe that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder that commands are given in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def process(here: Path) -> Callable[..., Done]:
    """Runs the real command in a process of its own."""

    def run(*arguments: str, **environment: str) -> Done:
        return subprocess.run(
            [sys.executable, "-P", "-m", "treering.launch", *arguments],
            cwd=here,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment,
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


@pytest.fixture
def treering(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process, which saves the seconds of importing torch; our own mistakes come through."""
    from treering.launch.cli import main

    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["treering", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return Done(arguments, int(ended.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def refused(treering: Callable[..., Done], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused (exit code 2, one screen, nothing written) and gives its message."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = treering(*arguments)
        assert done.returncode == 2, done.stderr
        assert_short(done)
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr

    return run


def assert_short(done: Done) -> None:
    """One message on one screen, and no traceback."""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sum(1 + len(line) // 100 for line in done.stderr.splitlines()) <= 24
