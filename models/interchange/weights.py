"""From open_clip's tensors to Treering's and back: one list of pairs, read in either direction.

Tensors are only split, joined and transposed, so import and export together keep every bit. A pair has the names of
some tensors of theirs (open_clip's) and of some of ours, and the two maps between them: the fused map of queries, keys
and values is split in three, a matrix that they multiply from the right is transposed, and a class token and its
position are two rows of one table here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Model
from ..parts import parts
from ..spec import ModelSpec, TowerSpec
from .errors import InterchangeError
from .wrapped import known_as, unwrapped

Tensors = Mapping[str, Tensor]
_Map = Callable[..., tuple[Tensor, ...]]
# Constants that old checkpoints hold beside the weights.
_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size", "position_ids")


class Pair(NamedTuple):
    """Some tensors of theirs, some of ours, and the maps between them."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    split: _Map
    """theirs -> ours"""
    join: _Map
    """ours -> theirs"""


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def _transposed(matrix: Tensor) -> tuple[Tensor, ...]:
    return (matrix.T,)


_OTHER = "name the architecture that it was trained as, or the right file"
_FEW_BLOCKS = 1000
"""blocks that no file has to hold a tensor for: what it lacks is then named"""


def from_open_clip(spec: ModelSpec, state: Tensors) -> dict[str, Tensor]:
    """Our tensors by name, fp32, from a state dict of open_clip for the architecture of `spec`, whatever it is wrapped
    in (`wrapped.py`).

    Raises InterchangeError that names what is missing, unknown, of another shape, or not finite.
    """
    given, state = state, unwrapped(state).tensors
    blocks = sum(part.depth for part in parts(spec))
    if blocks > max(_FEW_BLOCKS, len(state)):  # before anything is made for each of them
        raise InterchangeError(
            f"these are not weights of that architecture: it has {blocks:,} blocks, and the file {len(state):,} "
            f"tensors; {_OTHER}"
        )
    state = _plain(spec, state)
    pairs = list(_pairs(spec))
    wanted = [name for pair in pairs for name in pair.theirs]
    missing, extra = [n for n in wanted if n not in state], sorted(set(state) - set(wanted))
    if missing or extra:
        lacks = f"lacks {', '.join(missing[:4])}" if missing else f"also has {', '.join(extra[:4])}"
        more = f" and {len(missing or extra) - 4} more" if len(missing or extra) > 4 else ""
        what = f"; it holds {known}" if (known := known_as(given)) else ""
        raise InterchangeError(f"these are not weights of that architecture: the file {lacks}{more}{what}; {_OTHER}")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Model(spec).named_parameters()}
    found: dict[str, Tensor] = {}
    for pair in pairs:
        try:
            split = pair.split(*(_numbers(name, state[name]) for name in pair.theirs))
        except (RuntimeError, IndexError):
            split = ()
        fits = len(split) == len(pair.ours) and all(
            part.shape == shapes[n] for n, part in zip(pair.ours, split, strict=True)
        )
        if not fits:
            sizes = ", ".join(f"{name} {list(state[name].shape)}" for name in pair.theirs)
            raise InterchangeError(f"these are not weights of that architecture: {sizes} has another shape; {_OTHER}")
        found |= {name: part.contiguous() for name, part in zip(pair.ours, split, strict=True)}
    assert found.keys() == shapes.keys()
    return found


