"""When a run commits, and the commit being uploaded (at most one), polled between steps while training continues.

Every rank makes the same calls in the same order, since all of them complete a commit together. A commit that the store
fails is not the end of a run: training continues and tries again, and where it cannot, it waits for the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .checkpoint.commits import Commits
from .checkpoint.snapshot import Snapshot
from .checkpoint.store import CommitRefused, StoreError
from .checkpoint.writer import CommitUpload
from .device import device_name
from .engines.base import Engine
from .health.signals import short_notice
from .health.watchdog import Watchdog
from .logging.run_log import RunLog
from .recipe import Recipe
from .report.readable import duration_text
from .run_plan import RunPlan
from .state import RunState
from .world import World

_WHILE_TRAINING = ("interval", "best")
"""reasons of commits that nothing waits for"""
RETRY_SECONDS = 60.0
"""between a commit that failed and the next try"""
_GOES_ON = "training goes on and commits again soon"


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

    def __init__(self, commits: Commits, world: World, display: RunLog, patience: float, watch: Watchdog) -> None:
        """`patience`: seconds for which a commit that is waited for is tried again."""
        self.commits, self._watch = commits, watch
        self.last: str | None = None
        """URL of the newest complete commit, or None"""
        self.best: float | None = None
        """the best score of the run as the newest complete commit has it"""
        self.lost_best = False
        """whether the commit with the best score so far failed; for the caller to take note of"""
        self._world, self._display, self._patience = world, display, patience
        self._upload: _Upload | None = None
        self._warned = False
        self._failed: float | None = None
        """when the latest commit failed, or None"""

    def claim_attempt(self) -> int:
        """The number of a new attempt, which names its commits. Raises StoreError on every rank."""
        number, failure = 0, ""
        if self._world.is_first:
            try:
                number = self.commits.claim_attempt(f"{device_name(self._world.device)} x {self._world.size}")
            except StoreError as error:
                failure = str(error)
        number, failure = self._world.first((number, failure))
        if failure:
            raise StoreError(failure)
        return number

    def commit(self, begin: Callable[[], None], state: RunState, reason: str) -> None:
        """Make the commit of `state`, whose snapshot `begin` takes. Raises StoreError if it is needed now and the store
        fails for longer than the patience, or if the run may commit no more."""
        started, waits = time.monotonic(), reason not in _WHILE_TRAINING
        while True:
            try:
                begin()
                if waits:
                    self._drive(wait=True)
                return
            except CommitRefused:
                raise
            except StoreError as error:
                if not waits:
                    self._note_failure(error, state, reason, _GOES_ON)
                    return
                left = self._world.first(started + self._patience - time.monotonic())
                if left <= 0:
                    newest = f"the newest commit is {self.last}" if self.last else "there is no commit"
                    tried = duration_text(time.monotonic() - started)
                    raise StoreError(f"{error}; tried for {tried}; {newest}, and the same command continues") from None
                self._note_failure(error, state, reason, f"trying again for up to {duration_text(left)}")
            self._watch.at("commit", state.step)
            time.sleep(min(RETRY_SECONDS, left))

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

    @property
    def retry_due(self) -> bool:
        """Whether the latest commit failed, and it is time for another; by this rank's clock."""
        return self._failed is not None and time.monotonic() - self._failed >= RETRY_SECONDS

    def advance(self) -> float:
        """Drive the commit in progress one step further; returns the seconds it took. No rank may be busy.

        Raises CommitRefused on every rank.
        """
        return self._settle(wait=False)

    def finish(self) -> None:
        """Wait until no commit is in progress. Raises CommitRefused on every rank."""
        self._settle(wait=True)

    def _settle(self, wait: bool) -> float:
        """Drive the commit in progress, which may fail: training goes on, and another is made soon."""
        upload, begun = self._upload, time.monotonic()
        try:
            return self._drive(wait)
        except CommitRefused:
            raise
        except StoreError as error:
            assert upload
            self._note_failure(error, upload.state, upload.reason, _GOES_ON)
            return time.monotonic() - begun

    def _note_failure(self, error: StoreError, state: RunState, reason: str, then: str) -> None:
        """Say that a commit failed, and what happens `then`."""
        self._failed = time.monotonic()
        self.lost_best |= reason == "best"
        self._display.event("commit_failed", state, error=str(error), reason=reason, then=then)

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
            with self._display.counting(f"{writing.name}: parts of the commit written") as progress:
                writing.finish(lambda: self._watch.at("commit", upload.state.step), progress)
        else:
            writing.advance()
        spent = time.monotonic() - begun
        upload.stall += spent
        if not writing.done:
            self._upload = upload
            return spent
        self._failed, self.best = None, upload.state.best
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
        if writing.warning:
            self._display.warn(writing.warning)
        if not self._warned and (short := short_notice(seconds)):
            self._display.warn(short)
            self._warned = True
        return spent
