"""Uploads a commit while training continues.

The snapshot is a copy of this rank's part of the state in host memory, already in the form of the files to upload.
Threads upload a few files at a time and free each one after it is written. Processes communicate only on their main
threads, at step edges: once to report to the first rank what they have written, so that its thread can complete the
commit, and once to agree on the outcome.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ...data.shards.parallel import Progress, silent
from ..world import World
from .config import CheckpointConfig
from .serialize import SerializedPart
from .staging import File, Staging
from .store import CommitRefused, Store, StoreError

PART_BYTES = 64 << 20
"""largest part, unless a single tensor is larger: the extra memory of a writer or reader"""
_FEW_BYTES, _PARTS = 1 << 20, 64
"""above the first size a rank's data is split into at least this many parts, so one part is at most 1/64 of it"""
_FIRST_LOOK, _LAST_LOOK = 0.01, 5.0
"""seconds between looks at an upload that is waited for; they double"""
CONNECTIONS = 3
"""most parts in flight; the client copies each part it sends, so parts in flight are limited to 10% of the snapshot"""


class CommitPart(BaseModel, frozen=True, extra="forbid", strict=True):
    """One object with tensors of one kind."""

    # The pattern is a guard: a manifest cannot ask for anything outside its own set.
    file: str = Field(pattern=r"^[a-z_]{1,32}-\d{5,}-\d{5,}\.safetensors$")
    kind: str
    bytes: int
    sha256: str
    tensors: int
    ranges: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """of tensors stored in flat ranges: the index of the first element in the whole tensor, and the number of
    elements"""


def taken(store: Store, name: str) -> CommitRefused:
    """The error for a writer that comes second."""
    return CommitRefused(f"{store.url}/{name} was committed by another run; give each run its own checkpoint.to")


class Pace:
    """Limits what several threads send together to `rate` bytes per second on average."""

    def __init__(self, rate: float) -> None:
        self._rate, self._lock, self._free = rate, threading.Lock(), 0.0

    def wait(self, size: int) -> None:
        """Sleep until `size` more bytes may be sent."""
        with self._lock:
            begin = max(time.monotonic(), self._free)
            self._free = begin + size / self._rate
        time.sleep(max(0.0, begin - time.monotonic()))


