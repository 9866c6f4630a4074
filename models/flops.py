"""How much work a model is: parameters and floating-point operations from the spec alone, nothing built.

A multiply and an add count as two operations; a training step costs three forward passes (Kaplan et al., arXiv
2001.08361). Norms, activations and softmax are left out: under 2% at any width used in practice.
"""

from __future__ import annotations

from .spec import ModelSpec, TowerSpec


def _mlp_maps(spec: TowerSpec) -> int:
    """Linear maps of one MLP."""
    return 3 if spec.mlp == "swiglu" else 2


def block_flops(
    spec: TowerSpec, tokens: float, attended: float, memory_tokens: float = 0, memory_width: int = 0
) -> float:
    """One block's forward operations for one sample; `attended` keys are seen by a query on average."""
    inner = spec.attention_width
    mlps, router = (spec.active, spec.experts) if spec.experts > 1 else (1, 0)
    dense = tokens * (4 * spec.width * inner + mlps * _mlp_maps(spec) * spec.width * spec.mlp_width)
    dense += tokens * router * spec.width
    mixing = 2 * tokens * attended * inner
    if memory_tokens:
        dense += tokens * 2 * spec.width * inner + memory_tokens * 2 * memory_width * inner
        mixing += 2 * tokens * memory_tokens * inner
    return 2 * (dense + mixing)


def _last_row(spec: TowerSpec, tokens: float) -> float:
    """Forward operations of a block that works for one token of a sample only: all tokens are keys, one is a query."""
    one = block_flops(spec, 1, tokens)
    return one + 2 * (tokens - 1) * 2 * spec.width * spec.attention_width


def forward_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of one forward pass for one pair whose caption has `text_tokens` tokens on average.

    All towers run; `patches` of the picture are looked at, all if left out. `tokens` says that an objective reads the
    tokens of pictures and captions in the joint space; where nobody reads more of a caption than its embedding, the
    last text block works for one token (`TextTower`), and that of pictures if they have a class token (`ImageTower`).
    """
    image, text, pooler = spec.image, spec.text, spec.image.pool == "attention"
    patches = patches or image.grid**2
    stream = patches + image.class_token
    memory = image.queries - 1 if pooler else patches
    text_tokens = text.context if text.filled else text_tokens
    read = text_tokens + 2 * (text.pool == "class")  # the class token, and the filling it sees
    seen = (text_tokens + 1) / 2
    alone = spec.caption is None and spec.shared is None and not tokens
    whole = text.depth - (alone and not text.filled)
    last = alone and image.pool == "class"
    total = (image.depth - last) * block_flops(image, stream, stream) + last * _last_row(image, stream)
    total += 2 * patches * 3 * image.patch**2 * image.width
    total += whole * block_flops(text, read, (read + 1) / 2 if text.causal else read)
    total += (text.depth - whole) * _last_row(text, read)
    total += 2 * ((spec.embed_dim if pooler else image.width) + text.width) * spec.embed_dim
    if tokens:
        total += 2 * (patches * image.width + text_tokens * text.width) * spec.embed_dim
    if pooler:
        maps = image.queries * spec.embed_dim + stream * image.width
        total += 4 * (maps + image.queries * stream) * spec.embed_dim
    if spec.shared:
        total += spec.shared.depth * (
            block_flops(spec.shared, patches, patches) + block_flops(spec.shared, text_tokens, seen)
        )
        total += 4 * spec.shared.width * (patches * image.width + text_tokens * text.width)
    if spec.caption:
        total += spec.caption.depth * block_flops(text, text_tokens, seen, memory, spec.memory_width)
        total += 2 * (text_tokens - 1) * text.width * text.vocabulary
        if spec.caption.cross == "after":
            total += spec.caption.depth * 2 * text_tokens * _mlp_maps(text) * text.width * text.mlp_width
    for tower in spec.further.values():
        total += tower.depth * block_flops(tower, tower.frames, tower.frames)
        total += 2 * tower.width * (tower.frames * tower.features + spec.embed_dim)
    return total


def parameters(spec: ModelSpec) -> int:
    """Trained numbers of the model, exactly."""
    image, text = spec.image, spec.text
    total = _blocks(image, image.depth) + _blocks(text, text.depth) + 1 + spec.logit_bias
    total += image.width * (3 * image.patch**2 + image.patch_bias + image.grid**2)
    total += 2 * image.width * (image.class_token + image.pre_norm) + 2 * text.width * (text.pool == "class")
    total += text.width * (text.vocabulary + text.context)
    total += spec.embed_dim * (image.width + text.width + text.projection_bias)
    if image.pool == "attention":  # its norm over the stream is in the place of the tower's last
        total += _attention(spec.embed_dim, spec.embed_dim, image.width) + spec.embed_dim * (image.queries + 4)
        total += spec.embed_dim * (spec.embed_dim - image.width)
    if spec.shared:
        total += _blocks(spec.shared, spec.shared.depth) + 2 * (spec.shared.width + 1)
        total += (2 * spec.shared.width + 1) * (image.width + text.width)
    for tower in spec.further.values():
        total += _blocks(tower, tower.depth) + 1
        total += tower.width * (tower.features + 1 + tower.frames + spec.embed_dim)
    if spec.caption:
        total += _blocks(text, spec.caption.depth, spec.memory_width, spec.caption.cross == "after")
        total += 0 if spec.caption.tied else text.vocabulary * text.width
    return total


def _attention(width: int, inner: int, memory_width: int) -> int:
    return inner * (2 * width + 2 * memory_width + 3) + width


def _blocks(tower: TowerSpec, depth: int, memory_width: int | None = None, after: bool = False) -> int:
    """Numbers of `depth` blocks and the norm behind them."""
    norms, maps = 2 * tower.width, _mlp_maps(tower)
    mlp = tower.mlp_width * (maps * tower.width + maps - 1) + tower.width
    block = 2 * norms + _attention(tower.width, tower.attention_width, tower.width) + tower.experts * mlp
    block += tower.experts * tower.width if tower.experts > 1 else 0
    gains = 2
    if memory_width is not None:
        block += norms + _attention(tower.width, tower.attention_width, memory_width)
        gains += 1 + after
    if after:
        assert memory_width is not None
        block += 2 * memory_width + norms + mlp
    block += gains * tower.width if tower.layer_scale is not None else 0
    return depth * block + norms


def training_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of forward and backward for one pair."""
    return 3 * forward_flops(spec, text_tokens, patches, tokens)
