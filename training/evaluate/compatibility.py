"""Whether an index built with an older model can be searched with a newer one (backward compatibility).

After XBT (Jang and Lim, arXiv 2405.14715): a small map from the new embeddings to the old ones is learnt from texts
alone. It is then applied to new queries of either modality against an old gallery, so that the index need not be
rebuilt. Here the map is linear and solved in closed form; it has no offset, because pictures and texts have different
means. Flips count the queries that a change of models breaks or repairs. Shape suffixes: t texts, n pictures,
m captions, e new channels, o old ones.
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
_HELD_OUT = 5  # every fifth text


def text_map(new_te: Tensor, old_to: Tensor) -> Tensor:
    """float [e, o]: the ridge regression from new to old embeddings (unit rows) of the same texts.

    Its strength is chosen on every fifth text, which is held out; the final fit uses all texts.
    """
    new_te, old_to = new_te.double(), old_to.double()
    held_out = torch.arange(len(new_te)) % _HELD_OUT == 0

    def missed(strength: float) -> float:
        found = _ridge(new_te[~held_out], old_to[~held_out], strength)
        return (1 - F.cosine_similarity(new_te[held_out] @ found, old_to[held_out])).mean().item()

    return _ridge(new_te, old_to, min(_STRENGTHS, key=missed)).to(torch.float32)


def _ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    gram = x.T @ x + strength * len(x) / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ y)


@dataclass(frozen=True)
class Compatibility:
    """Recalls and flips of two models on one set."""

    scores: dict[str, dict[str, float]]
    """recalls by queries and gallery: `old`, `new`: both by the same model; `new_on_old`: mapped new queries, old
    gallery;
    `unmapped_on_old`: the same without the map, if both models have the same number of channels"""
    flips: dict[str, dict[str, float]]
    """flips of `new` and `new_on_old` against `old` at rank one, by direction: the result of `compare`"""

    def json(self) -> dict[str, Any]:
        """As a plain object."""
        return {"scores": self.scores, "flips": self.flips}


def compatibility(old: Embedded, new: Embedded, old_texts_to: Tensor, new_texts_te: Tensor) -> Compatibility:
    """Compare two models on one evaluation set, embedded by both as `old` and `new`.

    The map is learnt from `old_texts_to` and `new_texts_te`: embeddings of the same texts by both models. Raises
    ValueError if the two evaluation sets differ.
    """
    if old.numbers != new.numbers or old.captions != new.captions:
        raise ValueError("the two models could not use the same samples of the evaluation set; see its ledger")
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
    """bool [n] and [m] by direction: whether each query's first result is right."""
    of_images, of_texts = ranks(images, texts, data.owners)
    return {"image_to_text": of_images < 1, "text_to_image": of_texts < 1}


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
