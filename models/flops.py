"""The size of a model in parameters and floating-point operations, from its spec alone: nothing is built.

A multiply and an add count as two operations; a training step costs three forward passes (Kaplan et al., arXiv
2001.08361). Norms, activation functions and softmax are left out: under 2% at any width used in practice.
"""

from __future__ import annotations

from .parts import BatchShape, Part, Pass, attention_parameters, parts
from .spec import ModelSpec, TowerSpec


def mlp_maps(tower: TowerSpec) -> int:
    """Linear maps of one MLP."""
    return 3 if tower.mlp == "swiglu" else 2


def forward_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of one forward pass for one pair whose caption has `text_tokens` tokens on average.

    All towers run. The image tower sees `patches` patches of the picture; None: all. `tokens` says that an objective
    reads the tokens of pictures and captions in the joint space. Where only embeddings are read, the last block of a
    tower that pools one token computes only that token.
    """
    batch = BatchShape(1, text_tokens, text_tokens, patches, reads_tokens=tokens)
    total = 0.0
    for part in parts(spec):
        total += 2 * part.products(batch)
        for stream in part.passes(batch):
            total += (part.depth - stream.one_row) * block_flops(part, stream)
            total += _last_block_flops(part, stream) if stream.one_row else 0
    return total


def training_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of forward and backward for one pair; arguments as for `forward_flops`."""
    return 3 * forward_flops(spec, text_tokens, patches, tokens)


def block_flops(part: Part, stream: Pass) -> float:
    """Forward operations of one block of `part` for one sample."""
    tower, tokens = part.tower, stream.tokens
    inner, mlp = tower.attention_width, mlp_maps(tower) * tower.width * tower.mlp_width
    mlps, router = (tower.experts_per_token, tower.experts) if tower.experts > 1 else (1, 0)
    # Query, key, value and output maps, the two products of attention, the MLPs that a token goes through, the router.
    products = tokens * (4 * tower.width * inner + 2 * stream.attended * inner + mlps * mlp + router * tower.width)
    if part.memory_width is not None:
        products += 2 * inner * (tokens * tower.width + stream.memory * part.memory_width + tokens * stream.memory)
    if part.crosses_after:
        products += tokens * mlp
    return 2 * products


def _last_block_flops(part: Part, stream: Pass) -> float:
    """A block that computes one token of each sample: all tokens are keys and values, one is a query."""
    one = block_flops(part, stream._replace(tokens=1, attended=stream.tokens))
    return one + 2 * (stream.tokens - 1) * 2 * part.tower.width * part.tower.attention_width


def parameters(spec: ModelSpec) -> int:
    """Trained numbers of the model, exactly."""
    scale_and_bias = 1 + spec.logit_bias
    return scale_and_bias + sum(part.parameters + _transformer_parameters(part) for part in parts(spec))


def _transformer_parameters(part: Part) -> int:
    """Numbers of the blocks and of the norm behind them."""
    tower, maps = part.tower, mlp_maps(part.tower)
    norm, gains = 2 * tower.width, 2
    mlp = tower.mlp_width * (maps * tower.width + maps - 1) + tower.width
    block = 2 * norm + attention_parameters(tower.width, tower.attention_width, tower.width) + tower.experts * mlp
    block += tower.experts * tower.width if tower.experts > 1 else 0
    if part.memory_width is not None:
        block += norm + attention_parameters(tower.width, tower.attention_width, part.memory_width)
        gains += 1
        if part.crosses_after:
            block += 2 * part.memory_width + norm + mlp
            gains += 1
    block += gains * tower.width if tower.layer_scale is not None else 0
    return part.depth * block + norm
