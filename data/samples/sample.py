"""What travels from a shard to the model: Record (raw bytes), Sample (decoded), Batch (a rank's share of a step)."""

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

    source: str
    key: str
    image: np.ndarray  # uint8 [H, W, 3]
    captions: tuple[str, ...]
    caption: str  # the chosen one of `captions`
    tokens: list[int]  # of `caption`, START and END included
    labels: dict[str, str]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [d] or [frames, d]
    boxes: SampleBoxes | None = None
    cut: bool = False  # whether the caption is longer than `tokens`

    @property
    def image_id(self) -> int:
        """A signed 64-bit hash of source and key."""
        return _signed(stable_hash("image", self.source, self.key))

    @property
    def caption_id(self) -> int:
        """A signed 64-bit hash of the caption as the tokenizer sees it."""
        return caption_id(self.caption)


def caption_id(caption: str) -> int:
    """A signed 64-bit hash of the cleaned caption: equal for captions that are one text to the model."""
    return _signed(stable_hash("caption", clean_text(caption)))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's b = batch / world pairs of a global batch; rank r holds positions [r b, (r + 1) b) of it."""

    images: torch.Tensor  # uint8 [b, 3, H, W], channels last in memory
    tokens: torch.Tensor  # int64 [T], the captions one after another, at their true lengths
    lengths: torch.Tensor  # int64 [b], tokens of each caption, START and END included; their sum is T
    caption_ids: torch.Tensor  # int64 [b], equal for equal captions
    image_ids: torch.Tensor  # int64 [b], equal for equal samples
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    bad: tuple[LedgerEntry, ...]  # the samples that spares stand in for
    cut: torch.Tensor  # bool [b], captions that are longer than the context and lost their end
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # float32 [b, d] or [b, frames, d], those asked for
    boxes: Boxes | None = None  # None where the recipe asks for none


def collate(samples: Sequence[Sample], bad: Sequence[LedgerEntry] = ()) -> Batch:
    """Stacks pictures (equal sizes) and packs captions at their true lengths."""
    import torch  # 2 s: only what decodes pays it

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
    """The arrays of several samples by column, [b, d] or [b, frames, d]."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
