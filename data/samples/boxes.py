"""Boxes with texts: read from a sample's metadata and mapped to the cropped picture.

key.json holds `{"boxes": [{"box": [x0, y0, x1, y1], "text": TEXT}, ...]}`, left and top edge first, in pixels of the
upright picture or as fractions of its sides, as the recipe states. Boxes follow the crop, the flip and the resize, and
are delivered as fractions of the sides of the final picture. A box with too small a part inside the crop is dropped:
its text would no longer be true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import BadSample
from .captions import check_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from .clip_tokenizer import TextTokenizer
    from .decode import Crop

_MOST_BOXES = 1000
_LONGEST_TEXT = 10_000
_NOTHING = 1e-9  # of a picture's area; below it a box counts as empty (rounding)


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of a batch, concatenated: n boxes of b pictures, t tokens."""

    corners: torch.Tensor  # float32 [n, 4]: x0, y0, x1, y1 from 0 to 1, fractions of the picture's sides
    counts: torch.Tensor  # int64 [b], boxes per picture; their sum is n
    tokens: torch.Tensor  # int64 [t], the texts concatenated
    lengths: torch.Tensor  # int64 [n], their sum is t
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SampleBoxes:
    """The boxes of one picture."""

    corners: NDArray[np.float64]  # [n, 4]: x0, y0, x1, y1, fractions of the picture's sides
    texts: tuple[str, ...]
    tokens: tuple[list[int], ...] = ()  # of each text; empty until tokenised

    @classmethod
    def none(cls) -> SampleBoxes:
        """An empty set of boxes."""
        return cls(np.zeros((0, 4)), ())

    def tokenised(self, tokenizer: TextTokenizer, context: int) -> SampleBoxes:
        """The same boxes with the tokens of each text, at most `context` per text."""
        return replace(self, tokens=tuple(tokenizer.encode(text, context) for text in self.texts))


def read_boxes(
    metadata: Mapping[str, Any], unit: Literal["pixels", "relative"], height: int, width: int
) -> SampleBoxes:
    """The boxes in a sample's metadata, clipped to its picture of `height` x `width` pixels; may be empty. Raises
    BadSample."""
    items = metadata.get("boxes", [])
    if not isinstance(items, list) or len(items) > _MOST_BOXES:
        raise BadSample(f"boxes are wrong: they must be a list of at most {_MOST_BOXES:,}")
    corners = np.array([_corners(item) for item in items], np.float64).reshape(-1, 4)
    texts = tuple(_text(item) for item in items)
    if unit == "pixels":
        corners /= (width, height, width, height)
    elif len(corners) and corners.max() > 1.5:  # rounding may exceed 1, but not by half a picture
        raise BadSample("boxes are wrong: the recipe says relative, but one exceeds 1")
    return SampleBoxes(corners.clip(0, 1), texts)


def crop_boxes(boxes: SampleBoxes, crop: Crop, height: int, width: int, min_fraction: float) -> SampleBoxes:
    """The boxes relative to a crop of the picture, clipped to it; those with less than `min_fraction` of their area
    inside, or nothing, are dropped."""
    start = np.array([crop.left / width, crop.top / height])
    size = np.array([crop.width / width, crop.height / height])
    inside = (boxes.corners.reshape(-1, 2, 2) - start) / size
    cut = inside.clip(0, 1)
    whole, left = (np.prod(each[:, 1] - each[:, 0], 1) for each in (inside, cut))
    kept = (left > _NOTHING) & (left >= min_fraction * whole * (1 - _NOTHING))  # with tolerance
    corners = cut[kept].reshape(-1, 4)
    if crop.mirrored:
        corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], 1)
    return SampleBoxes(corners, tuple(text for text, stays in zip(boxes.texts, kept, strict=True) if stays))


def collate_boxes(samples: Sequence[SampleBoxes]) -> Boxes:
    """Concatenates the boxes of several pictures."""
    import torch

    texts = [ids for sample in samples for ids in sample.tokens]
    corners = np.concatenate([sample.corners for sample in samples]).astype(np.float32)
    return Boxes(
        corners=torch.from_numpy(corners),
        counts=torch.tensor([len(sample.texts) for sample in samples], dtype=torch.int64),
        tokens=torch.tensor([i for ids in texts for i in ids], dtype=torch.int64),
        lengths=torch.tensor([len(ids) for ids in texts], dtype=torch.int64),
        texts=tuple(text for sample in samples for text in sample.texts),
    )


def _corners(item: object) -> list[float]:
    box = item.get("box") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        raise BadSample("boxes are wrong: each must be {box: [x0, y0, x1, y1], text}")
    x0, y0, x1, y1 = (float(value) for value in box)
    if not (x0 < x1 and y0 < y1):
        raise BadSample(f"boxes are wrong: [{x0:g}, {y0:g}, {x1:g}, {y1:g}] must have left < right and top < bottom")
    return [x0, y0, x1, y1]


def _is_coordinate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 <= value <= 1e9


def _text(item: dict[str, Any]) -> str:
    text = item.get("text")
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        raise BadSample(f"boxes are wrong: each must have a text of at most {_LONGEST_TEXT:,} characters")
    check_text(text, "a box's text")
    return text.strip()
