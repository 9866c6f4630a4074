"""From a recipe's `objectives:` block to the terms of the loss."""

from __future__ import annotations

from ...models.spec import ModelSpec
from .balance import Balance
from .base import Objective
from .caption import Caption
from .config import ObjectivesConfig
from .contrastive import Contrastive, SigmoidContrastive


def build_objectives(config: ObjectivesConfig, spec: ModelSpec | None = None) -> list[Objective]:
    """The objectives of a recipe, in a fixed order; with a `spec`, those that a model of it has the parts for."""
    built: list[Objective] = []
    if config.contrastive:
        weight = config.contrastive.weight
        built.append(SigmoidContrastive(weight) if config.contrastive.kind == "sigmoid" else Contrastive(weight))
    if config.caption and (spec is None or spec.caption):
        built.append(Caption(config.caption.weight))
    if config.balance and (spec is None or max(spec.image.experts, spec.text.experts) > 1):
        built.append(Balance(config.balance.weight))
    return built
