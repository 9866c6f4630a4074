"""The data passed from a shard to the model: a decoded `Sample`, and a `Batch`, one rank's part of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..ledger import LedgerEntry
from ..order import stable_hash
from .boxes import Boxes, SampleBoxes, collate_boxes
from .clip_tokenizer import clean_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample."""

    shard: str  # its URL, or the file's path
    key: str
    image: np.ndarray  # uint8 [H, W, 3]
    captions: tuple[str, ...]
    caption: str  # the drawn one of `captions`
    tokens: list[int]  # of `caption`, including START and END
    labels: dict[str, str]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [d] or [frames, d]
    boxes: SampleBoxes | None = None
    equal: str = ""  # captions with the same text here are equal; empty: the caption itself
    cut: bool = False  # whether the caption was truncated to fit the context

    @property
    def image_id(self) -> int:
        """A signed 64-bit hash of shard and key, which is unique in a shard."""
        return _signed(stable_hash("image", self.shard, self.key))

    @property
    def caption_id(self) -> int:
        """A signed 64-bit hash of the cleaned caption, or of the class that it names."""
        return caption_id(self.equal or self.caption)


def caption_id(caption: str) -> int:
    """A signed 64-bit hash of the cleaned caption: equal for captions that the model cannot tell apart."""
    return _signed(stable_hash("caption", clean_text(caption)))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's b = batch / world pairs of a global batch; rank r holds positions [r b, (r + 1) b)."""

    images: torch.Tensor  # uint8 [b, 3, H, W], channels last in memory
    tokens: torch.Tensor  # int64 [T], the captions concatenated, without padding
    lengths: torch.Tensor  # int64 [b], tokens of each caption, including START and END; their sum is T
    caption_ids: torch.Tensor  # int64 [b], equal for equal captions
    image_ids: torch.Tensor  # int64 [b], equal for equal samples
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    bad: tuple[LedgerEntry, ...]  # the bad samples that were replaced
    cut: torch.Tensor  # bool [b], captions truncated to the context
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # float32 [b, d] or [b, frames, d], as configured
    boxes: Boxes | None = None  # None if no source delivers boxes


def collate(samples: Sequence[Sample], bad: Sequence[LedgerEntry] = ()) -> Batch:
    """Stacks pictures (of equal sizes) and concatenates captions without padding."""
    import torch  # takes 2 s, so only decoding imports it

    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2),
        tokens=torch.tensor([i for sample in samples for i in sample.tokens], dtype=torch.int64),
        lengths=torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        caption_ids=torch.tensor([sample.caption_id for sample in samples], dtype=torch.int64),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        keys=tuple(sample.key for sample in samples),
        captions=tuple(sample.caption for sample in samples),
        bad=tuple(bad),
        cut=torch.tensor([sample.cut for sample in samples], dtype=torch.bool),
        columns={name: torch.from_numpy(rows) for name, rows in stack([sample.columns for sample in samples]).items()},
        boxes=collate_boxes(boxes) if (boxes := [s.boxes for s in samples if s.boxes is not None]) else None,
    )


def stack(samples: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    """Stacks the columns of several samples: float32 [b, d] or [b, frames, d] by name."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
