"""In CI nothing is skipped for want of a program: the script ends before the tests, and a test fails that needs one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from treering.tests.support.needs import missing

ROOT = Path(__file__).parents[1]


def run_ci(folder: Path, programs: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`.ci/run` where only these programs are found, beside a `make` that prints what it is asked for."""
    for name in ("dirname", "id", *programs):
        (folder / name).symlink_to(shutil.which(name) or "/bin/true")
    (folder / "python3").symlink_to(sys.executable)
    (folder / "make").write_text("#!/bin/sh\necho make $1\n")
    (folder / "make").chmod(0o755)
    command = ["/bin/sh", str(ROOT / ".ci" / "run")]
    return subprocess.run(command, env={"PATH": str(folder)} | environment, capture_output=True, text=True, check=False)


def test_a_missing_program_ends_the_script_in_ci_alone(tmp_path: Path) -> None:
    for number, (programs, lacks) in enumerate([([], "Chromium"), (["chromium"], "Slurm")]):
        (tmp_path / f"ci{number}").mkdir()
        done = run_ci(tmp_path / f"ci{number}", programs, CI="true")
        assert done.returncode == 1, done
        assert f"no {lacks}: its tests cannot run" in done.stderr
        assert done.stdout == ""
    (tmp_path / "here").mkdir()
    done = run_ci(tmp_path / "here", [])
    assert (done.returncode, done.stdout) == (0, "make test\n")
    assert "no Chromium" in done.stderr
    assert "no Slurm" in done.stderr


def test_a_test_that_lacks_something_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium here"):
        missing("no Chromium here")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium here"):
        missing("no Chromium here")
