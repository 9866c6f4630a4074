"""Axes: which dimension of which tensor runs along the stream, the heads or the hidden units of which tower.

A layer writes one axis and reads another, so an axis that gets longer touches every tensor in at most one dimension,
and there it is either written (the tensor makes its channels) or read (the tensor sums over them). That is all that a
growth operator has to know about the model. The captioner's blocks stand on the text tower's axes.
"""

from __future__ import annotations

from typing import NamedTuple

from ..spec import ModelSpec, part_of


class Use(NamedTuple):
    """What a tensor does with an axis."""

    axis: str
    """`image.width`, `image.heads`, `image.mlp_width`, and the same of `text`, `shared` and further towers"""
    dim: int
    """the dimension that runs along it"""
    reads: bool
    """whether it is summed over there; else it is written"""
    norm: bool = False
    """whether the tensor is a norm's, whose statistics run over the whole axis"""
    padded: bool = True
    """whether padding of the axis is the mean of what is written; behind a norm it is zero"""


# By module: the axis written, and the axis read; None does not grow here.
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
# One vector a channel of the stream. A norm divides by statistics that a stream of copies does not change.
_NORMS = {"attention_norm", "cross_norm", "mlp_norm", "cross_mlp_norm", "pre_norm", "norm"}
# One gain a channel on what a block writes into the stream.
_GAINS = {"attention_scale", "cross_scale", "mlp_scale", "cross_mlp_scale"}
# Rows that are looked up and added to the stream.
_TABLES = {"token_embedding", "position_embedding", "class_embedding"}
# Between a tower's stream, behind its last norm, and the shared blocks'.
_BRIDGES = {f"{tower}_{way}": f"{tower}.width" for tower in ("image", "text") for way in ("in", "out")}
# The captioner's states are summed against the token table, whose copies would count them k times; the token table is
# also an input and stays as it is, so the factor 1/k goes to the norm that makes the states; an output table of its own
# reads them like any map.
_OUTPUT_NORM = "captioner.transformer.norm"


def uses(name: str, spec: ModelSpec | None = None) -> list[Use]:
    """The axes that the dimensions of tensor `name` of a model of `spec` run along; None: one of all defaults."""
    place, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
    part = part_of(name)
    path = place.removeprefix(part).removeprefix(".").split(".")
    tower, module = ("text" if part == "captioner" else part), path[-1]
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
        tied = spec is None or spec.caption is None or spec.caption.tied
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
    """Whether an attention pooler stands at the end of the image tower: behind it nothing has the tower's width."""
    return spec is not None and spec.image.pool == "attention"


def _pooler(module: str, path: list[str], kind: str) -> list[Use]:
    """What the attention pooler, and the projection behind it, have of the image tower's stream."""
    if module == "memory_norm":
        return [Use("image.width", 0, reads=False, norm=True)]
    reads = path[0] == "pool" and module in ("key", "value") and kind == "weight"
    return [Use("image.width", 1, reads=True)] if reads else []
