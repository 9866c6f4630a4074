"""Nodes that come, go, and are unfit: which ones a job uses, and what it says about the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from treering.launch.jobs.attempts import attempts_file
from treering.launch.run_folder import read_rows
from treering.tests.cluster.conftest import Bench, as_if_nothing_had_happened, attempts, log, rows, step, until
from treering.tests.cluster.slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(300)


def test_three_nodes_then_two_then_three(
    bench: Bench, recipe: Path, uninterrupted: list[tuple[int, float]], tmp_path: Path
) -> None:
    """A node dies and comes back: the run continues with two nodes, and uses the third again without a command."""
    cluster, run = bench.cluster, tmp_path / "run"
    bench.pause(0.3)
    job = bench.submit(str(recipe), "--nodes", "2-3", "--out", str(run), **bench.site("expand: 4\n"))
    _until_steps_on(run, 3)  # and a commit, so that this attempt is one of the run
    cluster.kill_node("n3")
    _until_steps_on(run, 2)
    cluster.start_node("n3")
    _until_steps_on(run, 3)
    bench.pause(0)
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(run)}", 120)
    hosts = [attempt["hosts"] for attempt in attempts(run)]
    # Slurm may end the step once more, when its message to the dead node arrives late: the run continues unchanged.
    assert [host for host, _ in itertools.groupby(hosts)] == [["n1", "n2", "n3"], ["n1", "n2"], ["n1", "n2", "n3"]]
    as_if_nothing_had_happened(run, uninterrupted, 1e-5)
    ends = [row["reason"] for row in read_rows(attempts_file(run)) if row["event"] == "end"]
    assert "more nodes are free" in ends
    up = next(attempt for attempt in attempts(run)[hosts.index(["n1", "n2"]) :] if attempt["world"] == 3)
    # Such a late message may also end the attempt that goes up, before its first commit makes it one of the run: its
    # processes are asked to stop, or end at once if they do not listen yet.
    late = ("signalled to stop", "was killed by SIGTERM")
    assert any(said in up["before"] for said in ("more nodes are free", *late))
    stopped = [row["step"] for row in rows(run) if row["event"] == "commit" and row["reason"] == "signal"]
    assert up["step"] in stopped  # going up costs no step


def _until_steps_on(run: Path, nodes: int) -> None:
    """Until the newest attempt is one on so many nodes, and has made seven steps, and a commit."""

    def there() -> bool:
        now = attempts(run)[-1:]
        return bool(now) and now[0]["world"] == nodes and step(run) >= now[0]["step"] + 7

    until(there, lambda: f"no steps on {nodes} nodes\n{log(run)}", 120)


@pytest.fixture
def blind(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run folder that one node does not see, the second if nothing is said."""
    run, node = tmp_path / "run", getattr(request, "param", "n2")
    run.mkdir()
    cluster.on_node(node, "mount", "-t", "tmpfs", "none", str(run))
    yield run
    cluster.on_node(node, "umount", str(run))
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


@pytest.mark.parametrize("blind", ["n1"], indirect=True)
def test_the_first_node_does_not_see_where_it_would_write(bench: Bench, recipe: Path, blind: Path) -> None:
    """The batch script runs there, and can but ask for another node."""
    job = bench.submit(str(recipe), "--nodes", "1", "--out", str(blind), "stages.0.samples=180")
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(blind)}", 150)
    assert "excludes n1" in log(blind)
    assert [attempt["hosts"] for attempt in attempts(blind)] == [["n2"]]
    assert step(blind) == 15


def test_an_unfit_node_is_named_and_others_are_asked_for(bench: Bench, recipe: Path, blind: Path) -> None:
    job = bench.submit(str(recipe), "--nodes", "2", "--out", str(blind), "stages.0.samples=180")
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(blind)}", 150)
    assert "n2: this node cannot train: it cannot see the run folder" in log(blind)
    assert "requeueing for others" in log(blind)
    assert "excludes n2" in log(blind)
    assert [attempt["hosts"] for attempt in attempts(blind)] == [["n1", "n3"]]
    assert "ExcNodeList=n2" in bench.cluster.run("scontrol", "-o", "show", "job", job).stdout
    assert bench.cluster.run("sinfo", "-h", "-N", "-n", "n2", "-p", "main", "-o", "%T").stdout == "idle\n"
    assert step(blind) == 15


def test_an_unfit_node_is_drained_where_the_site_says_so(bench: Bench, recipe: Path, blind: Path) -> None:
    """Here the job may use fewer nodes, so it continues at once."""
    words = [str(recipe), "--nodes", "1-2", "--out", str(blind), "stages.0.samples=180"]
    job = bench.submit(*words, **bench.site("drain: true\n"))
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(blind)}", 150)
    assert "continues without n2" in log(blind)
    assert [attempt["hosts"] for attempt in attempts(blind)] == [["n1"]]
    node = bench.cluster.run("scontrol", "show", "node", "n2").stdout
    assert "DRAIN" in node
    assert f"Reason=unfit for Treering job {job}" in node


def test_one_task_a_gpu(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    """Slurm starts and binds every process; here without GPUs. The network's settings are printed, and nothing else."""
    run = tmp_path / "run"
    site = bench.site("tasks: gpu\nenvironment: {NCCL_IB_HCA: mlx5, SOMETHING_ELSE: unseen}\nexpand: 0\n")
    words = [str(recipe), "--nodes", "2", "--processes-per-node", "2", "--out", str(run), "stages.0.samples=180"]
    job = bench.submit(*words, **site)
    until(lambda: bench.state(job) == "COMPLETED", lambda: f"{bench.state(job)}\n{log(run)}", 150)
    (start,) = attempts(run)
    assert (start["world"], start["hosts"]) == (4, ["n1", "n2"])
    assert "TASKS=2 PROCESSES=1" in (run / "job" / "pretrain.sbatch").read_text()
    assert "NCCL_IB_HCA=mlx5" in log(run)
    assert "unseen" not in log(run)
    assert "across 2 nodes" in log(run)
    gpus = [str(recipe), "--nodes", "2", "--gpus-per-node", "2", "--out", str(tmp_path / "gpus"), "--dry-run"]
    script = bench.treering("submit", *gpus, **site).stdout
    assert "SRUN=(--gpus-per-task=1)" in script
    assert "TASKS=2 PROCESSES=1" in script
