"""Zero-shot classification: the class whose prompts are nearest to the picture.

Classes with equal names are one class. A score that is not finite is never right.

Shape suffixes: n pictures, c classes, p prompts of a class, e channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.samples.templates import filled
from .retrieval import Distinct, distinct, rank_of


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class, class by class."""
    return [filled(template, name) for name in classes for template in templates]


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
    """int64 [n]: for each picture, the number of wrong classes at least as near as the right one; NEVER as in
    `rank_of`."""
    score_nc = image_ne @ class_ce.T
    right_nc = torch.zeros_like(score_nc, dtype=torch.bool).scatter(1, label_n[:, None], True)
    return rank_of(score_nc, right_nc)


def nearest(image_ne: Tensor, class_ce: Tensor) -> Tensor:
    """int64 [n]: the class that is nearest to each picture; -1 if no score is finite."""
    score_nc = image_ne @ class_ce.T
    finite_nc = score_nc.isfinite()
    return score_nc.masked_fill(~finite_nc, float("-inf")).argmax(1).masked_fill(~finite_nc.any(1), -1)


def merged(names: Sequence[str], label_n: Tensor) -> tuple[list[str], Tensor, Distinct]:
    """The distinct class names, each sample's number among them, and which names are equal."""
    found = distinct(names)
    return [names[i] for i in found.first_u], found.number_m[label_n], found


def label_numbers(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The classes in alphabetical order, and each sample's class number, int64 [n]."""
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([number[name] for name in names])
