"""Commits: whole snapshots in a store, all or nothing.

A commit is a set of objects under `step-N-life-L/`: parts with the tensors, a manifest that lists them with sizes and
checksums, and last of all a small COMMIT object that holds the manifest's checksum. Readers only look at sets that have
one, so a writer killed anywhere leaves nothing a reader could see. Nothing in a commit is code.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..models.spec import ModelSpec
from .state import RunState
from .store import Store, StoreError
from .world import World

PART_BYTES = 256 << 20
"""largest part: what a writer or reader holds beside the tensors themselves"""
_SET = re.compile(r"^step-(\d{12})-life-(\d{4})$")
_LIFE = re.compile(r"^life-(\d{4})\.json$")
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where, how often and how long commits are kept. A run always commits before growth and at its end."""

    to: str | None = Field(None, description="any fsspec URL; left out: the folder commits/ of the run")
    every: tuple[int | str, ...] = Field(
        ("2min",), strict=False, description="2min, 30s, 1h, a number of samples such as 10_000, or a list of these"
    )
    keep: int = Field(3, gt=0, description="newest commits to keep")

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


class Part(BaseModel, frozen=True, extra="forbid", strict=True):
    """One object with tensors of one kind."""

    # The pattern is a guard: a manifest cannot ask for anything outside its own set.
    file: str = Field(pattern=r"^[a-z_]{1,32}-\d{5}-\d{5}\.safetensors$")
    kind: str
    bytes: int
    sha256: str
    tensors: int


class Manifest(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a commit holds."""

    format: int = 1
    spec: ModelSpec
    state: RunState
    recipe: dict[str, Any]
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

    def tensors(self, kind: str | None = None) -> dict[str, Tensor]:
        """All tensors by `kind/name`, or those of one kind. Raises DamagedCommit naming the file."""
        found: dict[str, Tensor] = {}
        for part in self.manifest.parts:
            if kind is None or part.kind == kind:
                data = _read(self.store, f"{self.name}/{part.file}", part.sha256)
                try:
                    found |= {f"{part.kind}/{name}": tensor for name, tensor in load(data).items()}
                except SafetensorError as error:
                    raise DamagedCommit(f"{self.url}/{part.file} holds no tensors: {error}") from None
        return found


class Commits:
    """The commits of one run in one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

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
        return sorted(name for name, files in self._sets().items() if "COMMIT" in files)

    def claim_life(self, who: str) -> int:
        """The number of a new life, one more than any before it, taken by at most one run.

        Names of commits hold it, so two lives never write the same objects. Raises StoreError if another run took it.
        """
        taken = [int(match[1]) for path in self.store.sizes() if (match := _LIFE.match(path))]
        life = max([*taken, *(_life(name) for name in self._sets())], default=0) + 1
        claim = json.dumps({"who": who, "time": time.time(), "token": secrets.token_hex(8)}).encode()
        if not self.store.put_new(f"life-{life:04d}.json", claim):
            raise StoreError(
                f"another run started in {self.store.url} at this moment; give each run its own checkpoint.to"
            )
        return life

    def open(self, name: str) -> Commit:
        """Read and verify a commit's manifest. Raises DamagedCommit or StoreError."""
        try:
            seal = json.loads(self.store.get(f"{name}/COMMIT"))
            data = _read(self.store, f"{name}/manifest.json", seal["manifest_sha256"])
            return Commit(self.store, name, Manifest.model_validate_json(data))
        except FileNotFoundError:
            raise StoreError(
                f"{self.store.url}/{name} is not a complete commit; complete ones: {self.names()[-5:]}"
            ) from None
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
            raise DamagedCommit(
                f"{self.store.url}/{name}: manifest or COMMIT is damaged ({where}); use another commit"
            ) from None

    def write(
        self, spec: ModelSpec, state: RunState, recipe: dict[str, Any], tensors: Mapping[str, Tensor], world: World
    ) -> str:
        """Commit a snapshot and return its name; every rank calls this with the same tensors and writes its share.

        Raises StoreError on every rank if any rank failed; what was written is then removed and was never visible.
        """
        name = f"step-{state.step:012d}-life-{state.life:04d}"
        taken = world.objects(world.is_first and name in self.names())[0]
        if taken:
            raise StoreError(
                f"{self.store.url}/{name} was committed by another run; give each run its own checkpoint.to"
            )
        mine, failure = [], None
        try:
            mine = [part.model_dump() for part in self._write_parts(name, tensors, world)]
        except StoreError as error:
            failure = str(error)
        reports = world.objects({"parts": mine, "failure": failure})
        failure = next((r["failure"] for r in reports if r["failure"]), None)
        if failure is None and world.is_first:
            parts = tuple(Part.model_validate(p) for r in reports for p in r["parts"])
            try:
                self._seal(name, Manifest(spec=spec, state=state, recipe=recipe, parts=parts))
            except StoreError as error:
                failure = str(error)
        failure = world.objects(failure)[0] or failure
        if failure:
            if world.is_first:
                self._remove(name)
            raise StoreError(failure)
        return name

    def _write_parts(self, name: str, tensors: Mapping[str, Tensor], world: World) -> list[Part]:
        """Write this rank's share of the tensors, kind by kind."""
        parts: list[Part] = []
        for (kind, number), chunk in _chunks(_share(tensors, world)).items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in chunk.items()})
            file = f"{kind}-{world.rank:05d}-{number:05d}.safetensors"
            self.store.put(f"{name}/{file}", data)
            digest = hashlib.sha256(data).hexdigest()
            parts.append(Part(file=file, kind=kind, bytes=len(data), sha256=digest, tensors=len(chunk)))
        return parts

    def _seal(self, name: str, manifest: Manifest) -> None:
        """Write the manifest and, when every part is there at its size, the COMMIT object."""
        data = manifest.model_dump_json(indent=1).encode()
        self.store.put(f"{name}/manifest.json", data)
        there = self.store.sizes(name)
        short = [p.file for p in manifest.parts if there.get(f"{name}/{p.file}") != p.bytes]
        if short:
            raise StoreError(
                f"store {self.store.url}: {short[0]} of {name} is missing or short right after it was written"
            )
        seal = json.dumps({"manifest_sha256": hashlib.sha256(data).hexdigest()}).encode()
        if not self.store.put_new(f"{name}/COMMIT", seal):
            raise StoreError(
                f"{self.store.url}/{name} was committed by another run; give each run its own checkpoint.to"
            )

    def retain(self, keep: int, life: int) -> None:
        """Remove all but the `keep` newest commits, and what earlier lives left unfinished."""
        sets = self._sets()
        complete = sorted(name for name, files in sets.items() if "COMMIT" in files)
        for name, files in sets.items():
            outdated = name in complete[:-keep]
            unfinished = "COMMIT" not in files and _life(name) < life
            if outdated or unfinished:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a set, its COMMIT first: from then on no reader sees it."""
        files = sorted(self._sets().get(name, ()), key=lambda file: file != "COMMIT")
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


def _chunks(tensors: Mapping[str, Tensor]) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Tensors of one kind together, in chunks of at most PART_BYTES (or one tensor)."""
    chunks: dict[tuple[str, int], dict[str, Tensor]] = {}
    filled: dict[str, list[int]] = {}
    for path in sorted(tensors):
        kind, _, name = path.partition("/")
        at = filled.setdefault(kind, [0, 0])
        if at[1] and at[1] + tensors[path].nbytes > PART_BYTES:
            at[0], at[1] = at[0] + 1, 0
        at[1] += tensors[path].nbytes
        chunks.setdefault((kind, at[0]), {})[name] = tensors[path]
    return chunks
