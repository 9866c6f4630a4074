"""Commits: whole snapshots in a store, all or nothing.

A commit is a set of objects under `step-N-life-L/`: parts with the tensors, a manifest that lists them with sizes and
checksums, and last of all a small COMMIT object that holds the manifest's checksum. Readers only look at sets that have
both, so a writer killed anywhere leaves nothing a reader could see; and what is removed loses its manifest first, so
that a slow writer's COMMIT that comes after completes nothing. Of two runs in one place the later one has it: whoever
claimed a life before is refused at its next commit. Nothing in a commit is code. Tensors lie in it by
logical name, whole or in stretches as their engine held them, and are read whole or in any other stretches.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import prod
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..models.spec import ModelSpec
from .shards import Layout, Stretch
from .state import RunState
from .store import Store, StoreError
from .world import World
from .writing import Part, Writing, taken

_SET = re.compile(r"^step-(\d{12})-life-(\d{4})$")
_LIFE = re.compile(r"^life-(\d{4})\.json$")
_STALE = timedelta(days=1)
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where, how often and how long commits are kept. A run always commits before growth and at its end."""

    to: str | None = Field(None, description="any fsspec URL; left out: the folder commits/ of the run")
    every: tuple[int | str, ...] = Field(
        ("2min",), strict=False, description="2min, 30s, 1h, a number of samples such as 10_000, or a list of these"
    )
    keep: int = Field(3, gt=0, description="newest commits to keep; those before a growth are kept as well")
    keep_every: int | None = Field(None, gt=0, description="samples; keep the first commit of every so many as well")
    keep_best: str | None = Field(
        None, description="a score such as retrieval/image_to_text@1; keep the commit that has the best as well"
    )

    @field_validator("every", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("every")
    @classmethod
    def _readable(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for item in value:
            fits = item > 0 if isinstance(item, int) else _INTERVAL.fullmatch(item)
            if not fits:
                raise ValueError(
                    f"{item!r} is no interval; write a time such as 30s, 2min or 1h, or samples such as 10_000"
                )
        return value

    @property
    def every_samples(self) -> int | None:
        """The shortest interval in samples, if any is given."""
        return min((i for i in self.every if isinstance(i, int)), default=None)

    @property
    def every_seconds(self) -> float | None:
        """The shortest interval in seconds, if any is given."""
        times = [_INTERVAL.fullmatch(i) for i in self.every if isinstance(i, str)]
        return min((float(m[1]) * _UNITS[m[2]] for m in times if m), default=None)


class OriginConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where a new run begins. Once it has a commit of its own, it continues from that."""

    commit: str = Field(description="a commit's URL, or the newest one of a run folder")
    carry: Literal["weights", "all"] = Field(
        "weights",
        description="weights: the first step, with these weights; all: the commit's next step, with its optimizer too",
    )


class Manifest(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a commit holds."""

    format: int = 1
    spec: ModelSpec
    state: RunState
    recipe: dict[str, Any]
    reason: str = "interval"
    scores: dict[str, float] = Field(default_factory=dict)
    """of an evaluation at this very step"""
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """of parameters that lie here in stretches: the shape of the whole"""
    parts: tuple[Part, ...] = Field(strict=False)


class DamagedCommit(StoreError):
    """A commit whose bytes are not those that were committed."""


@dataclass(frozen=True)
class Commit:
    """A complete commit, its manifest verified; tensors are verified as they are read."""

    store: Store
    name: str
    manifest: Manifest

    @property
    def url(self) -> str:
        """Where it lies."""
        return f"{self.store.url}/{self.name}"

    def written(self) -> float | None:
        """Unix time at which it was sealed, if the store tells."""
        return self.store.modified(f"{self.name}/COMMIT")

    def tensors(self, kind: str | None = None, layout: Layout | None = None) -> dict[str, Tensor]:
        """All tensors by `kind/name`, or those of one kind; of each what `layout` names, flat, or the whole.

        Holds one part beside what it returns. Raises DamagedCommit naming the file.
        """
        found = _Assembly(self.manifest.shapes, layout)
        for part in self.manifest.parts:
            if (kind is None or part.kind == kind) and found.needs(part):
                try:
                    found.add(part, self.pieces(part))
                except (KeyError, RuntimeError) as error:
                    raise DamagedCommit(f"{self.url}/{part.file} does not hold what it should: {error}") from None
        if missing := found.missing():
            raise DamagedCommit(f"{self.url}: its parts do not hold all of {missing}; use another commit")
        return found.tensors()

    def pieces(self, part: Part) -> dict[str, Tensor]:
        """The tensors, or stretches of them, that lie in one part, by name. Raises DamagedCommit naming the file."""
        data = _read(self.store, f"{self.name}/{part.file}", part.sha256)
        try:
            return load(data)
        except SafetensorError as error:
            raise DamagedCommit(f"{self.url}/{part.file} holds no tensors: {error}") from None


class _Assembly:
    """Stretches put together from the pieces that lie in parts."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> None:
        self._shapes, self._layout = shapes, layout
        self._found: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}
        self._complete: dict[str, int] = {}
        """how many elements a tensor should have in the end, by its path"""

    def _wanted(self, name: str, shape: tuple[int, ...]) -> Stretch:
        return Stretch(shape, 0, prod(shape)) if self._layout is None else self._layout[name]

    def needs(self, part: Part) -> bool:
        """Whether a part may hold anything that is wanted: all wholes may."""
        needed = len(part.stretches) < part.tensors
        for name, (start, length) in part.stretches.items():
            wanted = self._wanted(name, self._shapes.get(name, ()))
            needed |= start < wanted.start + wanted.length and wanted.start < start + length
            self._complete[f"{part.kind}/{name}"] = wanted.length
        return needed

    def add(self, part: Part, pieces: Mapping[str, Tensor]) -> None:
        """Take what is wanted out of a part. Raises KeyError or RuntimeError if it does not fit the manifest."""
        for name, piece in pieces.items():
            path, start = f"{part.kind}/{name}", part.stretches.get(name, (0, 0))[0]
            shape = self._shapes[name] if name in part.stretches else tuple(piece.shape)
            if start < 0 or start + piece.numel() > prod(shape):
                raise KeyError(f"{name} reaches beyond its shape {shape}")
            wanted = self._wanted(name, shape)
            if self._layout is None and piece.shape == shape:
                self._found[path], self._filled[path] = piece, piece.numel()
                continue
            self._complete[path] = wanted.length
            own = self._found.setdefault(path, torch.empty(wanted.length, dtype=piece.dtype))
            first, end = max(start, wanted.start), min(start + piece.numel(), wanted.start + wanted.length)
            if first < end:
                own[first - wanted.start : end - wanted.start] = piece.view(-1)[first - start : end - start]
                self._filled[path] = self._filled.get(path, 0) + end - first

    def missing(self) -> str | None:
        """A tensor that is not complete, if there is one."""
        return next((path for path, size in self._complete.items() if self._filled.get(path, 0) != size), None)

    def tensors(self) -> dict[str, Tensor]:
        """What was found, by `kind/name`."""
        if self._layout is not None:
            return {path: torch.empty(0) for path in self._complete} | self._found
        names = {path: path.partition("/")[2] for path in self._found}
        return {path: own.view(self._shapes.get(names[path], own.shape)) for path, own in self._found.items()}


class Commits:
    """The commits of one run in one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._manifests: dict[str, Manifest | None] = {}

    def _sets(self) -> dict[str, set[str]]:
        """Objects of every set, complete or not, by set name."""
        sets: dict[str, set[str]] = {}
        for path in self.store.sizes():
            name, _, file = path.partition("/")
            if _SET.match(name) and file:
                sets.setdefault(name, set()).add(file)
        return sets

    def names(self) -> list[str]:
        """Complete commits, oldest first."""
        return sorted(name for name, files in self._sets().items() if _complete(files))

    def remove_after(self, step: int) -> None:
        """Remove complete commits of later steps, the newest first."""
        for name in reversed(self.names()):
            if _step(name) > step:
                self._remove(name)

    def newest_until(self, step: int) -> int | None:
        """The step of the newest complete commit up to this step."""
        return max((at for name in self.names() if (at := _step(name)) <= step), default=None)

    def claim_life(self, who: str) -> int:
        """The number of a new life, one more than any before it, taken by at most one run.

        Names of commits hold it, so two lives never write the same objects. Raises StoreError if another run took it.
        """
        taken = [int(match[1]) for path in self.store.sizes() if (match := _LIFE.match(path))]
        life = max([*taken, *(_life(name) for name in self._sets())], default=0) + 1
        claim = json.dumps({"who": who, "time": time.time(), "token": secrets.token_hex(8)}).encode()
        if not self.store.put_new(_claim(life), claim):
            raise StoreError(
                f"another run started in {self.store.url} at this moment; give each run its own checkpoint.to"
            )
        return life

    def open(self, name: str) -> Commit:
        """Read and verify a commit's manifest. Raises DamagedCommit or StoreError."""
        try:
            seal = self.store.get(f"{name}/COMMIT")
            digest = json.loads(seal)["manifest_sha256"]
            if seal != _seal(digest):
                raise DamagedCommit(f"{self.store.url}/{name}/COMMIT is damaged; use another commit")
            data = _read(self.store, f"{name}/manifest.json", digest)
            return Commit(self.store, name, Manifest.model_validate_json(data))
        except FileNotFoundError:
            raise StoreError(
                f"{self.store.url}/{name} is not a complete commit; complete ones: {self.names()[-5:]}"
            ) from None
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            file, where = "COMMIT", str(error)
            if isinstance(error, ValidationError):
                file, where = "manifest.json", ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedCommit(f"{self.store.url}/{name}/{file} is damaged ({where!r}); use another commit") from None

    def begin(
        self,
        spec: ModelSpec,
        state: RunState,
        recipe: dict[str, Any],
        tensors: Mapping[str, Tensor],
        world: World,
        layout: Layout | None = None,
        policy: CheckpointConfig | None = None,
        reason: str = "interval",
        scores: Mapping[str, float] | None = None,
    ) -> Writing:
        """Begin a commit of `tensors` as they are now; every rank calls this, and then leads its Writing to the end.

        Without `layout` every rank has the same whole tensors and writes its share of them; with it, each writes all of
        the stretches it has. What `policy` does not keep is removed once this commit is complete.
        """
        own = dict(tensors) if layout else _share(tensors, world)

        name = f"step-{state.step:012d}-life-{state.life:04d}"
        starts = {path: stretch.start for path, stretch in (layout or {}).items()}
        shapes = {path: stretch.shape for path, stretch in (layout or {}).items()}

        def complete(parts: Sequence[Part]) -> None:
            manifest = Manifest(
                spec=spec,
                state=state,
                recipe=recipe,
                reason=reason,
                scores=dict(scores or {}),
                shapes=shapes,
                parts=tuple(parts),
            )
            self.seal(name, manifest)
            if policy is not None:
                self.retain(policy, state.life)
                self.sweep_uploads(state.life)

        return Writing(self.store, name, own, starts, world, complete, lambda: self._discard(name))

    def write(
        self, spec: ModelSpec, state: RunState, recipe: dict[str, Any], tensors: Mapping[str, Tensor], world: World
    ) -> str:
        """Commit a snapshot and return its name; every rank calls this with the same tensors and writes its share.

        Raises StoreError on every rank if any rank failed; what was written is then removed and was never visible.
        """
        writing = self.begin(spec, state, recipe, tensors, world)
        writing.finish()
        return writing.name

    def seal(self, name: str, manifest: Manifest) -> None:
        """Write the manifest and, when every part is there at its size, the COMMIT object."""
        data = manifest.model_dump_json(indent=1).encode()
        self.store.put(f"{name}/manifest.json", data)
        there = self.store.sizes(name)
        needed = {part.file: part.bytes for part in manifest.parts} | {"manifest.json": len(data)}
        short = next((file for file, size in needed.items() if there.get(f"{name}/{file}") != size), None)
        self._check_life(manifest.state.life)
        if short:
            raise StoreError(
                f"store {self.store.url}: {short} of {name} is missing or short right after it was written"
            )
        if not self.store.put_new(f"{name}/COMMIT", _seal(hashlib.sha256(data).hexdigest())):
            raise taken(self.store, name)

    def _check_life(self, life: int) -> None:
        """Raise StoreError if a later run has claimed this place: lives have no gaps."""
        try:
            claim = self.store.get(_claim(life + 1))
        except FileNotFoundError:
            return
        try:
            who = str(json.loads(claim)["who"])
        except (ValueError, KeyError, TypeError):
            who = "a run"
        raise StoreError(
            f"another run ({who!r}) took over {self.store.url}, and this one is refused; "
            f"stop it, or give each run its own checkpoint.to"
        )

    def retain(self, policy: CheckpointConfig, life: int) -> None:
        """Remove the commits that `policy` does not keep, and what `life` and those before it left unfinished.

        None of this life may be under way.
        """
        sets = self._sets()
        complete = sorted(name for name, files in sets.items() if _complete(files))
        kept = self._kept(complete, policy)
        for name in sets:
            unfinished = name not in complete and _life(name) <= life
            if unfinished or (name in complete and name not in kept):
                self._remove(name)
                self._manifests.pop(name, None)

    def sweep_uploads(self, life: int) -> None:
        """Abort multipart uploads that a kill left half way: those of lives before `life`, and those of a day ago."""
        limit = datetime.now(UTC) - _STALE
        for (path, upload), begun in self.store.uploads().items():
            name = path.partition("/")[0]
            if _SET.match(name) and (_life(name) < life or begun < limit):
                self.store.abort(path, upload)

    def _kept(self, complete: Sequence[str], policy: CheckpointConfig) -> set[str]:
        """Which complete commits, oldest first, stay. Whatever was removed before, the answer is the same."""
        known = {name: manifest for name in complete if (manifest := self._manifest(name))}
        kept = {*complete[-policy.keep :], *(name for name, manifest in known.items() if manifest.reason == "growth")}
        if policy.keep_every:
            first: dict[int, str] = {}
            for name, manifest in known.items():
                first.setdefault(manifest.state.samples // policy.keep_every, name)
            kept |= {name for number, name in first.items() if number > 0}
        scored = [name for name, manifest in known.items() if policy.keep_best in manifest.scores]
        if policy.keep_best and scored:
            kept.add(max(scored, key=lambda name: (known[name].scores[str(policy.keep_best)], name)))
        return kept

    def _manifest(self, name: str) -> Manifest | None:
        """A commit's manifest, read once; None if it is damaged: there is nothing in it to keep."""
        if name not in self._manifests:
            try:
                self._manifests[name] = self.open(name).manifest
            except DamagedCommit:
                self._manifests[name] = None
        return self._manifests[name]

    def _discard(self, name: str) -> None:
        """Remove a set unless it is complete."""
        if not _complete(self._sets().get(name, ())):
            self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a set, its manifest first: from then on no reader sees it, and no writer can complete it."""
        files = sorted(self._sets().get(name, ()), key=lambda file: (file != "manifest.json", file != "COMMIT"))
        self.store.delete(f"{name}/{file}" for file in files)
        self.store.prune(name)


def find_commit(url: str) -> Commit:
    """A commit by its own URL, or the newest one of a run folder or of a folder of commits. Raises StoreError."""
    parent, _, last = url.rstrip("/").rpartition("/")
    if _SET.match(last):
        return Commits(Store(parent or ".")).open(last)
    for place in (url.rstrip("/"), f"{url.rstrip('/')}/commits"):
        commits = Commits(Store(place))
        if names := commits.names():
            return commits.open(names[-1])
    raise StoreError(
        f"there is no commit at {url} nor in its folder commits/; give a commit, or the --out folder of a run"
    )


def _complete(files: Collection[str]) -> bool:
    return "COMMIT" in files and "manifest.json" in files


def _seal(digest: str) -> bytes:
    """The COMMIT object for a manifest; it has a checksum of its own, so that a damaged one is told from the other."""
    return json.dumps({"manifest_sha256": digest, "check": hashlib.sha256(digest.encode()).hexdigest()[:16]}).encode()


def _claim(life: int) -> str:
    return f"life-{life:04d}.json"


def _step(name: str) -> int:
    match = _SET.match(name)
    assert match
    return int(match[1])


def _life(name: str) -> int:
    match = _SET.match(name)
    assert match
    return int(match[2])


def _read(store: Store, name: str, sha256: str) -> bytes:
    """An object whose checksum is known."""
    try:
        data = store.get(name)
    except FileNotFoundError:
        raise DamagedCommit(f"{store.url}/{name} is missing; use another commit") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedCommit(f"{store.url}/{name} is damaged: its checksum is not the committed one; use another commit")
    return data


def _share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors this rank writes: each goes to the rank with the least so far, largest first."""
    loads = [0] * world.size
    mine: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = loads.index(min(loads))
        loads[rank] += tensors[name].nbytes
        if rank == world.rank:
            mine[name] = tensors[name]
    return mine