def _numbers(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file as fp32. Raises InterchangeError unless it holds floats that are finite."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InterchangeError(f"{name} holds {kind} instead of floats; give weights that are not quantised")
    numbers = tensor.float()
    wrong = int((~numbers.isfinite()).sum())
    if wrong:
        raise InterchangeError(
            f"{name} holds {wrong} numbers of {numbers.numel()} that are NaN or infinite, as a training that diverged "
            f"or an overflow of half precision leaves them; give a checkpoint from before that"
        )
    return numbers


def to_open_clip(spec: ModelSpec, tensors: Tensors) -> dict[str, Tensor]:
    """The state dict of open_clip's model of the same architecture; `spec` must have an equivalent there."""
    found: dict[str, Tensor] = {}
    for pair in _pairs(spec):
        parts = pair.join(*(tensors[name] for name in pair.ours))
        for name, part in zip(pair.theirs, parts, strict=True):
            found[name] = part.clone(memory_format=torch.contiguous_format)
    return found


def _plain(spec: ModelSpec, state: Tensors) -> dict[str, Tensor]:
    """Names as open_clip gives them today: without constants, and the text tower where the model has it."""
    found = {name: t for name, t in state.items() if name.rpartition(".")[2] not in _CONSTANTS}
    custom = _text_prefix(spec) == "text."
    top = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "cls_emb")
    if custom and "token_embedding.weight" in found:
        return {f"text.{name}" if name.startswith(top) else name: t for name, t in found.items()}
    return found if custom else {name.removeprefix("text."): t for name, t in found.items()}


def _text_prefix(spec: ModelSpec) -> str:
    """The prefix of open_clip's text tower: CLIP has it at the top, CoCa and others in a module."""
    return "text." if spec.captioner or spec.text.pool == "class" else ""


def _pairs(spec: ModelSpec) -> Iterator[Pair]:
    """All pairs of a model."""
    yield Pair(("logit_scale",), ("logit_scale",), lambda t: (t.reshape(1),), lambda t: (t.reshape(()),))
    if spec.logit_bias:
        yield Pair(("logit_bias",), ("logit_bias",), lambda t: (t.reshape(1),), lambda t: (t.reshape(()),))
    yield from _image(spec)
    yield from _text(spec)
    if spec.captioner:
        for number in range(spec.captioner.depth):
            ours = f"captioner.transformer.blocks.{number}"
            yield from _block(f"text_decoder.resblocks.{number}", ours, spec.text)
            yield from _cross_block(f"text_decoder.cross_attn.{number}", ours, spec.text)
        yield from _affine("text_decoder.ln_final", "captioner.transformer.norm")
        table = "text.token_embedding" if spec.captioner.tied_embeddings else "captioner.output"
        yield Pair(("text_decoder.text_projection",), (f"{table}.weight",), _transposed, _transposed)


def _image(spec: ModelSpec) -> Iterator[Pair]:
    image, p = spec.image, spec.image.patch
    yield Pair(
        ("visual.conv1.weight",),
        ("image.patches.weight",),
        lambda kernel: (kernel.flatten(1),),
        lambda matrix: (matrix.unflatten(1, (3, p, p)),),
    )
    yield Pair(
        ("visual.class_embedding", "visual.positional_embedding"),
        ("image.class_embedding", "image.position_embedding"),
        lambda token, rows: (torch.stack([token, rows[0]]), rows[1:]),
        lambda pair, rows: (pair[0], torch.cat([pair[1:], rows])),
    )
    if image.pre_norm:
        yield from _affine("visual.ln_pre", "image.pre_norm")
    for number in range(image.depth):
        yield from _block(f"visual.transformer.resblocks.{number}", f"image.transformer.blocks.{number}", image)
    if image.pool == "attention":
        yield from _pooler(spec)
    else:
        yield from _affine("visual.ln_post", "image.norm" if image.norm_after_pool else "image.transformer.norm")
    yield Pair(("visual.proj",), ("image.projection.weight",), _transposed, _transposed)


def _pooler(spec: ModelSpec) -> Iterator[Pair]:
    theirs, ours = "visual.attn_pool", "image.pool"
    yield Pair((f"{theirs}.query",), (f"{ours}.query_embedding",), _same, _same)
    yield from _affine(f"{theirs}.ln_q", f"{ours}.query_norm")
    yield from _affine(f"{theirs}.ln_k", f"{ours}.memory_norm")
    yield from _attention(f"{theirs}.attn", f"{ours}.attention", spec.image.width == spec.embed_dim)
    yield from _affine("visual.ln_post", f"{ours}.norm")


