"""What waiting threads cost: the emoji run on two threads, alone and beside two busy loops, for several ways to wait.

    python -m tests.benchmarks.shared_machine [--quick] [--json] [--rounds N] [--spins N,N,...] [--realtime]

OpenMP's threads wait for each other many times in a step. Those that spin begin their next piece at once, and on a
machine that others use too they take the core from the very thread they wait for. Every arm is `treering train emoji`
in a process of its own, with one setting in its environment; all are stopped (SIGSTOP) but one, whose turn lasts some
seconds, so that whatever else the machine does meets all arms alike. A step's time is read from the run's own log; a
turn's figure is the mean of the steps that lie wholly within it. `ours` is what the command line sets by itself, and
`libgomp` the 300,000 turns of a loop that libgomp spins for where nothing is set.

Figures are medians over rounds: `idle_cost` is what a step of ours takes over one of libgomp's with the machine to
itself, less one; `beside_over_idle` what it takes beside two busy loops over what it takes without them, where 2 is
fair. `others` is the part of the cores that processes outside the benchmark took in the turns without busy loops: where
it is not near 0, nothing was idle. With `--realtime`, which needs root, these turns are under SCHED_FIFO: whatever else
runs on the machine waits, so that a machine in use is idle for some seconds at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
LIBGOMP = 300_000
THREADS = BUSY = 2
TURN = {0: 2.0, BUSY: 4.0}
"""seconds of a turn, by the number of busy loops beside it; a turn is longer where three steps are"""
RUN = (
    "data.batch=32",
    "stages=[{samples: 100_000_000}]",
    "eval={suites: [], every: 100_000_000}",
    "checkpoint.every=1000h",
    "watchdog.limit=1000h",
    "log.every=1",
)
Seconds = dict[tuple[str, int], list[float]]
"""of a step, round by round, by the name of an arm and the number of busy loops"""


class Arm:
    """A run that goes on only in its turns."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.log = folder / "run" / "metrics.jsonl"
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
        command = [sys.executable, "-P", "-m", "treering.launch", "train", "emoji", *RUN, "--out", str(folder / "run")]
        folder.mkdir()
        with (folder / "output").open("wb") as output:
            # A group, but not a session, of its own: Linux shares the cores out among sessions.
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, process_group=0)
        while len(self.times()) < 5:
            if self.process.poll() is not None:
                raise SystemExit((folder / "output").read_text())
            time.sleep(0.1)
        self.signal(signal.SIGSTOP)

    def times(self) -> list[float]:
        """When each step so far was logged."""
        with contextlib.suppress(OSError):
            rows = [json.loads(line) for line in self.log.read_text().split("\n")[:-1]]
            return [row["time"] for row in rows if row["event"] == "step"]
        return []

    def turn(self, seconds: float, realtime: bool) -> float:
        """Seconds of a step, in a turn of so many seconds, or of three steps where these take longer."""
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            policy, priority = (os.SCHED_FIFO, 1) if realtime else (os.SCHED_OTHER, 0)
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))
        begun = time.time()
        self.signal(signal.SIGCONT)
        within: list[float] = []
        while time.time() < begun + seconds or len(within) < 3:
            time.sleep(0.1)
            within = [moment for moment in self.times() if moment > begun]
        self.signal(signal.SIGSTOP)
        return statistics.mean(b - a for a, b in pairwise(within))

    def processor(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def machine_busy() -> float:
    """Processor seconds that all processes of the machine have taken so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[at]) for at in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def measure(arms: dict[str, Arm], rounds: int, realtime: bool) -> tuple[Seconds, list[float]]:
    """What all steps took, and the part of the cores that others took in each turn without busy loops."""
    seconds: Seconds = {}
    others = []
    for _ in range(rounds):
        for loops, turn in TURN.items():
            with busy_loops(loops):
                for name, arm in arms.items():
                    before, own, begun = machine_busy(), arm.processor(), time.monotonic()
                    seconds.setdefault((name, loops), []).append(arm.turn(turn, realtime and not loops))
                    if not loops:
                        taken = (machine_busy() - before) - (arm.processor() - own)
                        others.append(max(0.0, taken) / (time.monotonic() - begun) / len(os.sched_getaffinity(0)))
    return seconds, others


def figures_of(seconds: Seconds, others: list[float]) -> dict[str, float]:
    """The ratios, each taken within a round."""
    figures = {"others": statistics.median(others)}
    for name in {name for name, _ in seconds}:
        end = "" if name == "ours" else f"_{name}"
        alone, beside, libgomp = seconds[name, 0], seconds[name, BUSY], seconds["libgomp", 0]
        figures |= {
            f"seconds{end}": statistics.median(alone),
            f"idle_cost{end}": statistics.median(a / b for a, b in zip(alone, libgomp, strict=True)) - 1,
            f"beside_over_idle{end}": statistics.median(a / b for a, b in zip(beside, alone, strict=True)),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours and libgomp alone, two rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--spins", default="0,1000,10000", help="GOMP_SPINCOUNT of further arms, commas between")
    parser.add_argument("--realtime", action="store_true", help="turns without busy loops under SCHED_FIFO")
    options = parser.parse_args()
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    settings = {"libgomp": threads | {"GOMP_SPINCOUNT": str(LIBGOMP)}, "ours": threads}
    if not options.quick and options.spins:
        settings |= {spin: threads | {"GOMP_SPINCOUNT": spin} for spin in options.spins.split(",")}
    folder, arms = Path(tempfile.mkdtemp(prefix="shared-machine-")), dict[str, Arm]()
    try:
        for name, values in settings.items():
            arms[name] = Arm(folder / name, values)
        figures = figures_of(*measure(arms, 2 if options.quick else options.rounds, options.realtime))
    finally:
        for arm in arms.values():
            arm.signal(signal.SIGKILL)
            arm.process.wait()
        shutil.rmtree(folder)
    device = f"{len(os.sched_getaffinity(0))} cores of {platform.processor() or platform.machine()}"
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "treering")}
        print(json.dumps({"benchmark": "shared_machine", "device": device, "versions": versions, "figures": figures}))
        return
    print(f"{device}; others took {figures['others']:.0%} of them")
    print(f"{'waiting':10}{'s a step, idle':>16}{'idle cost':>12}{'beside / idle':>16}")
    for name in settings:
        end = "" if name == "ours" else f"_{name}"
        idle, cost, beside = (figures[f"{figure}{end}"] for figure in ("seconds", "idle_cost", "beside_over_idle"))
        print(f"{name:10}{idle:16.4f}{cost:12.1%}{beside:16.2f}")


if __name__ == "__main__":
    main()
