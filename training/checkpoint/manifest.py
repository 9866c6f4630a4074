"""One commit: its manifest, and how its parts become tensors again.

The manifest lists every part with its size and checksum. The parts hold tensors by logical name: whole, or in flat
ranges as the engine's ranks held them. Reading assembles them whole or in any other ranges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...data.shards.parallel import Progress, silent
from ...models.spec import ModelSpec
from ..engines.layout import FlatRange, Layout
from ..state import RunState
from .store import Store, StoreError
from .writer import CommitPart

FORMAT = 2
"""version of the commit format; 1 was before release 0.2"""


class Manifest(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a commit holds."""

    format: int = FORMAT
    spec: ModelSpec
    state: RunState
    recipe: dict[str, Any]
    reason: str = "interval"
    scores: dict[str, float] = Field(default_factory=dict)
    """of an evaluation at this step"""
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """the whole shape of parameters that are stored in ranges"""
    parts: tuple[CommitPart, ...] = Field(strict=False)
    run: str = ""
    """id of the run, the same in every claim of its store; empty: before runs had one"""

    def encoded(self) -> bytes:
        """As JSON. Every float comes back as it is, NaN and infinity too, which pydantic would write as null."""
        return json.dumps(self.model_dump(), indent=1).encode()

    @classmethod
    def decoded(cls, data: bytes) -> Manifest:
        """The inverse of `encoded`. Raises ValidationError."""
        return cls.model_validate_json(data)


class DamagedCommit(StoreError):
    """A commit whose bytes are not those that were committed."""


@dataclass(frozen=True)
class Commit:
    """A complete commit, its manifest verified; tensors are verified as they are read."""

    store: Store
    name: str
    manifest: Manifest
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """of the spec's parameters, by name, which the parts are then compared with; None: they are not"""

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{self.store.url}/{self.name}"

    def written(self) -> float | None:
        """Unix time at which it was sealed; None if the store does not record it."""
        return self.store.modified(f"{self.name}/COMMIT")

    def tensors(
        self, kind: str | None = None, layout: Layout | None = None, progress: Progress = silent
    ) -> dict[str, Tensor]:
        """All tensors by `kind/name`, or those of one kind: whole, or the flat ranges that `layout` names.

        Holds at most one part in memory in addition to the result; `progress(done, total)` counts parts. Raises
        DamagedCommit naming the file.
        """
        found = _Assembly(self.manifest.shapes, layout)
        parts = [part for part in self.manifest.parts if (kind is None or part.kind == kind) and found.needs(part)]
        for number, part in enumerate(parts, 1):
            try:
                found.add(part, self.pieces(part))
            except (KeyError, RuntimeError) as error:
                raise DamagedCommit(
                    f"{self.url}/{part.file} does not hold the tensors of the manifest: {error}"
                ) from None
            progress(number, len(parts))
        if missing := found.missing():
            raise DamagedCommit(f"{self.url}: its parts do not hold all of {missing}; use another commit")
        return found.tensors()

    def pieces(self, part: CommitPart) -> dict[str, Tensor]:
        """The tensors, or ranges of tensors, in one part, by name. Raises DamagedCommit naming the file."""
        data = read_verified(self.store, f"{self.name}/{part.file}", part.sha256)
        try:
            found = load(data)
        except SafetensorError as error:
            raise DamagedCommit(f"{self.url}/{part.file} is not a safetensors file: {error}") from None
        for name, tensor in found.items():
            if problem := self._problem(part, name, tensor):
                raise DamagedCommit(f"{self.url}/{part.file}: {part.kind}/{name} {problem}; use another commit")
        if len(found) != part.tensors:
            raise DamagedCommit(f"{self.url}/{part.file} holds {len(found)} tensors instead of {part.tensors}")
        return found

    def _problem(self, part: CommitPart, name: str, tensor: Tensor) -> str | None:
        """Why a tensor of a part cannot be taken."""
        if not tensor.is_floating_point():
            return f"holds {str(tensor.dtype).removeprefix('torch.')} instead of floats"
        if not tensor.isfinite().all():
            return "holds numbers that are NaN or infinite"
        if name in part.ranges:
            fits = tensor.numel() == part.ranges[name][1]
        else:
            fits = self.shapes is None or tuple(tensor.shape) == self.shapes.get(name)
        if not fits:
            return f"has the shape {list(tensor.shape)}, which is not that of the model"
        return None


class _Assembly:
    """Assembles tensors or flat ranges from the pieces in parts."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> None:
        self._shapes, self._layout = shapes, layout
        self._found: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}
        self._complete: dict[str, int] = {}
        """number of elements each tensor must have in the end, by path"""

    def _wanted(self, name: str, shape: tuple[int, ...]) -> FlatRange:
        return FlatRange(shape, 0, prod(shape)) if self._layout is None else self._layout[name]

    def needs(self, part: CommitPart) -> bool:
        """Whether a part may hold anything that is wanted; a part with whole tensors always may."""
        needed = len(part.ranges) < part.tensors
        for name, (start, length) in part.ranges.items():
            wanted = self._wanted(name, self._shapes.get(name, ()))
            needed |= start < wanted.start + wanted.length and wanted.start < start + length
            self._complete[f"{part.kind}/{name}"] = wanted.length
        return needed

    def add(self, part: CommitPart, pieces: Mapping[str, Tensor]) -> None:
        """Copy what is wanted out of a part. Raises KeyError or RuntimeError if it does not match the manifest."""
        for name, piece in pieces.items():
            path, start = f"{part.kind}/{name}", part.ranges.get(name, (0, 0))[0]
            shape = self._shapes[name] if name in part.ranges else tuple(piece.shape)
            if start < 0 or start + piece.numel() > prod(shape):
                raise KeyError(f"{name} reaches beyond its shape {shape}")
            wanted = self._wanted(name, shape)
            if name not in part.ranges and path in self._found:
                raise KeyError(f"{name} is there twice")
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
        """The path of an incomplete tensor, or None."""
        return next((path for path, size in self._complete.items() if self._filled.get(path, 0) != size), None)

    def tensors(self) -> dict[str, Tensor]:
        """The assembled tensors, by `kind/name`."""
        if self._layout is not None:
            return {path: torch.empty(0) for path in self._complete} | self._found
        names = {path: path.partition("/")[2] for path in self._found}
        return {path: own.view(self._shapes.get(names[path], own.shape)) for path, own in self._found.items()}


def read_verified(store: Store, name: str, sha256: str) -> bytes:
    """Read an object and verify its checksum. Raises DamagedCommit naming it."""
    try:
        data = store.get(name)
    except FileNotFoundError:
        raise DamagedCommit(f"{store.url}/{name} is missing; use another commit") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedCommit(f"{store.url}/{name} is damaged: its checksum is not the committed one; use another commit")
    return data
