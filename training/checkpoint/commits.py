"""Commits: whole snapshots in a store, all or nothing.

Why not torch's distributed checkpoints (DCP, async_save): they have no place for the runs of elements that DeepSpeed's
ZeRO holds, no seal that makes a set visible at once in a store, no checksums, and nothing that keeps a second writer
out.

A commit is a set of objects under `step-N-attempt-M/`: parts with the tensors, a manifest that lists them with sizes
and checksums, and last a small COMMIT object with the manifest's checksum. Readers only see sets that have both, so a
writer killed at any moment leaves nothing visible. Removal deletes the manifest first, so that the COMMIT of a slow
writer cannot complete the set afterwards. If two runs use one place, the later one wins: the attempt that claimed it
before is refused at its next commit. Nothing in a commit is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ...data.shards.parallel import Progress, silent
from ..world import World
from .config import CheckpointConfig
from .manifest import FORMAT, Commit, DamagedCommit, Manifest, read_verified
from .retention import Index, kept
from .snapshot import Snapshot
from .store import CommitRefused, Store, StoreError
from .validation import checked
from .writer import CommitPart, CommitUpload, taken

_SET = re.compile(r"^step-(\d{12,})-attempt-(\d{4,})$")
_ATTEMPT = re.compile(r"^attempt-(\d{4,})\.json$")
_FORMAT_1 = re.compile(r"^step-\d{12}-life-\d{4}/COMMIT$")
_STALE = timedelta(days=1)


class Commits:
    """The commits of one run in one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._index = Index(store, lambda name: self.open(name).manifest, lambda: self.run or "")
        self._run: str | None = None
        self._sealed: set[str] = set()
        """what this process has completed, whether or not a listing shows it already"""

    def _sets(self) -> dict[str, set[str]]:
        """Objects of every set, complete or not, by set name."""
        sets: dict[str, set[str]] = {}
        for path in self.store.beginning("step-"):
            name, _, file = path.partition("/")
            if _SET.match(name) and file:
                sets.setdefault(name, set()).add(file)
        return sets

    def names(self) -> list[str]:
        """Complete commits, oldest first. Raises StoreError if there are only commits of format 1."""
        found = sorted((name for name, files in self._sets().items() if _complete(files)), key=_order)
        if not found and any(_FORMAT_1.match(path) for path in self.store.beginning("step-")):
            raise StoreError(
                f"{self.store.url} holds commits of format 1, from before release 0.2, and this release reads format "
                f"{FORMAT}; continue them with that release, or give a new run another place"
            )
        return found

    def remove_after(self, step: int) -> None:
        """Remove complete commits of later steps, the newest first."""
        sets = self._sets()
        for name in sorted(filter(lambda name: _complete(sets[name]), sets), key=_order, reverse=True):
            if _step(name) > step:
                self._remove(name, sets[name])

    def newest_until(self, step: int) -> int | None:
        """The step of the newest complete commit up to this step."""
        return max((at for name in self.names() if (at := _step(name)) <= step), default=None)

    def claim_attempt(self, who: str) -> int:
        """The number of a new attempt, one more than any before it, taken by at most one run.

        It is part of the names of commits, so two attempts never write the same objects. Raises StoreError if another
        run took the number.
        """
        taken = [int(match[1]) for path in self.store.beginning("attempt-") if (match := _ATTEMPT.match(path))]
        attempt = max([*taken, *(_attempt(name) for name in self._sets())], default=0) + 1
        token = secrets.token_hex(8)
        if self.run is None:  # commits without a claim were moved here: their run goes on
            names = self.names()
            self._run = self.open(names[-1]).manifest.run if names else token
        claim = json.dumps({"who": who, "time": time.time(), "token": token, "run": self._run}).encode()
        if not self.store.put_new(_claim(attempt), claim):
            raise StoreError(
                f"another run started in {self.store.url} at this moment; give each run its own checkpoint.to"
            )
        return attempt

    def open(self, name: str) -> Commit:
        """Read and verify a commit's manifest. Raises DamagedCommit or StoreError."""
        try:
            seal = self.store.get(f"{name}/COMMIT")
            digest = json.loads(seal)["manifest_sha256"]
            if seal != _seal(digest):
                raise DamagedCommit(f"{self.store.url}/{name}/COMMIT is damaged; use another commit")
            data = read_verified(self.store, f"{name}/manifest.json", digest)
            self._check_format(name, json.loads(data).get("format"))
            return Commit(self.store, name, Manifest.decoded(data))
        except FileNotFoundError:
            raise StoreError(
                f"{self.store.url}/{name} is not a complete commit; complete ones: {self.names()[-5:]}"
            ) from None
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            file, where = "COMMIT", str(error)[:200]
            if isinstance(error, ValidationError):
                file, where = "manifest.json", ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedCommit(f"{self.store.url}/{name}/{file} is damaged ({where!r}); use another commit") from None

    def verified(self, name: str, stored: bool = True) -> Commit:
        """A commit that fits together (`validation.py`), is of this store's run, and has parts of the right sizes.

        `stored`: whether to look at the store for the last two. Raises DamagedCommit or StoreError.
        """
        commit = self.open(name)
        manifest = commit.manifest
        try:
            shapes = checked(name, manifest)
        except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
            said = str(error)[:300] or type(error).__name__
            raise DamagedCommit(f"{commit.url} contradicts itself: {said}; use another commit") from None
        if stored:
            if self.run is not None and manifest.run != self.run:
                raise DamagedCommit(
                    f"{commit.url} was written by another run and copied here; begin a run of its own with it: "
                    f"--from {commit.url} after moving it to another folder"
                )
            there = self.store.sizes(name)
            short = next((part.file for part in manifest.parts if there.get(f"{name}/{part.file}") != part.bytes), None)
            if short:
                raise DamagedCommit(f"{commit.url}/{short} is missing or has another size; use another commit")
        return replace(commit, shapes=shapes)

    @property
    def run(self) -> str | None:
        """The id of the run whose store this is, as the newest claim says that can be read; None if there is none."""
        if self._run is None:
            claims = [int(match[1]) for path in self.store.beginning("attempt-") if (match := _ATTEMPT.match(path))]
            for number in sorted(claims, reverse=True):
                with contextlib.suppress(FileNotFoundError, ValueError, AttributeError, RecursionError):
                    self._run = str(json.loads(self.store.get(_claim(number))).get("run", ""))
                    break
        return self._run

    def _check_format(self, name: str, found: Any) -> None:
        """Raise StoreError if the commit is of another format, before anything else of it is read."""
        if found != FORMAT:
            raise StoreError(
                f"{self.store.url}/{name} is a commit of format {found!r:.40}, and this release reads format {FORMAT}; "
                f"use the release that wrote it"
            )

    def begin(self, snapshot: Snapshot, world: World, policy: CheckpointConfig | None = None) -> CommitUpload:
        """Begin a commit of a snapshot as it is now; every rank calls this, and then drives its upload to the end.

        Tensors that several ranks hold are divided among them. Commits that `policy` does not keep are removed once
        this one is complete.
        """
        layout, name, attempt = snapshot.layout or {}, snapshot.name, snapshot.state.attempt
        copies = snapshot.copies or (World(0, 1, world.device) if snapshot.layout else world)
        starts = {path: flat.start for path, flat in layout.items()}

        def complete(parts: Sequence[CommitPart]) -> str | None:
            manifest = Manifest(
                spec=snapshot.spec,
                state=snapshot.state,
                recipe=dict(snapshot.recipe),
                reason=snapshot.reason,
                scores=dict(snapshot.scores),
                shapes={path: flat.shape for path, flat in layout.items()},
                parts=tuple(parts),
                run=self.run or "",
            )
            self.seal(name, manifest)
            try:
                if policy is not None:
                    self.retain(policy, attempt, snapshot.state.health.healthy_step, snapshot.state.best)
                    self.sweep_uploads(attempt)
                self._index.write()
            except StoreError as error:  # the commit is complete, and the next one removes what is left
                return f"older commits were not removed: {error}"
            return None

        own, discard = _own_part(snapshot.tensors, copies), partial(self._discard, name)
        return CommitUpload(self.store, name, own, starts, world, complete, discard, policy or CheckpointConfig())

    def write(self, snapshot: Snapshot, world: World, progress: Progress = silent) -> str:
        """Commit a snapshot and return its name; every rank calls this with the same tensors and writes its part, as
        `progress(done, total)` counts.

        Raises StoreError on every rank if any rank failed; what was written is then removed and was never visible.
        """
        upload = self.begin(snapshot, world)
        upload.finish(progress=progress)
        return upload.name

    def seal(self, name: str, manifest: Manifest) -> None:
        """Write the manifest and, when every part is there at its size, the COMMIT object."""
        data = manifest.encoded()
        try:
            same = Manifest.decoded(data).encoded() == data
        except ValidationError:
            same = False
        if not same:
            raise CommitRefused(
                f"the manifest of {self.store.url}/{name} would not be read as it is written: please report it"
            )
        self.store.put(f"{name}/manifest.json", data)
        there = self.store.sizes(name)
        needed = {part.file: part.bytes for part in manifest.parts} | {"manifest.json": len(data)}
        wrong = [file for file, size in needed.items() if there.get(f"{name}/{file}") != size]
        # A listing may come late: what it lacks is looked at itself.
        short = next((file for file in wrong if self.store.size(f"{name}/{file}") != needed[file]), None)
        self._check_attempt(manifest.state.attempt)
        if short:
            raise StoreError(
                f"store {self.store.url}: {short} of {name} is missing or short right after it was written"
            )
        if not self.store.put_new(f"{name}/COMMIT", _seal(hashlib.sha256(data).hexdigest())):
            raise taken(self.store, name)
        self._sealed.add(name)
        self._index.add(name, manifest)

    def _check_attempt(self, attempt: int) -> None:
        """Raise CommitRefused if a later run has claimed this place: attempts have no gaps."""
        try:
            claim = self.store.get(_claim(attempt + 1))
        except FileNotFoundError:
            return
        try:
            who = str(json.loads(claim)["who"])
        except (ValueError, KeyError, TypeError):
            who = "a run"
        raise CommitRefused(
            f"another run ({who!r}) took over {self.store.url}, and this one is refused; "
            f"stop it, or give each run its own checkpoint.to"
        )

    def retain(self, policy: CheckpointConfig, attempt: int, healthy: int = 0, best: float | None = None) -> None:
        """Remove commits that `policy` does not keep, and unfinished ones of `attempt` and earlier attempts.

        The newest commit up to the step `healthy` is kept: it is what a rollback needs. `best` is the best value of the
        run's score; a commit with a higher one was scored on data that have changed since.

        No commit of this attempt may be in progress.
        """
        sets = self._sets()
        complete = sorted(
            (name for name, files in sets.items() if _complete(files) or name in self._sealed), key=_order
        )
        wanted = kept(complete, self._index.of(complete), policy, best)
        wanted |= {*[name for name in complete if _step(name) <= healthy][-1:]}
        for name, files in sets.items():
            unfinished = name not in complete and _attempt(name) <= attempt
            if unfinished or (name in complete and name not in wanted):
                self._remove(name, files)
        self._index.keep(wanted)

    def sweep_uploads(self, attempt: int) -> None:
        """Abort multipart uploads that a kill left unfinished: of earlier attempts, and any older than a day."""
        limit = datetime.now(UTC) - _STALE
        for (path, upload), begun in self.store.uploads("step-").items():
            name = path.partition("/")[0]
            if _SET.match(name) and (_attempt(name) < attempt or begun < limit):
                self.store.abort(path, upload)

    def _discard(self, name: str) -> None:
        """Remove a set unless it is complete."""
        files = {path.rpartition("/")[2] for path in self.store.sizes(name)}
        if not _complete(files):
            self._remove(name, files)

    def _remove(self, name: str, files: Collection[str]) -> None:
        """Remove a set of these objects, its manifest first: after that no reader sees it and no writer can complete
        it, also after a power cut."""
        for some in (("manifest.json",), ("COMMIT",), sorted({*files} - {"manifest.json", "COMMIT"})):
            self.store.delete(f"{name}/{file}" for file in some if file in files)
        self.store.prune(name)
        self._sealed.discard(name)


