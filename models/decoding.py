"""Autoregressive decoding: the captioner's next-token logits with a cache of keys and values (KV cache).

A new token needs only the keys and values of earlier tokens in each block, and those of the image tokens in
cross-attention, which never change. So a step costs one token, not the whole prefix, and its logits are those of the
uncached forward pass.

Shape suffixes: b captions, d channels, h heads, c channels of a head, n tokens so far, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Model
from .output import TowerOutput
from .transformer import Attention, Transformer, TransformerBlock


class _Cache:
    """Keys and values of one attention of one block, [b, h, n, c]."""

    def __init__(self, key_bhnc: Tensor, value_bhnc: Tensor) -> None:
        self.key_bhnc, self.value_bhnc = key_bhnc, value_bhnc

    def select(self, rows_b: Tensor) -> None:
        self.key_bhnc, self.value_bhnc = self.key_bhnc[rows_b], self.value_bhnc[rows_b]


class Decoder:
    """Captions in the making, one for each picture of `image`, at most `longest` tokens each."""

    def __init__(self, model: Model, image: TowerOutput, longest: int) -> None:
        assert model.captioner is not None
        self.text, self.shared, self.captioner = model.text, model.shared, model.captioner.transformer
        self.table = model.output_table
        self.written = 0
        """tokens so far"""
        rows, device = len(image.pooled), image.pooled.device
        self._own: dict[TransformerBlock, _Cache] = {}
        self._image: dict[TransformerBlock, _Cache] = {}
        shared = [] if self.shared is None else self._blocks(self.shared.transformer)
        for block in (*self._blocks(self.text.transformer), *shared, *self._blocks(self.captioner)):
            inner = block.attention.key.out_features
            shape = (rows, block.attention.heads, longest, inner // block.attention.heads)
            dtype = block.attention.key.weight.dtype
            self._own[block] = _Cache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
        for block in self._blocks(self.captioner):
            tokens_td = block.memory_norm(image.tokens) if block.after else image.tokens
            key, value = block.cross.key(tokens_td), block.cross.value(tokens_td)
            split = [image.layout.grid(x.unflatten(-1, (block.cross.heads, -1))) for x in (key, value)]
            self._image[block] = _Cache(*split)
        # A text tower with CoCa's class token hides what follows a token 0; see towers.py.
        masked = self.text.class_embedding is not None
        self._seen_bn = torch.ones(rows, longest + 1, dtype=torch.bool, device=device) if masked else None

    def next(self, tokens_b: Tensor) -> Tensor:
        """Logits [b, v] of the token after `tokens_b`, the newest of each caption."""
        x_bd = self.text.token_embedding(tokens_b) + self.text.position_embedding[self.written]
        x_bd = self._through(self.text.transformer, x_bd, self._seen_bn)
        if self._seen_bn is not None:
            self._seen_bn[:, self.written + 1] = tokens_b != 0
        if self.shared is not None:
            mixed_bd = self._through(self.shared.transformer, self.shared.text_in(x_bd))
            x_bd = x_bd + self.shared.text_gate * self.shared.text_out(mixed_bd)
        x_bd = self._through(self.captioner, x_bd)
        self.written += 1
        return x_bd @ self.table.T

    def _through(self, transformer: Transformer, x_bd: Tensor, seen_bn: Tensor | None = None) -> Tensor:
        """One token of each caption through all blocks."""
        for block in self._blocks(transformer):
            x_bd = self._step(block, x_bd, seen_bn)
        normed_bd: Tensor = transformer.norm(x_bd)
        return normed_bd

    def select(self, rows_b: Tensor) -> None:
        """Keep these captions, int64 [any number]; one that is named twice is copied."""
        for cache in (*self._own.values(), *self._image.values()):
            cache.select(rows_b)
        if self._seen_bn is not None:
            self._seen_bn = self._seen_bn[rows_b]

    @staticmethod
    def _blocks(transformer: Transformer) -> list[TransformerBlock]:
        return [block for block in transformer.blocks if isinstance(block, TransformerBlock)]

    def _step(self, block: TransformerBlock, x_bd: Tensor, seen_bn: Tensor | None) -> Tensor:
        """One token of each caption through a block."""
        normed_bd, own = block.attention_norm(x_bd), self._own[block]
        for store, project in ((own.key_bhnc, block.attention.key), (own.value_bhnc, block.attention.value)):
            store[:, :, self.written] = project(normed_bd).unflatten(-1, (block.attention.heads, -1))
        x_bd = x_bd + block.scaled("attention", _attended(block.attention, normed_bd, own, self.written + 1, seen_bn))
        if block in self._image and not block.after:
            x_bd = x_bd + block.scaled("cross", self._crossed(block, x_bd))
        out_bd: Tensor = x_bd + block.scaled("mlp", block.mixed(block.mlp_norm(x_bd)).x_td)
        if block in self._image and block.after:
            out_bd = out_bd + block.scaled("cross", self._crossed(block, out_bd))
            out_bd = out_bd + block.scaled("cross_mlp", block.cross_mlp(block.cross_mlp_norm(out_bd)))
        return out_bd

    def _crossed(self, block: TransformerBlock, x_bd: Tensor) -> Tensor:
        """Cross-attention of one token of each caption to the picture."""
        image = self._image[block]
        return _attended(block.cross, block.cross_norm(x_bd), image, image.key_bhnc.shape[2])


def _attended(attention: Attention, x_bd: Tensor, cache: _Cache, tokens: int, seen_bn: Tensor | None = None) -> Tensor:
    """Attention of one token of each caption to the first `tokens` keys of a cache, or those in `seen_bn`."""
    query_bh1c = attention.query(x_bd).unflatten(-1, (attention.heads, 1, -1))
    mixed_bh1c = F.scaled_dot_product_attention(
        query_bh1c,
        cache.key_bhnc[:, :, :tokens],
        cache.value_bhnc[:, :, :tokens],
        attn_mask=None if seen_bn is None else seen_bn[:, None, None, :tokens],
    )
    out_bd: Tensor = attention.out(mixed_bh1c.flatten(1))
    return out_bd
