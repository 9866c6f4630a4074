"""Axes: which dimension of which tensor runs along the stream, the heads or the hidden units of which tower.

A layer writes one axis and reads another, so an axis that gets longer touches every tensor in at most one dimension,
and there it is either written (the tensor makes its channels) or read (the tensor sums over them). That is all that a
growth operator has to know about the model. The captioner's blocks run along the text tower's axes.
"""

from __future__ import annotations

from typing import NamedTuple

from ..parts import part_of, stream_of
from ..spec import ModelSpec


class Use(NamedTuple):
    """What a tensor does with an axis."""

    axis: str
    """`image.width`, `image.heads`, `image.mlp_width`, and the same of every other tower of the spec"""
    dim: int
    """the dimension that runs along it"""
    reads: bool
    """whether it sums over that dimension; otherwise it writes it"""
    norm: bool = False
    """whether the tensor is a norm's, whose statistics run over the whole axis"""
    padded: bool = True
    """whether new channels that are not copies get the mean of the written ones; behind a norm they get zero"""


# By module: the axis written, and the axis read; None: not an axis of a tower.
_LAYERS: dict[str, tuple[str | None, str | None]] = {
    "patches": ("width", None),
    "frames": ("width", None),
    "query": ("heads", "width"),
    "key": ("heads", "width"),
    "value": ("heads", "width"),
    "out": ("width", "heads"),
    "gate": ("mlp_width", "width"),
    "up": ("mlp_width", "width"),
    "down": ("width", "mlp_width"),
    "router": (None, "width"),
    "projection": (None, "width"),
    "output": (None, "width"),
}
# One number per channel of the stream. A norm divides by statistics that copied channels do not change.
_NORMS = {"attention_norm", "cross_norm", "mlp_norm", "cross_mlp_norm", "pre_norm", "norm"}
# Layer scale: one gain per channel on what a block writes into the stream.
_GAINS = {"attention_scale", "cross_scale", "mlp_scale", "cross_mlp_scale"}
# Lookup tables whose rows are added to the stream.
_TABLES = {"token_embedding", "position_embedding", "class_embedding"}
# The maps between a tower's stream, behind its last norm, and that of the shared blocks.
_BRIDGES = {f"{tower}_{way}": f"{tower}.width" for tower in ("image", "text") for way in ("in", "out")}
# The captioner's states are multiplied with the token table, whose k copied channels would count them k times. That
# table is also an input and must not be divided, so the factor 1/k goes to the norm that makes the states. An output
# table of the captioner's own reads them like any map.
_OUTPUT_NORM = "captioner.transformer.norm"


def uses(name: str, spec: ModelSpec | None = None) -> list[Use]:
    """The axes that the dimensions of tensor `name` run along; without a `spec`, of a model with all defaults."""
    place, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
    part, tower = part_of(name), stream_of(name)
    path = place.removeprefix(part).removeprefix(".").split(".")
    module = path[-1]
    if path[0] == "pool" or (part == "image" and module == "projection" and _pooled(spec)):
        return _pooler(module, path, kind)
    if tower == "shared" and module in _BRIDGES:
        own, other = Use("shared.width", 0, reads=False), _BRIDGES[module]
        if module.endswith("in"):
            return [own, Use(other, 1, reads=True)] if kind == "weight" else [own]
        out = Use(other, 0, reads=False, padded=False)
        return [out, Use("shared.width", 1, reads=True)] if kind == "weight" else [out]
    if module == "memory_norm":
        return [] if _pooled(spec) else [Use("image.width", 0, reads=False, norm=True)]
    if module in _NORMS:
        tied = spec is None or spec.captioner is None or spec.captioner.tied_embeddings
        return [Use(f"{tower}.width", 0, reads=place == _OUTPUT_NORM and tied, norm=True)]
    if module in _GAINS:
        return [Use(f"{tower}.width", 0, reads=False)]
    if module in _TABLES:
        return [Use(f"{tower}.width", 1, reads=False)]
    written, read = _LAYERS.get(module, (None, None))
    found = [Use(f"{tower}.{written}", 0, reads=False)] if written else []
    if read and kind == "weight":
        memory = "cross" in path and module in ("key", "value")
        if not (memory and _pooled(spec)):
            found.append(Use(f"{'image' if memory else tower}.{read}", 1, reads=True))
    return found


def _pooled(spec: ModelSpec | None) -> bool:
    """Whether the image tower ends in an attention pooler: behind it nothing has the tower's width."""
    return spec is not None and spec.image.pool == "attention"


def _pooler(module: str, path: list[str], kind: str) -> list[Use]:
    """The axes of the attention pooler and of the projection behind it: only what reads the image tower's stream."""
    if module == "memory_norm":
        return [Use("image.width", 0, reads=False, norm=True)]
    reads = path[0] == "pool" and module in ("key", "value") and kind == "weight"
    return [Use("image.width", 1, reads=True)] if reads else []