def print_warning(message: str) -> None:
    """Say on stderr that a damaged commit was skipped."""
    print(f"warning: {message}", file=sys.stderr)


def find_commit(url: str, warn: Callable[[str], None] = print_warning) -> Commit:
    """A commit by its own URL, or the newest one of a run folder or of a folder of commits: the newest that is intact
    and fits together. `warn` is called for those that are not. Raises StoreError."""
    if Path(url).is_file():
        raise StoreError(f"{url} is a file, and a commit is a folder; give a commit, or the --out folder of a run")
    parent, _, last = url.rstrip("/").rpartition("/")
    if _SET.match(last):
        return Commits(Store(parent or ".", public=True)).verified(last)
    for place in (url.rstrip("/"), f"{url.rstrip('/')}/commits"):
        commits = Commits(Store(place, public=True))
        damage: DamagedCommit | None = None
        for name in reversed(commits.names()):
            try:
                return commits.verified(name)
            except DamagedCommit as error:
                warn(str(error))
                damage = damage or error
        if damage is not None:
            raise damage
    raise StoreError(
        f"there is no commit at {url} nor in its folder commits/; give a commit, or the --out folder of a run"
    )


def _complete(files: Collection[str]) -> bool:
    return "COMMIT" in files and "manifest.json" in files


def _seal(digest: str) -> bytes:
    """The COMMIT object for a manifest, with a checksum of its own, so that damage to it is recognised."""
    return json.dumps({"manifest_sha256": digest, "check": hashlib.sha256(digest.encode()).hexdigest()[:16]}).encode()


def _claim(attempt: int) -> str:
    return f"attempt-{attempt:04d}.json"


def _step(name: str) -> int:
    match = _SET.match(name)
    assert match
    return int(match[1])


def _order(name: str) -> tuple[int, int]:
    """By which commits are older or newer: numbers, as text would sort attempt 10000 before 9999."""
    return _step(name), _attempt(name)


def _attempt(name: str) -> int:
    match = _SET.match(name)
    assert match
    return int(match[2])


def _own_part(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors this rank writes: largest first, each goes to the rank with the fewest bytes so far."""
    loads = [0] * world.size
    mine: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = loads.index(min(loads))
        loads[rank] += tensors[name].nbytes
        if rank == world.rank:
            mine[name] = tensors[name]
    return mine