class CommitUpload:
    """One commit from its snapshot to its completion. All ranks have one at the same time, and drive it together.

    Call `advance` whenever no rank is `busy`, until `done`; or `finish`, which waits.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        tensors: Mapping[str, Tensor],
        starts: Mapping[str, int],
        world: World,
        complete: Callable[[Sequence[CommitPart]], str | None],
        discard: Callable[[], None],
        policy: CheckpointConfig = CheckpointConfig(),  # noqa: B008  frozen
    ) -> None:
        """Copy `tensors` (by `kind/name`; ranges begin at `starts`, by name) and start to upload them, with the
        bandwidth and staging of `policy`.

        The first rank's thread calls `complete` with the parts of all ranks, which may return a warning; if any rank's
        upload failed, the first rank calls `discard`.
        """
        self.name, self.done = name, False
        self.warning: str | None = None
        self.bytes = 0
        self.begun = time.monotonic()
        self._store, self._world, self._starts = store, world, starts
        self._complete, self._discard = complete, discard
        self._pace = Pace(policy.max_bandwidth * 1e6) if policy.max_bandwidth else None
        self._staging = Staging(policy.staging, store.url, name, world.rank) if policy.staging else None
        self._parts: list[CommitPart] = []
        self._error: BaseException | None = None
        self._given_up = False
        self._sent = 0
        self._sealing = False
        self._snapshot = self._copied({path: t for path, t in tensors.items() if t.numel()})
        self._total = len(self._snapshot)
        self._start(self._upload)

    def _copied(self, tensors: Mapping[str, Tensor]) -> list[tuple[CommitPart, File]]:
        """The files of this rank, kind by kind, without checksums."""
        snapshot: list[tuple[CommitPart, File]] = []
        for (kind, number), paths in _chunks(tensors).items():
            pieces = {path.partition("/")[2]: tensors[path] for path in paths}
            packed = SerializedPart(pieces)
            part = CommitPart(
                file=f"{kind}-{self._world.rank:05d}-{number:05d}.safetensors",
                kind=kind,
                bytes=packed.size,
                sha256="",
                tensors=len(pieces),
                ranges={name: (self._starts[name], p.numel()) for name, p in pieces.items() if name in self._starts},
            )
            snapshot.append((part, packed))
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return snapshot

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still working."""
        return self._thread.is_alive()

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, name=f"commit {self.name}", daemon=True)
        self._thread.start()

    def _upload(self) -> None:
        """Write this rank's parts, kind by kind; each is freed after it is written."""
        try:
            self._store.get(f"{self.name}/COMMIT")
        except FileNotFoundError:
            pass
        else:
            raise taken(self._store, self.name)
        sizes = [part.bytes for part, _ in self._snapshot]
        spare = max(sum(sizes) // 10, 2 * _FEW_BYTES)
        at_once = max(1, min(CONNECTIONS, spare // max(sizes, default=1)))
        with self._staging or contextlib.nullcontext(), ThreadPoolExecutor(at_once, "part") as senders:
            if self._staging:
                for place, (part, packed) in enumerate(self._snapshot):
                    self._snapshot[place] = (part, self._staging.keep(part.file, packed))
            for sent in senders.map(lambda _: self._send(), sizes):
                self._parts += [sent] if sent else []
        self._parts.sort(key=lambda part: part.file)

    def _send(self) -> CommitPart | None:
        """Write the next part and free it. After a failure or `give_up` nothing more is sent."""
        if self._given_up:
            return None
        part, packed = self._snapshot.pop(0)
        try:
            data = packed.data()
            if self._pace:
                self._pace.wait(len(data))
            self._store.put(f"{self.name}/{part.file}", data)
            self._sent += 1  # only looked at: a count lost between two threads does not matter
            return part.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
        except BaseException:
            self._given_up = True
            raise

    def advance(self) -> None:
        """The next of the two exchanges; all ranks call it when none is busy.

        Raises on every rank if one of them failed: what was written is then removed, and was never visible.
        """
        self._thread.join()
        world = self._world
        if self._sealing:
            self._agree()
            self.done = True
            return
        reports = world.objects_to_first([part.model_dump() for part in self._parts])
        self.bytes = sum(self._agree())
        self._sealing = True

        def seal() -> None:
            parts = [CommitPart.model_validate(part, strict=False) for report in reports for part in report]
            self.warning = self._complete(parts)

        if world.is_first:
            self._start(seal)

    def _clear_up(self) -> None:
        with contextlib.suppress(StoreError):  # the next commit removes what is left
            self._discard()

    def finish(self, alive: Callable[[], None] = lambda: None, progress: Progress = silent) -> None:
        """Wait until the commit is complete; `alive` is called whenever a rank has sent a part, and `progress(done,
        total)` counts the parts of this rank. Raises as `advance` does."""
        try:
            while not self.done:
                self._wait(alive, progress)
                self.advance()
        finally:
            self._thread.join()

    def _wait(self, alive: Callable[[], None], progress: Progress) -> None:
        """Wait for the threads of all ranks, for any time as long as one of them makes progress."""
        pause, seen, busy = _FIRST_LOOK, self._sent, True
        while busy:
            self._thread.join(pause)
            sent, pause = self._sent, min(2 * pause, _LAST_LOOK)
            busy, moved = self._world.any(self.busy, sent != seen)
            seen = sent
            progress(sent, self._total)
            if moved:
                alive()

    def give_up(self) -> None:
        """Stop uploading and wait for requests in flight: the run ends in an error, and nothing becomes visible."""
        self._given_up = True
        self._thread.join()

    def _agree(self) -> list[int]:
        """The bytes that each rank has written. Raises on every rank what failed on one; an error that is not a
        StoreError is re-raised unchanged where it happened."""
        error = self._error
        said = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        failed = {"said": said, "refused": isinstance(error, CommitRefused)}
        answers = self._world.objects(failed if error else sum(part.bytes for part in self._parts))
        failures = [answer for answer in answers if isinstance(answer, dict)]
        if error is not None and not isinstance(error, StoreError):
            raise error
        if failures:
            if self._world.is_first:
                self._start(self._clear_up)  # a store that fails takes its time over this too
            worst = max(failures, key=lambda failure: bool(failure["refused"]))
            raise (CommitRefused if worst["refused"] else StoreError)(worst["said"])
        return answers


def _chunks(tensors: Mapping[str, Tensor]) -> dict[tuple[str, int], list[str]]:
    """Paths of tensors, grouped by kind into chunks of a limited size (or one tensor)."""
    chunks: dict[tuple[str, int], list[str]] = {}
    limit = min(PART_BYTES, max(_FEW_BYTES, sum(t.nbytes for t in tensors.values()) // _PARTS))
    filled: dict[str, list[int]] = {}
    for path in sorted(tensors):
        kind = path.partition("/")[0]
        at = filled.setdefault(kind, [0, 0])
        if at[1] and at[1] + tensors[path].nbytes > limit:
            at[0], at[1] = at[0] + 1, 0
        at[1] += tensors[path].nbytes
        chunks.setdefault((kind, at[0]), []).append(path)
    return chunks
