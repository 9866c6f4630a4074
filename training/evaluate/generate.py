"""Writing captions: greedy decoding with the captioner, all pictures at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.model import Model


@torch.no_grad()
def greedy(model: Model, images: Tensor, start: int, end: int, longest: int) -> list[list[int]]:
    """The most likely next token again and again: ids of each caption without `start` and `end`.

    images: uint8 [b, 3, resolution, resolution]. Every step runs the whole prefix again; captions are short.
    """
    assert model.captioner is not None
    image = model.embed_images(images)
    written = torch.full((len(images), 1), start, device=images.device)
    done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for length in range(1, longest):
        lengths = torch.full((len(images),), length, device=images.device)
        text = model.embed_texts(written.flatten(), lengths)
        states = model.captioner(image, text).unflatten(0, (len(images), length))[:, -1]
        nearest = (states @ model.text.token_embedding.weight.T).argmax(1)
        written = torch.cat([written, nearest.masked_fill(done, end)[:, None]], 1)
        done |= nearest == end
        if bool(done.all()):
            break
    return [[t for t in row[1:] if t != end] for row in written.tolist()]
