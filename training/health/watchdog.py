"""The watchdog: every process reports its phase; a run without progress ends itself and names the hanging process.

A thread beside the training writes this process's phase and step into `DIR/heartbeats/` every few seconds. A process
that stays in one phase for too long asks the others for the stacks of their threads, brings them together in
`DIR/hang.txt` with where each is and the samples it had last, adds a line to `DIR/hangs.jsonl`, and exits with a code
of its own: whoever started the run starts it again. A stopped process cannot do any of that; the others see its
heartbeat grow old and name it. A process whose run another attempt has begun elsewhere, since this one was taken for
dead, ends too.

The clock and the files have a thread each: a disk that is full, read-only or does not answer may cost the report of a
hang, but not its end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, Field
from torch import nn

from ...data.config import Duration
from ...data.storage.atomic_write import atomic_write
from ...data.units import duration
from ..world import World

HUNG = 75
"""exit code of a process that made no progress"""
LOST = 76
"""exit code of a process whose run another attempt has taken over"""
SLOW_FACTOR = 6
"""factor on the step limit for the other phases: start, evaluation, commit, growth"""
_STEP_PHASES = ("data", "step")
_REPORT_SECONDS = 30.0
"""longest time for the report of a hang beyond what the others need to answer; then the process ends without it"""


class WatchdogConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When a run that makes no progress is ended."""

    limit: Duration = Field(
        "10min",
        description="longest time for a step, such as 30s, 10min or 1h; growth, and a batch of an evaluation or a part "
        "of a commit, may take six times as long",
    )

    @property
    def seconds(self) -> float:
        """The limit of a step."""
        limit = duration(self.limit)
        assert limit is not None
        return limit

    @property
    def of_collectives(self) -> float:
        """Seconds that a collective waits for other processes: longer than any phase may take, so that the watchdog,
        which names the process that hangs, is always first."""
        return (SLOW_FACTOR + 1) * self.seconds


