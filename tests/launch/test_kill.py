"""`kill -9` of the whole process group at fixed points, then the same command again: the run is the one never killed.

The killed process kills its own group, so the point is exact: at the n-th time it opens a file of a given name for
writing, or makes a line of its log, which stays open. Both are seen by what `sitecustomize` puts in, and the product
knows nothing of it.

And at random moments: two kills here, 225 over engines and worlds by `pytest -s -m slow tests/launch/test_kill.py`,
which prints what the killed were doing (KILLS sets another number for each of the nine cases, 25 by default).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

KILLS = int(os.environ.get("KILLS", "25"))
COMMAND = [
    *(sys.executable, "-P", "-m", "treering.launch", "train", "emoji"),
    "data.batch=12",
    "model.embed_dim=16",
    "model.image={width: 32, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 16, depth: 1, heads: 2, context: 16}",
    "schedule.warmup=24",
    "stages=[{samples: 48}, {grow: {image.depth: 3, text.depth: 2}, samples: 60}]",
    "checkpoint.every=24",
    "eval={every: 36, suites: [retrieval], examples: 2}",
    "log.every=1",
]
KILLER = """
import json, os, signal, sys
name, count = os.environ["KILL_AT"].rsplit(":", 1)
left = [int(count)]
def come():
    left[0] -= 1
    if left[0] == 0:
        os.kill(0, signal.SIGKILL)
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and name in arguments[0] and "r" != arguments[1]:
        come()
sys.addaudithook(hook)
plain = json.dumps
def dumps(value, *rest, **named):
    if name == "line" and isinstance(value, dict) and {"event", "step", "samples"} <= value.keys():
        come()
    return plain(value, *rest, **named)
json.dumps = dumps
"""


def train(
    out: Path, processes: int, kill_at: str | None = None, engine: str = "{kind: ddp}"
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if kill_at:
        site = out.parent / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(KILLER)
        path = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {"PYTHONPATH": path, "KILL_AT": kill_at}
    command = [*COMMAND, f"engine={engine}", "--out", str(out), "--processes", str(processes)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, start_new_session=True, check=False
    )


def losses(out: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["event"] == "step"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[int, float, float]]]:
    """Losses of the run that nothing happened to, by number of processes."""
    found = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp("whole") / "run"
        done = train(out, processes)
        assert done.returncode == 0, done.stderr
        found[processes] = losses(out)
    assert len(found[1]) == 9
    return found


@pytest.mark.parametrize(
    ("kill_at", "processes"),
    [
        ("line:4", 1),  # between two steps of the first stage
        ("model-00000-00000:2", 1),  # in the middle of a commit, parts being written
        ("COMMIT:3", 1),  # a commit complete but for its mark
        (".lineage.json:2", 1),  # the model grown, nothing of it written yet
        ("evaluations/.step-000000006:1", 1),  # an evaluation done, not written
        ("report.html:99", 1),  # not reached: the hook alone changes nothing
        ("line:11", 2),  # two processes, in the second stage
    ],
)
def test_the_same_command_continues_exactly(
    kill_at: str, processes: int, uninterrupted: dict[int, list[tuple[int, float, float]]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = train(out, processes, kill_at)
    if kill_at != "report.html:99":
        # torchrun's agent puts its workers in groups of their own: there the first process survives to say so.
        assert killed.returncode == (-signal.SIGKILL if processes == 1 else 1), killed.stderr
        assert len(losses(out)) < 9
    done = train(out, processes)
    assert done.returncode == 0, done.stderr
    assert losses(out) == uninterrupted[processes]
    assert not list(out.rglob("*.part"))
    events = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert events.count("grow") == 1
    assert events.count("eval") == 3
    assert events[-1] == "end"


def nothing_left(out: Path) -> bool:
    """Whether, within ten seconds, no process of the run is alive: workers end with their launcher."""
    for _ in range(100):
        commands = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                commands.append(process.read_bytes())
        if not any(str(out).encode() in command for command in commands):
            return True
        time.sleep(0.1)
    return False


def written(out: Path) -> list[str]:
    """The lines of the run's metrics so far."""
    file = out / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def doing(out: Path, before: list[str]) -> str:
    """What a killed attempt of a run was at, whose metrics began with the lines `before`."""
    sets = [{file.name for file in place.iterdir()} for place in (out / "commits").glob("step-*")]
    if any("COMMIT" not in files for files in sets):
        return "a commit under way"
    lines = written(out)
    if lines == before:
        return "starting up"
    return f"after {json.loads(lines[-1])['event']}" if lines[-1].endswith("}") else "writing a line"


