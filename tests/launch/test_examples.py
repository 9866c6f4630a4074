"""The scripts of docs/examples, each run as a person runs it, with a smaller model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SMALL = [
    "data.batch=8",
    "model.embed_dim=16",
    "model.image={width: 16, depth: 1, heads: 2, patch: 16, resolution: 32}",
    "model.text={width: 16, depth: 1, heads: 2, context: 16}",
    "model.captioner=null",
    "objectives.caption=null",
    "stages=[{samples: 64}]",
    "schedule.warmup=8",
]
LAST = {
    "train_from_python": ["report: runs/from_python/report.html"],
    "own_data": ["never seen: a blue triangle; nearest of 20 captions: ", "never seen: a red ring; nearest of 20"],
    "own_objective": ["commit       runs/own_objective/commits/step-000000000008"],
}
"""beginnings of lines that each prints at its end"""


def test_every_example_is_run_here_and_named_in_the_docs() -> None:
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py"} == set(LAST)
    pages = "".join(page.read_text() for page in (EXAMPLES.parent.parent / "README.md", *EXAMPLES.parent.glob("*.md")))
    for name in LAST:
        assert f"examples/{name}.py" in pages


@pytest.mark.parametrize("name", LAST)
def test_the_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *SMALL],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for beginning in LAST[name]:
        assert any(line.startswith(beginning) for line in lines[-6:]), done.stdout
    logged = next(tmp_path.glob("runs/*/metrics.jsonl")).read_text()
    assert '"event": "end"' in logged
    if name == "own_objective":
        assert '"centred"' in logged
