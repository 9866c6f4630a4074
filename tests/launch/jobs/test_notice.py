"""How long before its end a job is warned: as the site file says, or as long as its own commits took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treering.launch.jobs.cluster_config import Site
from treering.launch.jobs.submit import JobRequest, render_script
from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES
from treering.training.health.signals import NOTICE, short_notice
from treering.training.loop import train


def signal_of(*outs: Path) -> str:
    script = render_script(list(outs), "tiny", (1,), 1, None, JobRequest("1"), Site())
    (line,) = [line for line in script.splitlines() if line.startswith("#SBATCH --signal=")]
    assert f"export {NOTICE}={line.rpartition('@')[2]}" in script
    return line


def test_commits_that_take_long_ask_for_more_time(tmp_path: Path) -> None:
    new, old, slow = (tmp_path / name for name in ("new", "old", "slow"))
    for folder, seconds in ((old, [3.2]), (slow, [900.0, *[99.5] * 9, 149.9])):
        folder.mkdir()
        rows = [{"event": "commit", "seconds": each} for each in seconds]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert signal_of(new) == "#SBATCH --signal=B:USR1@120"
    assert signal_of(new, old) == "#SBATCH --signal=B:USR1@120"
    assert signal_of(new, slow) == "#SBATCH --signal=B:USR1@330"  # the 900 s are eleven commits ago


def test_a_run_that_was_warned_too_late_logs_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(
        "emoji",
        [*SIZES, "model.captioner=null", "objectives={contrastive: {}}", "stages=[{samples: 48}]", "eval.suites=[]",
         "checkpoint.every=12"],
    ).recipe  # fmt: skip
    monkeypatch.setenv(NOTICE, "0")
    train(recipe, tmp_path / "late")
    said = capsys.readouterr()
    assert (said.out + said.err).count("before its end; submit it again") == 1
    monkeypatch.setenv(NOTICE, "600")
    train(recipe, tmp_path / "early")
    said = capsys.readouterr()
    assert "before its end" not in said.out + said.err
    monkeypatch.delenv(NOTICE)
    assert short_notice(1e6) is None
