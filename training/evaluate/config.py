"""What a recipe's `eval:` block says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

SuiteName = Literal["retrieval", "zero_shot"]


class EvalConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When and on what the model is evaluated; it always is at the end."""

    every: int | None = Field(None, gt=0, description="samples between two evaluations; left out: only at the end")
    suites: tuple[SuiteName, ...] = Field((), strict=False)
    data: str | None = Field(
        None, description="shards to evaluate on; left out: the held-out split of a samples:// source"
    )
    batch: int = Field(128, gt=0, description="pairs embedded at once by each process")
    templates: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        default_factory=dict,
        description="zero-shot prompts by label, as in {animal: ['a photo of a {}']}; left out: the bare class name",
    )
    writing: Literal["greedy", "beam", "nucleus"] = Field(
        "greedy", description="how the captions of the report are written; beam: 4 wide, nucleus: draws from 90%"
    )
    examples: int = Field(12, ge=0, description="pictures shown in the report with their nearest captions")
