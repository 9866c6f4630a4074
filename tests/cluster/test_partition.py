"""A node that is cut off from the others but not from the disk: the run continues elsewhere, and only there.

This is the worst that a network can do: Slurm takes the node for dead and starts the job on another one, while
everything on it still runs and still reaches the run folder and the store.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treering.launch.jobs.attempts import attempts_file, owner_file
from treering.launch.run_folder import read_rows
from treering.tests.cluster import conftest
from treering.tests.cluster.conftest import Bench, attempts, log, losses, rows, started, step, until, workers
from treering.tests.cluster.slurm_cluster import Cluster
from treering.tests.support.s3_server import Server

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def apart(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench on a cluster with a network of its own."""
    made = started(tmp_path_factory.mktemp("apart"), network=True, kill_wait=5)
    try:
        cluster = next(made)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not let root make networks: {error.stderr}")
    yield Bench(cluster, s3_server, tmp_path_factory.mktemp("bench"))
    made.close()


@pytest.fixture(autouse=True)
def _no_jobs_left_apart(apart: Bench) -> Iterator[None]:
    yield
    apart.clear()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_node_that_is_cut_off(
    nodes: int,
    apart: Bench,
    recipe: Path,
    uninterrupted: list[tuple[int, float]],
    tmp_path: Path,
) -> None:
    """The node of the batch script and the only process, or that of the second process."""
    cluster, run = apart.cluster, tmp_path / "run"
    apart.pause(0.7)  # slow enough for the cut-off attempt to be under way when the next one begins
    job = apart.submit(str(recipe), "--nodes", str(nodes), "--out", str(run))
    until(lambda: step(run) >= 6, lambda: log(run), 120)
    cut = attempts(run)[0]["hosts"][-1]
    before = set(workers(run).values())
    cluster.cut(cut)
    try:
        until(lambda: _owner(run).startswith(f"{job}.1."), lambda: f"no second attempt\n{log(run)}", 120)
        until(lambda: not before & _alive(run), lambda: f"what was cut off goes on: {workers(run)}\n{log(run)}", 20)
        apart.pause(0)
        until(lambda: apart.state(job) == "COMPLETED", lambda: f"{apart.state(job)}\n{log(run)}", 120)
        left = _modified(run)
    finally:
        cluster.reconnect(cut)
    first, second = attempts(run)
    assert cut not in second["hosts"]
    assert (first["attempt"], second["attempt"]) == (1, 2)
    _written_by_one_at_a_time(run)
    recorded = read_rows(attempts_file(run))
    assert [row["event"] for row in recorded] == ["begin", "end", "begin", "end"]
    assert [row["kind"] for row in recorded if row["event"] == "end"][-1] == "finished"
    conftest.as_if_nothing_had_happened(run, uninterrupted, 1e-5)
    time.sleep(2)
    assert apart.state(job) == "COMPLETED"
    assert _modified(run) == left  # the node came back, and nothing of it touched the run


def _written_by_one_at_a_time(run: Path) -> None:
    """Logs that read as of one run: what the first attempt wrote after the second had begun is in none of them."""
    begun = attempts(run)[1]["time"]
    after = [row for row in rows(run) if row["time"] > begun]
    resumed = next(i for i, row in enumerate(rows(run)) if row["event"] == "resume")
    assert after == rows(run)[resumed + 1 :]
    assert [row["step"] for row in rows(run) if row["event"] == "step"] == sorted({at for at, _ in losses(run)})
    text = (run / "job.log").read_text()
    assert text.count("starts on") == 2
    last = text.rpartition("starts on")[2]
    assert last.count("srun ended with code") == last.count("srun ended with code 0") == 1
    beats = [json.loads(path.read_text()) for path in (run / "heartbeats").glob("rank-*.json")]
    assert {beat["host"] for beat in beats} == set(attempts(run)[1]["hosts"])
    commits = sorted(path.parent.name for path in (run / "commits").glob("step-*/COMMIT"))
    assert commits == sorted(commits, key=lambda name: name[-4:])  # the first attempt's lie before the second's


def _modified(run: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in run.rglob("*") if path.is_file()}


def _owner(run: Path) -> str:
    return str(json.loads(owner_file(run).read_text())["attempt"])


def _alive(run: Path) -> set[int]:
    """All training processes of the run, of whatever attempt."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"treering.launch.worker\0" + bytes(run) in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


def test_a_node_with_a_slow_network_is_left_out(apart: Bench, recipe: Path, tmp_path: Path) -> None:
    """The three nodes measure their network, find out whose it is, and the other two train."""
    cluster, run = apart.cluster, tmp_path / "run"
    shape = ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kbit", "latency", "400ms"]
    if shutil.which("tc") is None or _shape(cluster, *shape):
        pytest.skip("this machine cannot make a network slow (tc, tbf)")
    try:
        site = apart.site("min_bandwidth: 0.02\nexpand: 0\n")
        words = [str(recipe), "--nodes", "2-3", "--out", str(run), "stages.0.samples=180"]
        job = apart.submit(*words, **site)
        until(lambda: apart.state(job) == "COMPLETED", lambda: f"{apart.state(job)}\n{log(run)}", 150)
    finally:
        _shape(cluster, "qdisc", "delete", "dev", "eth0", "root")
    assert "n2: this node cannot train: all-reduce at 0.0" in log(run)
    assert "continues without n2" in log(run)
    assert [start["hosts"] for start in attempts(run)] == [["n1", "n3"]]
    assert losses(run)[-1][0] == 15


def _shape(cluster: Cluster, *words: str) -> bool:
    """Whether tc failed on the second node."""
    try:
        cluster.on_node("n2", "tc", *words)
    except subprocess.CalledProcessError:
        return True
    return False
