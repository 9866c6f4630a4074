"""What a forward pass is asked for and what it returns.

Each field of an output says itself which objectives read it and how the outputs of micro-batches become that of the
whole batch (`Merge`). Engines walk this declaration, so a new output is one annotated field here, and no engine knows
its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

from torch import Tensor

from .mlp import Routing
from .transformer import DenseLayout, TokenLayout

Need = Literal["embeddings", "tokens", "caption", "bias", "routing"]
"""What an objective reads of a `ModelOutput`: image and text `.pooled`, image and text tokens in the joint space, the
captioner's states, the learned bias, the routing of mixtures of experts. The temperature is always there."""


class Merge(NamedTuple):
    """The declaration of an output: how the pieces of a batch are put together, and who reads it."""

    how: Literal["concatenate", "sum", "equal"]
    """rows of samples or tokens are concatenated, totals over a piece are summed; equal: the same in every piece"""
    need: str | None = None
    """kept for the objectives that have this need; None: for all"""


class Leaf(NamedTuple):
    """A tensor of an output with its declaration."""

    tensor: Tensor
    merge: Merge


class TowerOutput(NamedTuple):
    """What every tower returns."""

    pooled: Annotated[Tensor, Merge("concatenate", "embeddings")]
    """[b, e]: one embedding per sample, not normalised"""
    tokens: Tensor
    """[t, d]: the stream after the final norm, unless the spec puts that behind the pooling; of pictures the patches,
    or all but the first of the pooler's queries; [0, d] where only the embedding was asked for"""
    layout: TokenLayout
    """which tokens form a sample"""
    scale: Annotated[Tensor | None, Merge("equal")] = None
    """[1]: factor on cosine similarities of another modality; None: the model's own"""
    routing: tuple[Routing, ...] = ()
    """of the tower's mixtures of experts, which `ModelOutput.routing` passes on to objectives"""
    shared_routing: tuple[Routing, ...] = ()
    """of the mixtures in shared blocks, for the tokens of this tower"""


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Extras(NamedTuple):
    """What a forward pass is asked for beside its usual outputs."""

    tokens: bool = False
    """the tokens of both towers in the joint space"""
    parallel_b: Tensor | None = None
    """bool [b]: captions that the captioner sees masked, to predict all of their tokens at once; None: none"""
    patches_bk: Tensor | None = None
    """int64 [b, k]: patches of each picture that the tower sees; None: all"""
    longest: int | None = None
    """no caption has more tokens; None: read from the device, which waits for it"""
    modalities: Mapping[str, Tensor] = _NOTHING
    """samples of other modalities, float [b, frames, features], by name; towers without samples do not run"""


class ModelOutput(NamedTuple):
    """Everything that objectives may read of one forward pass."""

    image: TowerOutput
    text: TowerOutput
    scale: Annotated[Tensor, Merge("equal")]
    """[1]: factor on cosine similarities"""
    bias: Annotated[Tensor | None, Merge("equal", "bias")]
    """[1]: added to scaled similarities by a sigmoid loss, or None if the model has none"""
    caption: Annotated[Tensor | None, Merge("concatenate", "caption")]
    """[t, d]: states of the captioner in the layout of the text, or None without a captioner"""
    routing: Annotated[tuple[Routing, ...], Merge("sum", "routing")] = ()
    """of every mixture of experts, over all tokens of pictures, captions and other modalities that went through it"""
    image_tokens: Annotated[Tensor | None, Merge("concatenate", "tokens")] = None
    """[b, p, e] in the joint space, if asked for"""
    text_tokens: Annotated[Tensor | None, Merge("concatenate", "tokens")] = None
    """[t, e] in the joint space, if asked for"""
    modalities: Mapping[str, TowerOutput] = _NOTHING
    """of the modalities that had samples"""


Output = TypeVar("Output")


def leaves(output: Any, needs: Set[str]) -> dict[str, Leaf]:
    """The declared tensors of an output that objectives with these needs read, by their paths in it."""
    found: dict[str, Leaf] = {}

    def walk(path: str, value: Any, merge: Merge | None) -> None:
        if isinstance(value, Tensor):
            if merge and (merge.need is None or merge.need in needs):
                found[path] = Leaf(value, merge)
            return
        for name, child, own in _children(value):
            walk(f"{path}/{name}", child, own or merge)

    walk("", output, None)
    return found


def with_leaves(output: Output, tensors: Mapping[str, Tensor]) -> Output:
    """An output of the same structure with these tensors at their paths; whatever else it holds is empty."""

    def made(path: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return tensors.get(path, value[:0])
        children = {name: made(f"{path}/{name}", child) for name, child, _ in _children(value)}
        if hasattr(value, "_fields"):
            return type(value)(**children)
        if isinstance(value, Mapping):
            return children
        # A layout is that of a piece, not of the batch.
        return tuple(children.values()) if isinstance(value, tuple) else DenseLayout(0, 0)

    result: Output = made("", output)
    return result


def _children(value: Any) -> Iterator[tuple[str, Any, Merge | None]]:
    """The parts of a structure: name, value and declaration."""
    if hasattr(value, "_fields"):
        yield from ((name, getattr(value, name), merge) for name, merge in _declared(type(value)).items())
    elif isinstance(value, Mapping):
        yield from ((name, child, None) for name, child in value.items())
    elif isinstance(value, tuple):
        yield from ((str(number), child, None) for number, child in enumerate(value))


def _declared(kind: type) -> dict[str, Merge | None]:
    """The declarations of a named tuple's fields."""
    hints = get_type_hints(kind, include_extras=True)
    annotations = {name: getattr(hints[name], "__metadata__", ()) for name in hints}
    return {name: next((m for m in found if isinstance(m, Merge)), None) for name, found in annotations.items()}
