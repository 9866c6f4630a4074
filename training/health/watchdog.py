"""The watchdog: every process reports its phase; a run without progress ends itself and names the hanging process.

A thread beside the training writes this process's phase and step into `DIR/heartbeats/` every few seconds. A process
that stays in one phase for too long asks the others for the stacks of their threads, brings them together in
`DIR/hang.txt` with where each is and the samples it had last, adds a line to `DIR/hangs.jsonl`, and exits with a code
of its own: whoever started the run starts it again. A stopped process cannot do any of that; the others see its
heartbeat grow old and name it. A process whose run another attempt has begun elsewhere, since this one was taken for
dead, ends too.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator

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


class WatchdogConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When a run that makes no progress is ended."""

    limit: str = Field(
        "10min",
        description="longest time for a step, such as 30s, 10min or 1h; evaluations, commits and growth may take "
        "six times as long",
    )

    @field_validator("limit")
    @classmethod
    def _readable(cls, value: str) -> str:
        if duration(value) is None:
            raise ValueError(f"{value!r} is not a valid time; write one such as 30s, 10min or 1h")
        return value

    @property
    def seconds(self) -> float:
        """The limit of a step."""
        limit = duration(self.limit)
        assert limit is not None
        return limit


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
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        (self.folder / "heartbeats").mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._now = ("end" if error is None else "failed", self._now[1], time.monotonic())
        self._closed.set()
        self._thread.join()

    def at(self, phase: str, step: int, keys: Sequence[str] | None = None) -> None:
        """Record that this process begins a phase (start, data, step, evaluate, commit, grow, end) after `step` steps;
        `keys` are its samples (default: unchanged)."""
        self._keys = self._keys if keys is None else keys
        self._now = (phase, step, time.monotonic())

    def _watch(self) -> None:
        while True:
            closed = self._closed.wait(self.pause)
            if reason := self._lost():
                print(reason, file=sys.stderr, flush=True)
                os._exit(LOST)
            self._beat()
            if closed:
                return
            phase, step, since = self._now
            limit = self.limit * (1 if phase in _STEP_PHASES else SLOW_FACTOR)
            if time.monotonic() - since > limit:
                self._give_up(phase, step, time.monotonic() - since)
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
        """Write the heartbeat of this process. A full disk does not end a run."""
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
        with contextlib.suppress(OSError):
            atomic_write(_path(self.folder, self.world.rank), json.dumps(beat))

    def _give_up(self, phase: str, step: int, seconds: float) -> None:
        """Report everything known, give the other ranks time to do the same, and exit."""
        silent = [beat for beat in read_heartbeats(self.folder) if time.time() - beat["time"] > 4 * self.pause + 1]
        message = f"no progress for {seconds:.0f} s in phase {phase!r} after step {step}"
        if silent:
            message += "; without a heartbeat: " + ", ".join(
                f"rank {beat['rank']} on {beat['host']} (process {beat['pid']}, last in {beat['phase']!r})"
                for beat in silent
            )
        self._leave_stacks()
        (self.folder / "stacks" / "asked").write_text(message, encoding="utf-8")
        row = {"time": time.time(), "rank": self.world.rank, "host": socket.gethostname(), "message": message}
        with (self.folder / "hangs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{message}; stacks in {self.folder / 'hang.txt'}", file=sys.stderr, flush=True)
        asked = time.time()
        time.sleep(2 * self.pause)
        self._bring_together(f"rank {self.world.rank}: {message}", asked)
        for beat in silent:
            _kill_beside(beat)
        os._exit(HUNG)

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
    for path in sorted((folder / "heartbeats").glob("rank-*.json")):
        try:
            beats.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    if not beats:
        return []
    world = max(beats, key=lambda beat: beat["time"])["world"]
    return [beat for beat in beats if beat["rank"] < world]


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
