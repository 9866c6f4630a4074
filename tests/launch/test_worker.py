"""The worker under the launchers that can start it: the same run, whoever did."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from treering.tests.conftest import free_port
from treering.tests.launch.conftest import TINY

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"
MODULES = {"torchrun": "torch.distributed.run", "accelerate launch": "accelerate.commands.launch"}
"""what the commands of the page run: `accelerate` itself also imports timm, which a CPU build of torch may not"""


def losses(launcher: str, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run that the page's command started."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(TINY + "eval: {suites: []}\n")
    (line,) = re.findall(rf"^    ({launcher} .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    line = line.replace("localhost:29400", f"localhost:{free_port()}").replace("runs/plain", str(folder))
    words = shlex.split(line.replace(launcher, f"{sys.executable} -P -m {MODULES[launcher]}", 1))
    if launcher == "accelerate launch":
        words[5:5] = ["--main_process_port", str(free_port())]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(row["world"] for row in rows if row["event"] == "start") == 2
    return [(row["loss"], row["grad_norm"]) for row in rows if row["event"] == "step"]


def test_torchrun_and_accelerate_start_the_same_run(tmp_path: Path) -> None:
    ours = losses("torchrun", tmp_path / "torchrun")
    assert len(ours) == 4
    assert losses("accelerate launch", tmp_path / "accelerate") == ours
