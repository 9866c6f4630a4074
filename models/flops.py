"""How much work a model is: parameters and floating-point operations from the spec alone, nothing built.

A multiply and an add count as two operations; a training step costs three forward passes (Kaplan et al., arXiv
2001.08361). Norms, activations and softmax are left out: under 2% at any width used in practice.
"""

from __future__ import annotations

from .spec import ModelSpec, TowerSpec


def _mlp_maps(spec: TowerSpec) -> int:
    """Linear maps of one MLP."""
    return 3 if spec.mlp == "swiglu" else 2


def _block(spec: TowerSpec, tokens: float, attended: float, memory_tokens: float = 0, memory_width: int = 0) -> float:
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
    """Forward operations of a block that works for a sample's last token only: all tokens are keys, one is a query."""
    one = _block(spec, 1, tokens)
    return one + 2 * (tokens - 1) * 2 * spec.width * spec.attention_width


def forward_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of one forward pass for one pair whose caption has `text_tokens` tokens on average.

    All towers run; `patches` of the picture are looked at, all if left out. `tokens` says that an objective reads the
    tokens of pictures and captions in the joint space; where nobody reads more of a caption than its embedding, the
    last text block works for one token (`TextTower`).
    """
    patches = patches or spec.image.grid**2
    seen = (text_tokens + 1) / 2
    total = spec.image.depth * _block(spec.image, patches, patches)
    total += 2 * patches * 3 * spec.image.patch**2 * spec.image.width
    whole = spec.text.depth - (spec.caption is None and spec.shared is None and not tokens)
    total += whole * _block(spec.text, text_tokens, seen)
    total += (spec.text.depth - whole) * _last_row(spec.text, text_tokens)
    total += 2 * (spec.image.width + spec.text.width) * spec.embed_dim
    if tokens:
        total += 2 * (patches * spec.image.width + text_tokens * spec.text.width) * spec.embed_dim
    if spec.shared:
        total += spec.shared.depth * (_block(spec.shared, patches, patches) + _block(spec.shared, text_tokens, seen))
        total += 4 * spec.shared.width * (patches * spec.image.width + text_tokens * spec.text.width)
    if spec.caption:
        total += spec.caption.depth * _block(spec.text, text_tokens, seen, patches, spec.image.width)
        total += 2 * (text_tokens - 1) * spec.text.width * spec.text.vocabulary
    for tower in spec.further.values():
        total += tower.depth * _block(tower, tower.frames, tower.frames)
        total += 2 * tower.width * (tower.frames * tower.features + spec.embed_dim)
    return total


def parameters(spec: ModelSpec) -> int:
    """Trained numbers of the model, exactly."""

    def attention(tower: TowerSpec, memory_width: int) -> int:
        inner = tower.attention_width
        return inner * (2 * tower.width + 2 * memory_width + 3) + tower.width

    def blocks(tower: TowerSpec, depth: int, memory_width: int | None = None) -> int:
        norms = 2 * tower.width
        block = 2 * norms + attention(tower, tower.width)
        maps = _mlp_maps(tower)
        block += tower.experts * (tower.mlp_width * (maps * tower.width + maps - 1) + tower.width)
        block += tower.experts * tower.width if tower.experts > 1 else 0
        if memory_width is not None:
            block += norms + attention(tower, memory_width)
        return depth * block + norms

    image, text = spec.image, spec.text
    total = blocks(image, image.depth) + blocks(text, text.depth) + 1 + spec.logit_bias
    total += image.width * (3 * image.patch**2 + 1 + image.grid**2) + text.width * (text.vocabulary + text.context)
    total += spec.embed_dim * (image.width + text.width)
    if spec.shared:
        total += blocks(spec.shared, spec.shared.depth) + 2 * (spec.shared.width + 1)
        total += (2 * spec.shared.width + 1) * (image.width + text.width)
    for tower in spec.further.values():
        total += blocks(tower, tower.depth) + 1
        total += tower.width * (tower.features + 1 + tower.frames + spec.embed_dim)
    return total + (blocks(text, spec.caption.depth, image.width) if spec.caption else 0)


def training_flops(spec: ModelSpec, text_tokens: float, patches: int | None = None, tokens: bool = False) -> float:
    """Operations of forward and backward for one pair."""
    return 3 * forward_flops(spec, text_tokens, patches, tokens)
