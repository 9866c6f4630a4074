"""Zero-shot classification: the class whose prompts are nearest to the picture.

Shape suffixes: n pictures, c classes, p prompts of a class, e channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class, class by class.

    `{}` (open_clip) or `{c}` (CLIP_benchmark) stands for the class; other braces are plain text.
    """
    return [template.replace("{c}", "{}").replace("{}", name) for name in classes for template in templates]


def class_embeddings(prompt_ce: Tensor, classes: int) -> Tensor:
    """[c * p, e] unit prompts -> [c, e] unit class means (Radford et al., arXiv 2103.00020, section 3.1.4)."""
    return F.normalize(prompt_ce.unflatten(0, (classes, -1)).mean(1), dim=-1)


def weighted_embeddings(prompt_pe: Tensor, class_p: Tensor, weight_p: Tensor, classes: int) -> Tensor:
    """Weighted class means of unit prompts, any number for each class: unit rows [c, e]."""
    sums_ce = prompt_pe.new_zeros(classes, prompt_pe.shape[1]).index_add(0, class_p, prompt_pe * weight_p[:, None])
    return F.normalize(sums_ce, dim=-1)


def accuracy(image_ne: Tensor, class_ce: Tensor, label_n: Tensor) -> float:
    """Fraction of pictures whose nearest class is the right one; a tie with another class counts as wrong."""
    return (rivals(image_ne, class_ce, label_n) == 0).double().mean().item()


def rivals(image_ne: Tensor, class_ce: Tensor, label_n: Tensor) -> Tensor:
    """int64 [n]: for each picture, the number of wrong classes at least as near as the right one."""
    score_nc = image_ne @ class_ce.T
    own_n1 = score_nc.gather(1, label_n[:, None])
    return (score_nc >= own_n1).sum(1) - 1


def label_numbers(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The classes in alphabetical order, and each sample's class number, int64 [n]."""
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([number[name] for name in names])
