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
from .retrieval import distinct, ranks, recalls

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
        raise ValueError(
            "the two models could not use the same samples of the evaluation set; repair those that "
            "`treering data lint` names"
        )
    fine_t = new_texts_te.isfinite().all(1) & old_texts_to.isfinite().all(1)
    if int(fine_t.sum()) <= _HELD_OUT:
        raise ValueError(
            "nearly all embeddings of the texts are not finite: a model has diverged; compare an earlier commit of it"
        )
    found = text_map(new_texts_te[fine_t], old_texts_to[fine_t])
    mapped = {"new_on_old": (_unit(new.images @ found), _unit(new.texts @ found))}
    if old.images.shape[1] == new.images.shape[1]:
        mapped["unmapped_on_old"] = (new.images, new.texts)
    equal = distinct(old.captions)

    def matched(images: Tensor, texts: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Recalls, and whether each query's first result is right, by direction."""
        pairs = (texts[equal.first_u], old.owners, equal.number_m)
        of_images, of_texts = ranks(images, *pairs)
        return recalls(images, *pairs), {"image_to_text": of_images < 1, "text_to_image": of_texts < 1}

    scores, right = {}, {}
    for name, each in (("old", old), ("new", new)):
        scores[name], right[name] = matched(each.images, each.texts)
    for name, (images, texts) in mapped.items():
        pictures, captions = matched(images, old.texts), matched(old.images, texts)
        scores[name] = {key: (pictures if key.startswith("image_to") else captions)[0][key] for key in pictures[0]}
        right[name] = {
            "image_to_text": pictures[1]["image_to_text"],
            "text_to_image": captions[1]["text_to_image"],
        }
    flips = {
        f"{name}/{way}": compare(right["old"][way], right[name][way]).json()
        for name in ("new", "new_on_old")
        for way in right[name]
    }
    return Compatibility(scores, flips)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
