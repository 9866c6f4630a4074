"""open_clip itself, as the truth to compare with."""

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """The package; beside a CPU build of torch, torchvision's wheel misses two schemas that the import needs."""
    if torch.version.cuda is None and torch.version.hip is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        open_clip_needs.append(library)
    import open_clip

    return open_clip


open_clip_needs: list[torch.library.Library] = []
"""kept alive as long as the process"""