class Watchdog:
    """Watches this process from a separate thread while the context is open."""

    def __init__(
        self, config: WatchdogConfig, folder: Path, world: World, lost: Callable[[], str | None] = lambda: None
    ) -> None:
        """`lost()` returns why this process must end at once (another attempt owns the run), or None."""
        self._lost = lost
        self.folder, self.world, self.limit = folder, world, config.seconds
        self.pause = min(5.0, self.limit / 10)
        self._now: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._keys: Sequence[str] = ()
        self._asked = self._question()
        self._closed, self._told = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._time, "watchdog"), (self._report, "heartbeat"))
        ]

    def __enter__(self) -> Self:
        (self.folder / "heartbeats").mkdir(parents=True, exist_ok=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._now = ("end" if error is None else "failed", self._now[1], time.monotonic())
        self._closed.set()
        self._threads[0].join()
        self._threads[1].join(_REPORT_SECONDS)  # the disk may not answer

    def at(self, phase: str, step: int, keys: Sequence[str] | None = None) -> None:
        """Record that this process begins a phase (start, data, step, evaluate, commit, grow, end) after `step` steps;
        `keys` are its samples (default: unchanged)."""
        self._keys = self._keys if keys is None else keys
        self._now = (phase, step, time.monotonic())

    @contextlib.contextmanager
    def through(self, model: nn.Module, phase: str, step: int) -> Iterator[None]:
        """A phase that may take any time, as every pass through a part of `model` is a sign of life."""
        self.at(phase, step)
        hooks = [part.register_forward_pre_hook(lambda *_: self.at(phase, step)) for part in model.children()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _time(self) -> None:
        """End the process when it stays in a phase for too long. Touches no file, so no disk can delay it."""
        while not self._closed.wait(self.pause):
            phase, step, since = self._now
            limit = self.limit * (1 if phase in _STEP_PHASES else SLOW_FACTOR)
            if (spent := time.monotonic() - since) > limit:
                self._give_up(f"no progress for {spent:.0f} s in phase {phase!r} after step {step}")

    def _report(self) -> None:
        """Write heartbeats, answer other processes, and end this one if another attempt owns the run."""
        while True:
            closed = self._closed.wait(self.pause)
            with contextlib.suppress(OSError):  # a full disk does not end a run
                if reason := self._lost():
                    _say(reason)
                    os._exit(LOST)
                self._beat()
            if closed:
                return
            with contextlib.suppress(OSError):
                if self._question() != self._asked:
                    self._asked = self._question()
                    self._leave_stacks()

    def _question(self) -> int | None:
        """When a process last requested the stacks of all, by the clock of the file system."""
        try:
            return (self.folder / "stacks" / "asked").stat().st_mtime_ns
        except OSError:
            return None

    def _leave_stacks(self) -> None:
        """Write the stacks of all threads of this process."""
        path = self.folder / "stacks" / f"rank-{self.world.rank:05d}.txt"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _beat(self) -> None:
        """Write the heartbeat of this process. Raises OSError."""
        phase, step, since = self._now
        beat = {
            "rank": self.world.rank,
            "world": self.world.size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": phase,
            "step": step,
            "seconds": time.monotonic() - since,
            "time": time.time(),
            "keys": list(self._keys),
        }
        atomic_write(_path(self.folder, self.world.rank), json.dumps(beat))

    def _give_up(self, message: str) -> None:
        """Report everything known, give the other ranks time to do the same, and exit: also if nothing can be
        written."""
        threading.Thread(target=self._tell, args=(message,), name="hang report", daemon=True).start()
        self._told.wait(2 * self.pause + _REPORT_SECONDS)
        os._exit(HUNG)

    def _tell(self, message: str) -> None:
        """Leave the report of a hang in the run folder, and kill silent processes of the run on this machine."""
        silent = []
        try:
            with contextlib.suppress(OSError):
                silent = [b for b in read_heartbeats(self.folder) if time.time() - b["time"] > 4 * self.pause + 1]
            if silent:
                message += "; without a heartbeat: " + ", ".join(
                    f"rank {beat['rank']} on {beat['host']} (process {beat['pid']}, last in {beat['phase']!r})"
                    for beat in silent
                )
            _say(f"{message}; stacks in {self.folder / 'hang.txt'}")
            asked = time.time()
            with contextlib.suppress(OSError):
                self._ask(message)
            time.sleep(2 * self.pause)
            with contextlib.suppress(OSError):
                self._bring_together(f"rank {self.world.rank}: {message}", asked)
            for beat in silent:
                _kill_beside(beat)
        finally:
            self._told.set()

    def _ask(self, message: str) -> None:
        """Write the hang down, and ask every process for its stacks."""
        self._leave_stacks()
        (self.folder / "stacks" / "asked").write_text(message, encoding="utf-8")
        row = {"time": time.time(), "rank": self.world.rank, "host": socket.gethostname(), "message": message}
        with (self.folder / "hangs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def _bring_together(self, message: str, asked: float) -> None:
        """Collect the stacks of all ranks, and the last heartbeat of silent ones, in one file."""
        report = [message]
        for beat in read_heartbeats(self.folder):
            path = self.folder / "stacks" / f"rank-{beat['rank']:05d}.txt"
            answered = path.exists() and path.stat().st_mtime > asked - 2 * self.pause
            report += [
                "",
                f"rank {beat['rank']} on {beat['host']}, process {beat['pid']}: for {beat['seconds']:.0f} s in phase "
                f"{beat['phase']!r} after step {beat['step']}",
                f"samples: {json.dumps(beat['keys'])}",
                path.read_text(encoding="utf-8", errors="replace") if answered else "no stacks: it does not respond",
            ]
        atomic_write(self.folder / "hang.txt", "\n".join(report))


def read_heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The last heartbeat of every rank of the newest attempt of the run in `folder`, in rank order."""
    beats = []
    for path in (folder / "heartbeats").glob("rank-*.json"):
        try:
            beats.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    if not beats:
        return []
    world = max(beats, key=lambda beat: beat["time"])["world"]
    return sorted((beat for beat in beats if beat["rank"] < world), key=lambda beat: beat["rank"])


def is_ours(beat: dict[str, Any]) -> bool:
    """Whether the process of a heartbeat runs on this machine and is one of Treering's; the number of one that has
    ended may be another's by now."""
    if beat["host"] != socket.gethostname():
        return False
    try:
        return b"treering" in Path(f"/proc/{beat['pid']}/cmdline").read_bytes()
    except OSError:
        return False


def _say(message: str) -> None:
    """Print a last line, if there is still somewhere to print it."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def _path(folder: Path, rank: int) -> Path:
    return folder / "heartbeats" / f"rank-{rank:05d}.json"


def _kill_beside(beat: dict[str, Any]) -> None:
    """Kill a silent process of this run on this machine, which may be stopped and unable to exit."""
    if beat["host"] != socket.gethostname() or beat["pid"] == os.getpid():
        return
    try:
        ours, theirs = (Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (os.getpid(), beat["pid"]))
        if ours == theirs:
            os.kill(beat["pid"], signal.SIGKILL)
    except OSError:
        pass
