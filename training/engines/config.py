"""What a recipe's `engine:` block says."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from ...data.units import size_in_bytes


class EngineConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the model is spread over processes and in what precision it computes."""

    kind: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp",
        description="ddp: every process holds the whole state; fsdp: each a part of it (FSDP2); deepspeed: ZeRO",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix work in bf16; master weights, losses and sums of gradients stay in fp32"
    )
    micro_batches: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        1,
        description="pieces in which a process takes its part of a batch through the model: with more than one it "
        "needs less memory and a second forward pass, and the gradient is the same; auto: as few as fit the device, "
        "found before the first step of each stage (ddp)",
    )
    activations: float | str | None = Field(
        None,
        description="what blocks may keep for the backward pass: bytes of a process as in 40GB, a share as in 0.5, or "
        "auto for what the device has left; just as many blocks as have to are made again instead; left out: all",
    )
    compile: bool = Field(
        False,
        description="compile blocks with torch.compile, once for all of a shape; the first steps after a start or a "
        "growth take minutes",
    )
    reshard: bool = Field(
        True,
        description="fsdp: drop a block's gathered weights after its forward pass; false: more memory, less traffic",
    )
    shard: int | None = Field(
        None,
        gt=1,
        description="fsdp: neighbouring processes that share one copy of the state, such as those of a node; left out: "
        "all share one",
    )
    zero: Literal[1, 2, 3] | None = Field(
        None,
        description="deepspeed: what is spread. 1: optimizer state, 2: gradients too (left out: 2), 3: weights too",
    )
    offload: bool = Field(False, description="deepspeed: keep masters and moments, and step, on the host")

    @field_validator("activations")
    @classmethod
    def _a_bound(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str) and value != "auto" and size_in_bytes(value) is None:
            raise ValueError(f"{value!r} is no size; write one such as 500MB or 40GB, a share such as 0.5, or auto")
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"{value} is no share; write one from 0 (nothing) to 1 (all), or a size such as 40GB")
        return value

    @property
    def activation_bytes(self) -> int | None:
        """The bound on what blocks keep, where it is a number of bytes."""
        return size_in_bytes(self.activations) if isinstance(self.activations, str) else None

    @property
    def pieces(self) -> int:
        """The pieces that the recipe asks for; 1 where they are found later."""
        return 1 if self.micro_batches == "auto" else self.micro_batches

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO that deepspeed runs."""
        return self.zero or 2

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> Self:
        if self.zero is not None and self.kind != "deepspeed":
            raise ValueError(
                f"engine.zero = {self.zero} is a stage of DeepSpeed's; set engine.kind: deepspeed, or leave it out"
            )
        if self.offload and self.kind != "deepspeed":
            raise ValueError(
                f"engine.offload = true is not there for engine.kind = {self.kind}; set engine.kind: deepspeed, "
                "or leave it out"
            )
        if not self.reshard and self.kind != "fsdp":
            raise ValueError(
                f"engine.reshard = false is for engine.kind = fsdp: {self.kind} gathers no weights; leave it out"
            )
        if self.shard and self.kind != "fsdp":
            raise ValueError(
                f"engine.shard = {self.shard} is for engine.kind = fsdp: {self.kind} spreads the state over all "
                "processes or over none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_goes_its_own_way(self) -> Self:
        if self.kind == "fsdp" and self.micro_batches == "auto":
            raise ValueError(
                "engine.micro_batches = auto cannot be under engine.kind = fsdp: each process tries alone, and fsdp "
                "gathers weights from the others; give a number (`treering plan` counts the memory), or set "
                "engine.activations: auto"
            )
        if self.kind == "deepspeed" and self.micro_batches != 1:
            raise ValueError(
                f"engine.micro_batches = {self.micro_batches} cannot be under engine.kind = deepspeed: it takes one "
                "loss a step, not the gradient at the outputs of each piece; set engine.kind: fsdp, or leave it out"
            )
        if self.kind == "deepspeed" and self.compile:
            raise ValueError(
                "engine.compile = true cannot be under engine.kind = deepspeed: its hooks inside of blocks break them "
                "up; set engine.kind: fsdp, or leave it out"
            )
        return self
