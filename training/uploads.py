"""When a run commits, and the commit being uploaded (at most one), polled between steps while training continues.

Every rank makes the same calls in the same order, since all of them complete a commit together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .checkpoint.commits import Commits
from .checkpoint.snapshot import Snapshot
from .checkpoint.writer import CommitUpload
from .engines.base import Engine
from .health.signals import short_notice
from .logging.run_log import RunLog
from .recipe import Recipe
from .run_plan import RunPlan
from .state import RunState
from .world import World


def reason_to_commit(plan: RunPlan, state: RunState, stopping: bool, best: bool, clock: bool) -> str | None:
    """Why to commit after a step, the first that applies; None where nothing asks for it.

    `stopping`: the run is asked to end; `best`: its score is the best so far; `clock`: enough time has passed.
    """
    if plan.is_over(state):
        return "end"
    if state.step == plan.ends[state.stage] and plan.specs[state.stage + 1] != plan.specs[state.stage]:
        return "growth"
    if stopping:
        return "signal"
    if best:
        return "best"
    return "interval" if clock or plan.crossed(plan.recipe.checkpoint.every_samples, state) else None


@dataclass
class _Upload:
    """A commit in progress."""

    writing: CommitUpload
    state: RunState
    reason: str
    stall: float
    """seconds that training was paused for it"""


class Uploads:
    """Takes snapshots and uploads them, one at a time."""

    def __init__(
        self, commits: Commits, world: World, display: RunLog, alive: Callable[[], None] = lambda: None
    ) -> None:
        """`alive` is called whenever an upload that is waited for makes progress."""
        self.commits, self._alive = commits, alive
        self.last: str | None = None
        """URL of the newest complete commit, or None"""
        self._world, self._display = world, display
        self._upload: _Upload | None = None
        self._warned = False

    def begin(
        self, engine: Engine, state: RunState, recipe: Recipe, reason: str, scores: Mapping[str, float] | None
    ) -> None:
        """Take a snapshot and begin to upload it. No other commit may be in progress. Raises StoreError."""
        assert self._upload is None
        begun = time.monotonic()
        snapshot = Snapshot(
            engine.model.spec,
            state,
            recipe.model_dump(mode="json"),
            engine.logical_state(),
            engine.layout,
            engine.copies,
            reason,
            scores or {},
        )
        writing = self.commits.begin(snapshot, self._world, recipe.checkpoint)
        self._upload = _Upload(writing, state, reason, time.monotonic() - begun)

    @property
    def in_progress(self) -> bool:
        """Whether a commit is in progress; the same on every rank."""
        return self._upload is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still uploading; once no rank is, all should call `advance`."""
        return self._upload is not None and self._upload.writing.busy

    def advance(self) -> float:
        """Drive the commit in progress one step further; returns the seconds it took. No rank may be busy.

        Raises StoreError on every rank.
        """
        return self._drive(wait=False)

    def finish(self) -> float:
        """Wait for the commit in progress; returns the seconds it took. Raises StoreError on every rank."""
        return self._drive(wait=True)

    def give_up(self) -> None:
        """Stop uploading: the commit in progress never becomes visible."""
        if self._upload:
            self._upload.writing.give_up()

    def _drive(self, wait: bool) -> float:
        """One step or to the end; a complete commit is logged."""
        upload, self._upload = self._upload, None  # after an error there is nothing to wait for
        if upload is None:
            return 0.0
        begun, writing = time.monotonic(), upload.writing
        if wait:
            writing.finish(self._alive)
        else:
            writing.advance()
        spent = time.monotonic() - begun
        upload.stall += spent
        if not writing.done:
            self._upload = upload
            return spent
        self.last = f"{self.commits.store.url}/{writing.name}"
        seconds = time.monotonic() - writing.begun
        self._display.event(
            "commit",
            upload.state,
            url=self.last,
            bytes=writing.bytes,
            seconds=seconds,
            stall=upload.stall,
            reason=upload.reason,
        )
        if not self._warned and (short := short_notice(seconds)):
            self._display.warn(short)
            self._warned = True
        return spent
