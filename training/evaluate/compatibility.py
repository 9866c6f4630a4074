"""Whether what was indexed with an older model still serves a newer one.

After XBT (Jang and Lim, arXiv 2405.14715): a small map from the new embeddings to the old ones is learnt from texts
alone, and then used on new queries of either modality against an old gallery, so that an index need not be built anew.
Here the map is linear, without an offset because pictures and texts have different means, and found in closed form.
What a change of models costs single queries is said by flips. Shape suffixes: t texts, n pictures, m captions, e new
channels, o old ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .embed import Embedded
from .reliability import compare
from .retrieval import ranks, recalls

_STRENGTHS = tuple(10.0**power for power in range(-6, 3))
_KEPT_BACK = 5


def text_map(new_te: Tensor, old_to: Tensor) -> Tensor:
    """float [e, o]: the ridge regression from new to old embeddings (unit rows) of the same texts, its strength chosen
    on every fifth text, which is kept back, and then fitted again on all."""
    new_te, old_to = new_te.double(), old_to.double()
    kept = torch.arange(len(new_te)) % _KEPT_BACK == 0

    def missed(strength: float) -> float:
        found = _ridge(new_te[~kept], old_to[~kept], strength)
        return (1 - F.cosine_similarity(new_te[kept] @ found, old_to[kept])).mean().item()

    return _ridge(new_te, old_to, min(_STRENGTHS, key=missed)).to(torch.float32)


def _ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    gram = x.T @ x + strength * len(x) / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ y)


@dataclass(frozen=True)
class Compatibility:
    """Recalls and flips of two models on one set."""

    scores: dict[str, dict[str, float]]
    """recalls by what is asked of what: `old` and `new` of themselves, `new_on_old`: mapped new queries, old gallery;
    `unmapped_on_old`: the same without the map, where both have as many channels"""
    flips: dict[str, dict[str, float]]
    """of `new` and of `new_on_old` against `old`, by direction, at rank one: what `compare` says"""

    def json(self) -> dict[str, Any]:
        """As a plain object."""
        return {"scores": self.scores, "flips": self.flips}


def compatibility(old: Embedded, new: Embedded, old_texts_to: Tensor, new_texts_te: Tensor) -> Compatibility:
    """`old` and `new` are one evaluation set by two models; the texts, also embedded by both, are what is learnt from.

    Raises ValueError if the sets differ.
    """
    if old.numbers != new.numbers or old.captions != new.captions:
        raise ValueError("the two models could not use the same samples of the evaluation set; look at its ledger")
    found = text_map(new_texts_te, old_texts_to)
    mapped = {"new_on_old": (_unit(new.images @ found), _unit(new.texts @ found))}
    if old.images.shape[1] == new.images.shape[1]:
        mapped["unmapped_on_old"] = (new.images, new.texts)
    scores = {name: recalls(each.images, each.texts, each.owners) for name, each in (("old", old), ("new", new))}
    right = {"old": _right(old.images, old.texts, old), "new": _right(new.images, new.texts, new)}
    for name, (images, texts) in mapped.items():
        pictures, captions = recalls(images, old.texts, old.owners), recalls(old.images, texts, old.owners)
        scores[name] = {key: (pictures if key.startswith("image") else captions)[key] for key in pictures}
        right[name] = {
            "image_to_text": _right(images, old.texts, old)["image_to_text"],
            "text_to_image": _right(old.images, texts, old)["text_to_image"],
        }
    flips = {
        f"{name}/{way}": compare(right["old"][way], right[name][way]).json()
        for name in ("new", "new_on_old")
        for way in right[name]
    }
    return Compatibility(scores, flips)


def _right(images: Tensor, texts: Tensor, data: Embedded) -> dict[str, Tensor]:
    """bool [n] and [m]: the queries of each direction that have a right answer first."""
    of_images, of_texts = ranks(images, texts, data.owners)
    return {"image_to_text": of_images < 1, "text_to_image": of_texts < 1}


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
