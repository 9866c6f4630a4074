"""What it takes to import open_clip, the truth of many tests and benchmarks, beside a CPU build of torch."""

from __future__ import annotations

import functools

import torch


@functools.cache
def let_open_clip_import() -> torch.library.Library | None:
    """torchvision's wheel beside a CPU build of torch misses two operators; naming them is enough to import it.

    They are named as long as the answer lives: it is kept here.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
