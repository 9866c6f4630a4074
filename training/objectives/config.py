"""What a recipe's `objectives:` block says."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator


class ContrastiveConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which picture belongs to which caption, over all pairs of the global batch."""

    kind: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="softmax: InfoNCE both ways; sigmoid: SigLIP, needs model.logit_bias"
    )
    weight: float = Field(1.0, ge=0)


class CaptionObjectiveConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Next-token prediction of the caption from the picture (CoCa)."""

    weight: float = Field(2.0, ge=0)


class BalanceConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Equal work for all experts of a mixture (Switch)."""

    weight: float = Field(0.01, ge=0)


class ObjectivesConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The weighted terms of the loss; an objective left out does not run."""

    contrastive: ContrastiveConfig | None = None
    caption: CaptionObjectiveConfig | None = None
    balance: BalanceConfig | None = None

    @model_validator(mode="after")
    def _contrastive_present(self) -> Self:
        if self.contrastive is None:
            raise ValueError(
                "objectives has no contrastive term to train the embeddings; add `contrastive: {weight: 1.0}`"
            )
        return self
