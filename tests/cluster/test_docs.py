"""Every command of docs/slurm.md, in its order, as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from treering.tests.cluster.conftest import Bench, log, step, until
from treering.tests.cluster.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def commands(page: str) -> list[str]:
    first = r"(?:treering|torchrun|mkdir|python|export) "
    return [line.strip() for line in page.splitlines() if re.match(rf"    {first}", line)]


def test_every_command_of_the_page_works(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = commands((ROOT / "docs" / "slurm.md").read_text())
    assert len(found) == 22
    for line in found:
        text = line.replace("/tmp/", f"{tmp_path}/").replace(
            "tests/cluster/slurm_cluster.py", f"{ROOT}/tests/cluster/slurm_cluster.py"
        )
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env=bench.environment | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}{log(tmp_path / 'runs' / 'emoji')}"
        if line.startswith("treering submit") and "--dry-run" not in line:
            _follow(tmp_path, line, cluster)
    rows = (tmp_path / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["event"] == "end"


def _follow(folder: Path, line: str, cluster: Cluster) -> None:
    """Until the job of the page makes steps; that of the sweep is cancelled."""
    if "--sweep" in line:
        assert cluster.run("squeue", "-h").stdout
        cluster.run("scancel", "-u", "root")
        return
    run = folder / "runs" / "emoji"
    until(lambda: step(run) >= 10 and (run / "logs" / "rank-00001.log").exists(), lambda: log(run), 300)
