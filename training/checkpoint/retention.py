"""Which commits are kept, and the index of what decides it.

The facts of every complete commit stand in an index beside them, so that a commit costs as much in a run of ten
thousand as in one of ten; what the index lacks is read from the commits themselves. A commit is complete without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from pydantic import BaseModel, TypeAdapter, ValidationError

from .config import CheckpointConfig
from .manifest import DamagedCommit, Manifest
from .store import Store, StoreError

_INDEX = "commits.json"
_READERS = 16  # manifests that are read concurrently where the index lacks them


class Facts(BaseModel, frozen=True, extra="forbid", strict=True):
    """What decides whether a commit is kept."""

    reason: str
    samples: int
    scores: dict[str, float]

    @classmethod
    def of(cls, manifest: Manifest) -> Facts:
        """Those of a commit."""
        return cls(reason=manifest.reason, samples=manifest.state.samples, scores=manifest.scores)


_FACTS = TypeAdapter(dict[str, Facts])


class _File(BaseModel, frozen=True, extra="forbid", strict=True):
    """The index as it is stored."""

    commits: dict[str, Facts]
    check: str
    """of these facts and the run: an index that was damaged, edited or copied here from another run is not believed"""

    @classmethod
    def of(cls, facts: dict[str, Facts], run: str) -> _File:
        return cls(commits=facts, check=sha256(run.encode() + _FACTS.dump_json(facts)).hexdigest()[:16])


class Index:
    """The facts of a store's complete commits, by name; read from the store once, when they are first needed."""

    def __init__(self, store: Store, read: Callable[[str], Manifest], run: Callable[[], str]) -> None:
        """`read` gives the manifest of a commit and raises DamagedCommit, `run` the id of the store's run."""
        self._store, self._read, self._run = store, read, run
        self._facts: dict[str, Facts] | None = None

    def add(self, name: str, manifest: Manifest) -> None:
        """Add a commit that was just completed."""
        self._known()[name] = Facts.of(manifest)

    def keep(self, names: Collection[str]) -> None:
        """Forget all other commits."""
        self._facts = {name: facts for name, facts in self._known().items() if name in names}

    def of(self, complete: Sequence[str]) -> dict[str, Facts]:
        """Facts of complete commits, in their order and without damaged ones: from the index, else their manifests."""
        known = self._known()
        lacking = [name for name in complete if name not in known]
        if lacking:
            with ThreadPoolExecutor(_READERS, "manifest") as readers:
                found = zip(lacking, readers.map(self._read_facts, lacking), strict=True)
                known.update({name: facts for name, facts in found if facts})
        return {name: known[name] for name in complete if name in known}

    def write(self) -> None:
        """Write the index; a refusal of the store is ignored."""
        with contextlib.suppress(StoreError):
            self._store.put(_INDEX, _File.of(self._known(), self._run()).model_dump_json().encode())

    def _read_facts(self, name: str) -> Facts | None:
        try:
            return Facts.of(self._read(name))
        except DamagedCommit:
            return None

    def _known(self) -> dict[str, Facts]:
        """The index; one that is missing, cannot be read, or is not of these commits is empty."""
        if self._facts is None:
            try:
                found = _File.model_validate_json(self._store.get(_INDEX))
                self._facts = found.commits if found == _File.of(found.commits, self._run()) else {}
            except (FileNotFoundError, ValidationError, StoreError):
                self._facts = {}
        return self._facts


def kept(complete: Sequence[str], known: Mapping[str, Facts], policy: CheckpointConfig, best: float | None) -> set[str]:
    """The commits that `policy` keeps of `complete` ones and their facts, both oldest first; the result does not depend
    on what was removed before. Of two best ones it is that with the value `best`, then the newest."""
    found = {*complete[-policy.keep :], *(name for name, facts in known.items() if facts.reason == "growth")}
    if policy.keep_every:
        first: dict[int, str] = {}
        for name, facts in known.items():
            first.setdefault(facts.samples // policy.keep_every, name)
        found |= {name for number, name in first.items() if number > 0}
    scored = {name: f.scores[policy.keep_best] for name, f in known.items() if policy.keep_best in f.scores}
    if scored:
        found.add(max(reversed(scored), key=lambda name: (scored[name] == best, scored[name])))
    return found
