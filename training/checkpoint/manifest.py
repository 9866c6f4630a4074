"""One commit: its manifest, and the way from its parts back to tensors.

The manifest lists every part with its size and checksum. Tensors lie in the parts by logical name, whole or in
stretches as their engine held them, and are put together whole or in any other stretches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...models.spec import ModelSpec
from ..engines.layout import Layout, Stretch
from ..state import RunState
from .store import Store, StoreError
from .writer import Part

FORMAT = 2
"""of commits: what is in them and what it is called. 1 was before the names of release 0.2."""


class Manifest(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a commit holds."""

    format: int = FORMAT
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
        data = read_verified(self.store, f"{self.name}/{part.file}", part.sha256)
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


def read_verified(store: Store, name: str, sha256: str) -> bytes:
    """An object whose checksum is known. Raises DamagedCommit naming it."""
    try:
        data = store.get(name)
    except FileNotFoundError:
        raise DamagedCommit(f"{store.url}/{name} is missing; use another commit") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedCommit(f"{store.url}/{name} is damaged: its checksum is not the committed one; use another commit")
    return data
