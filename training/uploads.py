"""The commits of a run on their way: at most one, led forward at step edges while training goes on.

Every rank makes the same calls in the same order, since a commit is completed by all of them together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint.commits import Commits
from .checkpoint.snapshot import Snapshot
from .checkpoint.writer import CommitUpload
from .engines.base import Engine
from .health.signals import short_notice
from .logging.run_log import Display
from .recipe import Recipe
from .state import RunState
from .world import World


@dataclass
class _Upload:
    """A commit under way."""

    writing: CommitUpload
    state: RunState
    reason: str
    stall: float
    """seconds that training stood still for it"""


class Uploads:
    """Takes snapshots and brings them into the store, one after the other."""

    def __init__(self, commits: Commits, world: World, display: Display) -> None:
        self.commits = commits
        self.last: str | None = None
        """URL of the newest complete commit, if there is one"""
        self._world, self._display = world, display
        self._upload: _Upload | None = None
        self._warned = False

    def begin(
        self, engine: Engine, state: RunState, recipe: Recipe, reason: str, scores: Mapping[str, float] | None
    ) -> None:
        """Take a snapshot and begin to upload it. Nothing else may be under way. Raises StoreError."""
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
    def under_way(self) -> bool:
        """Whether there is a commit that is not complete; the same on every rank."""
        return self._upload is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still sends; when none does, all should `advance`."""
        return self._upload is not None and self._upload.writing.busy

    def advance(self) -> float:
        """Bring what is under way a step further, and return the seconds it took; no rank may be busy.

        Raises StoreError on every rank.
        """
        return self._lead(wait=False)

    def finish(self) -> float:
        """Wait until nothing is under way, and return the seconds it took. Raises StoreError on every rank."""
        return self._lead(wait=True)

    def give_up(self) -> None:
        """Send nothing more: what is under way never becomes visible."""
        if self._upload:
            self._upload.writing.give_up()

    def _lead(self, wait: bool) -> float:
        """A step further or to the end; what is complete is written down."""
        upload, self._upload = self._upload, None  # an error leaves nothing to wait for
        if upload is None:
            return 0.0
        begun, writing = time.monotonic(), upload.writing
        if wait:
            writing.finish()
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
