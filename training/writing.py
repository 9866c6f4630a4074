"""A commit on its way to the store while training goes on.

The snapshot is a copy of this rank's share in host memory, taken at once; a thread uploads it part by part. Processes
only talk to each other on their main threads, at step edges: once to hand over what they have written, so that the
first rank's thread can complete the commit, and once to learn how that went.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import BaseModel, Field
from safetensors.torch import save
from torch import Tensor

from .store import Store, StoreError
from .world import World

PART_BYTES = 256 << 20
"""largest part: what a writer or reader holds beside the tensors themselves"""
_FEW_BYTES, _PARTS = 8 << 20, 32
"""a share of more than the first is cut into this many parts or more: what it takes beside the snapshot is a 32nd"""


class Part(BaseModel, frozen=True, extra="forbid", strict=True):
    """One object with tensors of one kind."""

    # The pattern is a guard: a manifest cannot ask for anything outside its own set.
    file: str = Field(pattern=r"^[a-z_]{1,32}-\d{5}-\d{5}\.safetensors$")
    kind: str
    bytes: int
    sha256: str
    tensors: int
    stretches: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """of tensors that are no wholes: the first element's place in the whole, laid out flat, and how many there are"""


def taken(store: Store, name: str) -> StoreError:
    """The error of a writer that comes second."""
    return StoreError(f"{store.url}/{name} was committed by another run; give each run its own checkpoint.to")


class Writing:
    """One commit from its snapshot to its completion. All ranks have one at the same time, and lead it together.

    `advance` as soon as no rank is `busy` any more, until `done`; or `finish`, which waits.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        tensors: Mapping[str, Tensor],
        starts: Mapping[str, int],
        world: World,
        complete: Callable[[Sequence[Part]], None],
        discard: Callable[[], None],
    ) -> None:
        """Copy `tensors` (by `kind/name`; stretches begin at `starts`, by name) and start to upload them.

        With the parts of all ranks the first one's thread calls `complete`; if the store failed anybody, the first rank
        calls `discard`.
        """
        self.name, self.done = name, False
        self.bytes = 0
        self.begun = time.monotonic()
        self._store, self._world, self._starts = store, world, starts
        self._complete, self._discard = complete, discard
        self._parts: list[Part] = []
        self._error: BaseException | None = None
        self._given_up = False
        self._sealing = False
        self._snapshot = _copied({path: t for path, t in tensors.items() if t.numel()})
        self._start(self._upload)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread has something left to do."""
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
        """Write this rank's parts, kind by kind; what is written is let go of."""
        try:
            self._store.get(f"{self.name}/COMMIT")
        except FileNotFoundError:
            pass
        else:
            raise taken(self._store, self.name)
        for (kind, number), paths in _chunks(self._snapshot).items():
            if self._given_up:
                return
            pieces = {path.partition("/")[2]: self._snapshot.pop(path) for path in paths}
            data = save(pieces)
            stretches = {name: (self._starts[name], p.numel()) for name, p in pieces.items() if name in self._starts}
            file = f"{kind}-{self._world.rank:05d}-{number:05d}.safetensors"
            digest = hashlib.sha256(data).hexdigest()
            part = Part(file=file, kind=kind, bytes=len(data), sha256=digest, tensors=len(pieces), stretches=stretches)
            del pieces
            self._store.put(f"{self.name}/{file}", data)
            self._parts.append(part)

    def advance(self) -> None:
        """The next of the two meetings; all ranks call it when none is busy.

        Raises on every rank if one of them failed: what was written is then removed, and was never visible.
        """
        self._thread.join()
        world = self._world
        if self._sealing:
            self._agree()
            self.done = True
            return
        reports = world.objects([part.model_dump() for part in self._parts])
        self._agree()
        parts = [Part.model_validate(part, strict=False) for report in reports for part in report]
        self.bytes = sum(part.bytes for part in parts)
        self._sealing = True
        if world.is_first:
            self._start(lambda: self._complete(parts))

    def finish(self) -> None:
        """Wait until the commit is complete. Raises as `advance` does."""
        while not self.done:
            self.advance()

    def give_up(self) -> None:
        """Upload no further and wait for what is under way: the run ends in an error, and nothing becomes visible."""
        self._given_up = True
        self._thread.join()

    def _agree(self) -> None:
        """Raise on every rank what failed on one; an error that is nobody's to mend is raised as it is where it was."""
        error = self._error
        said = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        failures = [failure for failure in self._world.objects(said if error else None) if failure]
        if error is not None and not isinstance(error, StoreError):
            raise error
        if failures:
            if self._world.is_first:
                self._discard()
            raise StoreError(failures[0])


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in host memory; from a device it is made through pinned memory, all tensors at once."""
    copies = {
        path: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t.detach(), non_blocking=True)
        for path, t in tensors.items()
    }
    if any(t.is_cuda for t in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _chunks(tensors: Mapping[str, Tensor]) -> dict[tuple[str, int], list[str]]:
    """Paths of tensors of one kind together, in chunks of a limited size (or one tensor)."""
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