def over(run: subprocess.Popen[bytes], begun: Callable[[], bool], seconds: float) -> bool:
    """Whether a process ends within `seconds` after it has `begun`."""
    while not begun():
        if run.poll() is not None:
            return True
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(seconds)
    return run.poll() is not None


def kill_at_random(tmp_path: Path, attempts: list[tuple[str, int]], kills: int, same: Callable[[Path], bool]) -> None:
    """Kill the whole group `kills` times at any moment, start-up included, each attempt being one of `attempts`: an
    engine and a number of processes. Every run that comes to its end must be the `same`; then another begins.

    The seed is printed, to try it again.
    """
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance, environment = random.Random(seed), os.environ | {"OMP_NUM_THREADS": "1"}
    left, runs, longest, killed = kills, 0, 10.0, Counter[str]()
    while True:
        out = tmp_path / f"run-{runs}"
        engine, processes = chance.choice(attempts)
        command = [*COMMAND, f"engine={engine}", "--out", str(out), "--processes", str(processes)]
        begun, before = time.monotonic(), written(out)
        run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        # Every other one only when it has written a line, so that it trains: most of so short an attempt is its start.
        trains, moment = chance.random() < 0.5, chance.uniform(0.0, 1.1) * longest
        begins = (lambda out=out, before=before: written(out) != before) if trains else lambda: True
        if not over(run, begins, (moment / 3 if trains else moment) if left else 240):
            assert left, f"seed {seed}: the last run hangs"
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            assert nothing_left(out)
            left, longest = left - 1, 1.1 * longest  # a machine may be slow, and no run come to its first step
            killed[doing(out, before)] += 1
            continue
        code = run.returncode
        assert code == 0, f"seed {seed}: the run ended with {code} after {kills - left} kills"
        assert same(out), f"seed {seed}: not the run that was never killed, after {kills - left} kills"
        longest = max(0.7 * longest, time.monotonic() - begun)  # an attempt that resumed is shorter than a run
        runs += 1
        if not left:
            print(f"{kills} kills in {runs} runs: {dict(killed)}")
            return


def test_two_kills_at_random(uninterrupted: dict[int, list[tuple[int, float, float]]], tmp_path: Path) -> None:
    kill_at_random(tmp_path, [("{kind: ddp}", 1)], 2, lambda out: losses(out) == uninterrupted[1])


ENGINES = {
    "ddp": "{kind: ddp}",
    "fsdp": "{kind: fsdp}",
    **{f"zero{stage}": f"{{kind: deepspeed, zero_stage: {stage}}}" for stage in (1, 2, 3)},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("engine", "processes"),
    [("ddp", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_random_kills(engine: str, processes: int, tmp_path: Path) -> None:
    """Where engine and world stay: to the bit."""
    done = train(tmp_path / "whole", processes, engine=ENGINES[engine])
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path / "whole")
    kill_at_random(tmp_path, [(ENGINES[engine], processes)], KILLS, lambda out: losses(out) == whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills_and_each_attempt_another_engine(
    uninterrupted: dict[int, list[tuple[int, float, float]]], tmp_path: Path
) -> None:
    def same(out: Path) -> bool:
        near = [(step, pytest.approx(loss, abs=1e-5), pytest.approx(norm, rel=1e-3)) for step, loss, norm in whole]
        return near == losses(out)

    whole = uninterrupted[1]

    kill_at_random(tmp_path, [(each, n) for each in ENGINES.values() for n in (1, 2, 3)], KILLS, same)
