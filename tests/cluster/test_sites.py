"""Slurm as sites have it: nodes that differ, environments that are cut off, settings in the way, several partitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from treering.launch.run_folder import read_rows
from treering.tests.cluster.conftest import Bench, attempts, log, step, until
from treering.tests.cluster.slurm_cluster import Cluster, lacking
from treering.tests.support.needs import missing
from treering.tests.support.s3_server import Server

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory, s3_server: Server) -> Iterator[Bench]:
    """Three nodes of 16, 8 and 16 cores."""
    if reason := lacking():
        missing(reason)
    cluster = Cluster(tmp_path_factory.mktemp("unequal"))
    conf = cluster.conf.read_text()
    cluster.conf.write_text(conf.replace("NodeName=n2 ", "NodeName=n2 CPUs=8 CoresPerSocket=8 "))
    try:
        cluster.start()
        yield Bench(cluster, s3_server, tmp_path_factory.mktemp("bench of unequal"))
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def _no_jobs_left(unequal: Bench) -> Iterator[None]:
    """In place of the one for the cluster of the other tests."""
    yield
    unequal.clear()


def ends(bench: Bench, job: str, run: Path) -> None:
    until(lambda: bench.state(job) in ("COMPLETED", "FAILED"), lambda: f"{bench.state(job)}\n{log(run)}", 200)
    assert bench.state(job) == "COMPLETED", log(run)


def test_unequal_nodes_in_a_clean_environment_with_settings_in_the_way(
    unequal: Bench, recipe: Path, tmp_path: Path
) -> None:
    """All at once: what one of them breaks, no word says which."""
    run, cache = tmp_path / "a run of  mine", tmp_path / "of the site"
    site = f"""
partition: short,main
options: [--exclusive, --mem=0, --export=NONE]
environment:
  TREERING_CACHE: '{cache}'
  PYTHONPATH: '{unequal.environment["PYTHONPATH"]}'
  TEST_PAUSE: '{unequal.environment["TEST_PAUSE"]}'
  OMP_NUM_THREADS: '1'
  SLURM_CPUS_PER_TASK: '1'
setup: [export SRUN_CPUS_PER_TASK=100]
"""
    words = ["submit", str(recipe), "--nodes", "3", "--out", str(run), "stages.0.samples=180"]
    told = unequal.treering(*words, "--dry-run", **unequal.site(site))
    assert "keeps variables of this shell, such as AWS_PROFILE, from the job" in told.stderr.replace("\n", " ")
    job = unequal.submit(*words[1:], **unequal.site(site))
    ends(unequal, job, run)
    assert [attempt["hosts"] for attempt in attempts(run)] == [["n1", "n2", "n3"]]
    assert step(run) == 15
    assert any(cache.iterdir())


def test_a_task_for_each_process_has_its_part_of_the_smallest_node(
    unequal: Bench, recipe: Path, tmp_path: Path
) -> None:
    """With memory by the core, and without whole nodes."""
    run = tmp_path / "run"
    site = unequal.site("tasks: gpu\noptions: [--mem-per-cpu=100, --cpus-per-task=4]\nexpand: 0\n")
    words = [str(recipe), "--nodes", "3", "--processes-per-node", "2", "--out", str(run), "stages.0.samples=180"]
    job = unequal.submit(*words, **site)
    ends(unequal, job, run)
    assert [attempt["world"] for attempt in attempts(run)] == [6]
    assert step(run) == 15


def test_what_srun_says_is_the_reason(unequal: Bench, recipe: Path, tmp_path: Path) -> None:
    """A step that cannot be made: three times, and then the job ends with a sentence."""
    run = tmp_path / "run"
    site = unequal.site("srun: [--cpus-per-task=1000]\nexpand: 0\n")
    job = unequal.submit(str(recipe), "--nodes", "1", "--out", str(run), "stages.0.samples=180", **site)
    until(lambda: unequal.state(job) == "FAILED", lambda: f"{unequal.state(job)}\n{log(run)}", 100)
    last = [row for row in read_rows(run / "job" / "attempts.jsonl") if row["event"] == "end"][-1]
    assert last["reason"].startswith("srun ended with code 1: Unable to create step")
    assert f"3 crashes without progress beyond step 0: {last['reason']}" in log(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "main,nowhere"], "partition 'nowhere' does not exist"),
        (["--partition", "short,short", "--time", "2:00:00"], "exceeds the limit of partition short"),
        (["--nodes", "6", "--partition", "short,main"], "exceeds the limit of partition short for a job, 2"),
    ],
)
def test_several_partitions_none_of_which_can(
    words: list[str], said: str, unequal: Bench, recipe: Path, tmp_path: Path
) -> None:
    done = unequal.treering("submit", str(recipe), "--nodes", "1", "--out", str(tmp_path / "run"), *words)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")
