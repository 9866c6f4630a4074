"""`treering submit` on the real cluster: what it refuses, what it never lets a shell read, and a run on two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from treering.tests.cluster.conftest import Bench, log, losses, rows, step, until
from treering.tests.support.s3_server import SECRET

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--nodes", "1", "--partition", "nowhere"],
            "partition 'nowhere' does not exist; known here: high, main, short",
        ),
        (["--nodes", "6"], "partition main has 3 nodes"),
        (["--nodes", "3", "--partition", "short"], "exceeds the limit of partition short for a job, 2"),
        (
            ["--nodes", "1", "--partition", "short", "--time", "2:00:00"],
            "exceeds the limit of partition short, 01:00:00",
        ),
        (["--nodes", "1", "--gpus-per-node", "12"], "Slurm would refuse the job"),
        (["--nodes", "2", "--processes-per-node", "5"], "cannot share data.batch = 12 evenly"),
        (["--nodes", "1", "optimizer.lr=fast"], "optimizer.lr"),
        (["--nodes", "1", "--partition", "main; touch x"], "is not a valid name in Slurm"),
        (["--nodes", "two"], "is not a number of nodes"),
    ],
)
def test_a_bad_submission_is_refused_and_leaves_nothing(
    words: list[str], message: str, bench: Bench, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun = time.monotonic()
    done = bench.treering("submit", str(recipe), "--out", str(out), *words)
    print(f"refused in {time.monotonic() - begun:.1f} s")
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not bench.cluster.run("squeue", "-h").stdout


FEW = 20
"""steps of a run that nothing happens to"""


def test_a_store_that_does_not_answer_is_not_waited_for(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    words = ["submit", str(recipe), "--nodes", "1", "--out", str(tmp_path / "run"), "checkpoint.to=s3://bucket/x"]
    done = bench.treering(*words, AWS_ENDPOINT_URL="http://192.0.2.1:9")
    assert done.returncode == 2
    assert "nothing answers at http://192.0.2.1:9" in done.stderr.replace("\n", " ")
    assert not bench.cluster.run("squeue", "-h").stdout


def test_two_nodes_two_processes_and_a_bucket(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    """The names of folder, recipe and an override are traps for shells, and the secret must be nowhere."""
    trap = "a 'b' \"c\" $(touch pwned) `touch pwned`; touch pwned #%j"
    run, copy = tmp_path / trap, tmp_path / f"{trap}.yaml"
    copy.write_text(recipe.read_text())
    words = [str(copy), "--nodes", "2", "--processes-per-node", "2", f"stages.0.samples={12 * FEW}"]
    words += [f"checkpoint.to={bench.server.url}/two", f"checkpoint.staging={tmp_path / 'staging'} {trap}"]
    job = bench.submit(*words, "--out", str(run))
    again = bench.treering("submit", *words, "--out", str(run))
    assert again.returncode == 2
    assert f"job {job}" in again.stderr
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(run)}", 300)
    assert step(run) == FEW
    (start,) = [row for row in rows(run) if row["event"] == "start"]
    assert start["hosts"] == ["n1", "n2"]
    assert start["world"] == 4
    assert "n1" in (run / "report.html").read_text()
    assert "n2" in (run / "report.html").read_text()
    written = [path for path in (*tmp_path.rglob("*"), *bench.cluster.folder.glob("log/*")) if path.is_file()]
    assert [path for path in written if path.name == "job.log"]
    assert not [path for path in written if path.name == "pwned"]
    assert not Path("pwned").exists()
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    for place in (str(run), f"{bench.server.url}/two"):
        status = json.loads(bench.treering("status", place, "--json").stdout)
        assert status["state"] == "finished"
        assert status["nodes"] == ["n1", "n2"]
        assert status["step"] == FEW
        assert status["commit_age"] < 600
    assert "starts on 2 nodes" in bench.treering("logs", str(run)).stdout
    assert bench.treering("logs", str(run), "--rank", "3").returncode == 0


def test_stop_commits_and_the_same_command_continues(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [str(recipe), "--nodes", "1", "--out", str(run), f"stages.0.samples={12 * FEW}"]
    bench.pause(2)
    job = bench.submit(*words)
    until(lambda: step(run) >= 3, lambda: log(run), 300)
    status = json.loads(bench.treering("status", str(run), "--json").stdout)
    assert status["state"] == "running"
    done = bench.treering("stop", str(run))
    assert done.returncode == 0, done.stderr
    until(lambda: bench.state(job) in ("COMPLETED", "FAILED"), lambda: bench.state(job), 120)
    commits = [row for row in rows(run) if row["event"] == "commit"]
    assert commits[-1]["reason"] == "signal"
    assert step(run) < FEW
    bench.pause(0)
    job = bench.submit(*words)
    until(lambda: bench.state(job) == "COMPLETED", lambda: log(run), 120)
    assert step(run) == FEW
    lineage = json.loads((run / "lineage.json").read_text())
    assert "treering stop" in lineage[1]["detail"]["before"]


def test_a_crash_that_repeats_ends_the_job(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    """A recipe that was right when it was submitted, and whose first step cannot be made."""
    run = tmp_path / "run"
    job = bench.submit(str(recipe), "--nodes", "1", "--out", str(run))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("batch: 12", "batch: 0"))
    until(lambda: bench.state(job) == "FAILED", lambda: f"{bench.state(job)}\n{log(run)}", 300)
    assert "3 crashes without progress beyond step 0" in log(run)
    assert "data.batch" in log(run)


def test_a_sweep_is_one_array_with_a_folder_for_each_run(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    words = [str(recipe), "--nodes", "1", "--out", str(tmp_path / "sweep"), "stages.0.samples=240"]
    job = bench.submit(*words, "--sweep", "lr=1e-3,5e-4", f"checkpoint.to={bench.server.url}/sweep")
    folders = [tmp_path / "sweep" / name for name in ("lr=1e-3", "lr=5e-4")]
    until(lambda: bench.state(job).split() == ["COMPLETED"] * 2, lambda: log(folders[0]), 300)
    assert [step(folder) for folder in folders] == [20, 20]
    assert all((folder / "report.html").exists() for folder in folders)
    assert losses(folders[0]) != losses(folders[1])
    assert "2 of 2 runs finished" in (tmp_path / "sweep" / "report.html").read_text()
    for folder in folders:
        assert bench.treering("status", f"{bench.server.url}/sweep/{folder.name}").returncode == 0


def test_a_dry_run_writes_nothing_and_its_script_is_bash(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: main\naccount: vision\nsetup: [module load cuda]\nenvironment: {NCCL_IB_HCA: mlx5}\n"
        "inside: [apptainer, exec, /images/a b.sif]\noptions: [--exclusive]\n"
    )
    words = ["submit", str(recipe), "--nodes", "2-3", "--gpus-per-node", "2", "--out", str(out), "--dry-run"]
    done = bench.treering(*words, TREERING_SITE=str(site))
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    for line in ("--partition=main", "--account=vision", "--nodes=2-3", "--gpus-per-node=2"):
        assert f"#SBATCH {line}\n" in done.stdout
    for line in ("    module load cuda", "export NCCL_IB_HCA=mlx5", "INSIDE=(apptainer exec '/images/a b.sif')"):
        assert line in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    site.write_text("environment: {AWS_SECRET_ACCESS_KEY: x}\n")
    refused = bench.treering(*words, TREERING_SITE=str(site))
    assert refused.returncode == 2
    assert "looks like a secret" in refused.stderr
    assert os.environ.get("TREERING_SITE") is None