def _text(spec: ModelSpec) -> Iterator[Pair]:
    theirs, text = _text_prefix(spec), spec.text
    yield Pair((f"{theirs}token_embedding.weight",), ("text.token_embedding.weight",), _same, _same)
    positions = f"{theirs}positional_embedding"
    if text.pool == "class":
        yield Pair(
            (f"{theirs}cls_emb", positions),
            ("text.class_embedding", "text.position_embedding"),
            lambda token, rows: (torch.stack([token, rows[-1]]), rows[:-1]),
            lambda pair, rows: (pair[0], torch.cat([rows, pair[1:]])),
        )
    else:
        yield Pair((positions,), ("text.position_embedding",), _same, _same)
    for number in range(text.depth):
        yield from _block(f"{theirs}transformer.resblocks.{number}", f"text.transformer.blocks.{number}", text)
    yield from _affine(f"{theirs}ln_final", "text.norm" if text.pool == "class" else "text.transformer.norm")
    if text.projection_bias:
        yield from _affine(f"{theirs}text_projection", "text.projection")
    else:
        yield Pair((f"{theirs}text_projection",), ("text.projection.weight",), _transposed, _transposed)


def _block(theirs: str, ours: str, tower: TowerSpec) -> Iterator[Pair]:
    """A residual block: attention and MLP, each behind its norm."""
    yield from _affine(f"{theirs}.ln_1", f"{ours}.attention_norm")
    yield from _attention(f"{theirs}.attn", f"{ours}.attention", fused=True)
    yield from _mlp(theirs, f"{ours}.mlp")
    yield from _gains(theirs, ours, ("attention", "mlp"), tower)


def _cross_block(theirs: str, ours: str, tower: TowerSpec) -> Iterator[Pair]:
    """The second half of a decoder's block: attention to the picture, and an MLP."""
    yield from _affine(f"{theirs}.ln_1", f"{ours}.cross_norm")
    yield from _affine(f"{theirs}.ln_1_kv", f"{ours}.memory_norm")
    yield from _attention(f"{theirs}.attn", f"{ours}.cross", fused=True)
    yield from _mlp(theirs, f"{ours}.cross_mlp")
    yield from _gains(theirs, ours, ("cross", "cross_mlp"), tower)


def _mlp(theirs: str, ours: str) -> Iterator[Pair]:
    yield from _affine(f"{theirs}.ln_2", f"{ours}_norm")
    yield from _affine(f"{theirs}.mlp.c_fc", f"{ours}.up")
    yield from _affine(f"{theirs}.mlp.c_proj", f"{ours}.down")


def _gains(theirs: str, ours: str, parts: tuple[str, str], tower: TowerSpec) -> Iterator[Pair]:
    if tower.layer_scale is not None:
        for number, part in enumerate(parts, 1):
            yield Pair((f"{theirs}.ls_{number}.gamma",), (f"{ours}.{part}_scale",), _same, _same)


def _affine(theirs: str, ours: str) -> Iterator[Pair]:
    """A norm, or a linear map that both multiply from the left."""
    for kind in ("weight", "bias"):
        yield Pair((f"{theirs}.{kind}",), (f"{ours}.{kind}",), _same, _same)


def _attention(theirs: str, ours: str, fused: bool) -> Iterator[Pair]:
    """Their queries, keys and values are one tensor if all read streams of one width; their biases always are."""

    def three(kind: str) -> tuple[str, ...]:
        return tuple(f"{ours}.{part}.{kind}" for part in ("query", "key", "value"))

    def cut(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(3)

    def fuse(*parts: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(parts),)

    if fused:
        yield Pair((f"{theirs}.in_proj_weight",), three("weight"), cut, fuse)
    else:
        yield Pair(tuple(f"{theirs}.{part}_proj_weight" for part in "qkv"), three("weight"), _same, _same)
    yield Pair((f"{theirs}.in_proj_bias",), three("bias"), cut, fuse)
    yield from _affine(f"{theirs}.out_proj", f"{ours}.out")
