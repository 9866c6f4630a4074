"""A real Slurm cluster for the tests, and a run on it that the tests do bad things to."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from treering.data import Loader
from treering.launch.recipe.load import read_recipe
from treering.tests.cluster.slurm_cluster import Cluster, lacking
from treering.tests.support.needs import missing
from treering.tests.support.s3_server import KEY, SECRET, Server

STEPS = 90
RECIPE = f"""\
name: tiny
data:
  train: [{{source: samples://emoji}}]
  batch: 12
model:
  embed_dim: 16
  image: {{width: 16, depth: 1, heads: 2, patch: 24, resolution: 24}}
  text: {{width: 16, depth: 1, heads: 2, context: 16}}
objectives: {{contrastive: {{weight: 1.0}}}}
stages: [{{samples: {12 * STEPS}}}]
schedule: {{warmup: 120}}
log: {{every: 1}}
checkpoint: {{every: 60}}
eval: {{suites: []}}
watchdog: {{limit: 12s}}
"""
# What every Python process of the tests does, and the product knows nothing of: training pauses before each step, so
# that there is time to act, and writes down which samples it took in which attempt.
SPY = """
import json, os, sys, time
def hook(event, arguments):
    loop = sys.modules.get("treering.training.loop")
    if event == "socket.gethostname" and hasattr(loop, "Run") and not hasattr(loop, "spied"):
        loop.spied, step = True, loop.Run.step
        def slow(run, batch):
            time.sleep(float(open(os.environ["TEST_PAUSE"]).read()))
            row = {"step": run.state.step, "attempt": run.state.attempt, "keys": batch.keys}
            with (run.out / f"taken-{run.world.rank}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\\n")
            step(run, batch)
        loop.Run.step = slow
sys.addaudithook(hook)
"""


def started(folder: Path, **settings: Any) -> Iterator[Cluster]:
    """A cluster while a test needs it; `python tests/cluster/slurm_cluster.py install` brings Slurm."""
    if reason := lacking():
        missing(reason)
    cluster = Cluster(folder, **settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from started(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


class Bench:
    """The command line in an environment with cluster and store, and a look at a run."""

    def __init__(self, cluster: Cluster, server: Server, folder: Path) -> None:
        self.cluster, self.server = cluster, server
        self.folder = folder
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SPY)
        paths = [str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.environment = cluster.environment | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "TEST_PAUSE": str(folder / "pause"),
            "TREERING_SITE": str(folder / "site.yaml"),
        }
        (folder / "site.yaml").write_text("notice: 30\n")
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """How long every process pauses before each step, from now on."""
        (self.folder / "passing").write_text(str(seconds))
        os.replace(self.folder / "passing", self.folder / "pause")

    def site(self, text: str) -> dict[str, str]:
        """The environment of a submit with another site file."""
        path = self.folder / f"site-{abs(hash(text))}.yaml"
        path.write_text(text)
        return {"TREERING_SITE": str(path)}

    def treering(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.cluster.on_login_node(sys.executable, "-P", "-m", "treering.launch", *words),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def submit(self, *words: str, **environment: str) -> str:
        """Submit and return the job's number."""
        done = self.treering("submit", *words, "--json", **environment)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["job"])

    def state(self, job: str) -> str:
        return self.cluster.run("squeue", "-h", "-a", "-t", "all", "-j", job, "-o", "%T").stdout.strip()

    def nodes(self, job: str) -> list[str]:
        names = self.cluster.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
        return self.cluster.run("scontrol", "show", "hostnames", names).stdout.split()

    def clear(self) -> None:
        """End all jobs."""
        self.pause(0)
        self.cluster.run("scancel", "-u", "root")
        until(lambda: not self.cluster.run("squeue", "-h").stdout, "jobs do not end", 60)


@pytest.fixture(scope="session")
def bench(cluster: Cluster, s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(cluster, s3_server, tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def _no_jobs_left(bench: Bench) -> Iterator[None]:
    yield
    bench.clear()


def rows(run: Path) -> list[dict[str, Any]]:
    found = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def step(run: Path) -> int:
    return max((row["step"] for row in rows(run) if row["event"] == "step"), default=0)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run) if row["event"] == "step"]


def attempts(run: Path) -> list[dict[str, Any]]:
    """The start and resume lines."""
    return [row for row in rows(run) if row["event"] in ("start", "resume")]


def taken(run: Path) -> list[list[str]]:
    """Keys of the samples that each step of the finished run was made of, in rank order; a step that was made again
    counts as the last attempt made it."""
    found: dict[int, dict[int, dict[int, list[str]]]] = {}
    for path in run.glob("taken-*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], {}).setdefault(row["attempt"], {})[int(path.stem[6:])] = row["keys"]
    kept = [found[step][max(found[step])] for step in sorted(found)]
    return [[key for rank in sorted(ranks) for key in ranks[rank]] for ranks in kept]


def as_if_nothing_had_happened(run: Path, expected: list[tuple[int, float]], tolerance: float = 0.0) -> None:
    """Every step once and in its order, with the expected loss; every sample of the order, none twice."""
    found = losses(run)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=tolerance, rel=0)
    recipe = read_recipe(str(run / "recipe.yaml")).recipe
    order = Loader(recipe.data, 24, 16, recipe.seed)
    keys = taken(run)
    assert keys == [order.keys(step) for step in range(len(expected))]
    assert len({*itertools.chain(*keys)}) == recipe.data.batch * len(expected)


def until(done: Callable[[], object], otherwise: str | Callable[[], str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            pytest.fail(otherwise if isinstance(otherwise, str) else otherwise())
        time.sleep(0.2)


def log(run: Path) -> str:
    parts = [path.read_text(errors="replace") for path in (run / "job.log", *run.glob("logs/*.log")) if path.exists()]
    return "\n---\n".join(parts)[-6000:]


def workers(run: Path) -> dict[int, int]:
    """Processes of a run by rank, as the machine numbers them."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"treering.launch.worker\0" + os.fsencode(run) in (process / "cmdline").read_bytes():
                for variable in (process / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(variable[5:])] = int(process.name)
    return found


def signal_rank(run: Path, rank: int, number: signal.Signals) -> None:
    os.kill(workers(run)[rank], number)


@pytest.fixture(scope="session")
def uninterrupted(bench: Bench, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of the run that nothing happened to, with two processes."""
    bench.pause(0)
    out = tmp_path_factory.mktemp("whole") / "run"
    done = bench.treering("train", str(recipe), "--out", str(out), "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == STEPS
    return losses(out)
