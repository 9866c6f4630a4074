"""What a recipe's `engine:` block says: one config class for each engine, chosen by `kind`.

Each class has only the options of its engine, and declares as facts what that engine cannot do. The recipe asks for
the facts; nobody else compares kinds.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator

from ...data.units import counted, size_in_bytes


class Shards(NamedTuple):
    """Over how many processes each part of the training state is sharded; 1: every process holds all of it."""

    weights: int
    gradients: int
    optimizer: int


class _Engine(BaseModel, frozen=True, extra="forbid", strict=True):
    """What every engine has."""

    takes_muon: ClassVar[bool] = True
    """whether a process can update whole matrices"""
    measures_objectives: ClassVar[bool] = False
    """whether the gradient of a single objective can be taken: every process holds the whole model"""
    groups_experts: ClassVar[bool] = True
    """whether the experts of a mixture may run as one grouped matrix product"""
    keeps_masters: ClassVar[bool] = False
    """whether the optimizer has master weights beside the model's own"""
    casts_copies: ClassVar[bool] = True
    """whether bf16 keeps a cast copy of all weights (autocast's cache)"""

    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix products in bf16; master weights, losses and gradient sums stay in fp32"
    )
    deterministic: bool = Field(
        False,
        description="repeat every bit on a GPU, where attention, products and sums otherwise differ by rounding from "
        "one run to the next; takes time and, for attention, memory; a CPU always does",
    )
    activation_budget: float | str | None = Field(
        None,
        description="what blocks may keep for the backward pass: bytes per process as in 40GB, a fraction as in 0.5, "
        "or auto for what the device has left; only as many blocks as needed are recomputed (activation "
        "checkpointing); default: keep all activations",
    )

    @field_validator("activation_budget")
    @classmethod
    def _is_a_budget(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str) and value != "auto" and size_in_bytes(value) is None:
            raise ValueError(
                f"{value!r} is not a valid size; write one such as 500MB or 40GB, a fraction such as 0.5, or auto"
            )
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(
                f"{value} is not a fraction; write one from 0 (nothing) to 1 (all), or a size such as 40GB"
            )
        return value

    @property
    def activation_bytes(self) -> int | None:
        """The budget where it is a number of bytes."""
        return size_in_bytes(self.activation_budget) if isinstance(self.activation_budget, str) else None

    @property
    def pieces(self) -> int | None:
        """Pieces in which a process runs its part of a batch through the model; None: as few as fit, to be found."""
        return 1

    @property
    def steps_on_host(self) -> bool:
        """Whether the optimizer's state lies in host memory."""
        return False

    @property
    def recomputes_together(self) -> bool:
        """Whether all ranks must recompute the same blocks, because they fetch the weights for it together."""
        return False

    def shards(self, world: int) -> Shards:
        """How the state is sharded over a world of `world` processes."""
        return Shards(1, 1, 1)

    def check_world(self, world: int) -> None:
        """Raises ValueError if this engine cannot run on `world` processes."""


class _TorchEngine(_Engine, frozen=True, extra="forbid", strict=True):
    """What the engines built on torch's own wrappers have."""

    micro_batches: int = Field(
        1,
        gt=0,
        description="pieces in which a process runs its part of a batch through the model: more than one needs less "
        "memory and a second forward pass, and gives the same gradient",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="compile blocks with torch.compile, once per block shape; the first steps after a start or a "
        "growth take minutes; auto: on a GPU, if there is a compiler and compiled blocks have the same gradients",
    )
    fuse_projections: bool = Field(
        False,
        description="compute queries, keys and values by one matrix product: fewer and larger kernels; commits keep "
        "their three matrices",
    )

    @property
    def pieces(self) -> int | None:
        return self.micro_batches


class DdpConfig(_TorchEngine, frozen=True, extra="forbid", strict=True):
    """torch's DistributedDataParallel: every process holds the whole training state."""

    measures_objectives: ClassVar[bool] = True

    kind: Literal["ddp"] = Field("ddp", description="which engine: ddp (default), fsdp or deepspeed")
    micro_batches: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(  # type: ignore[assignment]
        1,
        description="pieces in which a process runs its part of a batch through the model: more than one needs less "
        "memory and a second forward pass, and gives the same gradient; auto: as few as fit the device, found before "
        "the first step of each stage",
    )

    @property
    def pieces(self) -> int | None:
        return None if self.micro_batches == "auto" else self.micro_batches


class FsdpConfig(_TorchEngine, frozen=True, extra="forbid", strict=True):
    """torch's FSDP2 (`fully_shard`): weights, gradients and optimizer state are sharded over the processes."""

    casts_copies: ClassVar[bool] = False

    kind: Literal["fsdp"] = Field("fsdp", description="which engine")
    reshard_after_forward: bool = Field(
        True, description="drop a block's gathered weights after its forward pass; false: more memory, less traffic"
    )
    shard_group: int | None = Field(
        None,
        gt=1,
        description="processes that share one copy of the state (HSDP), such as those of a node; neighbouring ranks "
        "form a group; default: all processes",
    )

    @field_validator("micro_batches", mode="before")
    @classmethod
    def _are_given(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError(
                "engine.micro_batches = auto is for engine.kind = ddp, where a process can try alone: fsdp gathers "
                "weights from the others; give a number (`treering plan` counts the memory), or set "
                "engine.activation_budget: auto"
            )
        return value

    def shards(self, world: int) -> Shards:
        group = min(self.shard_group or world, world)
        return Shards(group, group, group)

    def check_world(self, world: int) -> None:
        group = self.shard_group
        if group and world > group and world % group:
            raise ValueError(
                f"{counted(world, 'process')} cannot be split into groups of engine.shard_group = {group}; "
                f"start {world - world % group} processes, or set engine.shard_group to a number that divides {world}"
            )


class DeepSpeedConfig(_Engine, frozen=True, extra="forbid", strict=True):
    """DeepSpeed's ZeRO, stages 1 to 3."""

    # It takes one loss a step, not the gradient at the outputs of each piece (so there are no micro-batches), and its
    # hooks inside of blocks break compiled ones up.
    compile: ClassVar[bool | str] = False
    # ZeRO 3 gathers the weights of a map when that map runs.
    fuse_projections: ClassVar[bool] = False
    # A rank holds a run of elements that may begin in the middle of a matrix.
    takes_muon: ClassVar[bool] = False
    groups_experts: ClassVar[bool] = False
    keeps_masters: ClassVar[bool] = True

    kind: Literal["deepspeed"] = Field("deepspeed", description="which engine")
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="what is sharded. 1: optimizer state; 2: gradients too; 3: weights too"
    )
    offload_optimizer: bool = Field(False, description="keep master weights and moments, and step, on the host")

    @property
    def steps_on_host(self) -> bool:
        return self.offload_optimizer

    @property
    def recomputes_together(self) -> bool:
        return self.zero_stage == 3

    def shards(self, world: int) -> Shards:
        return Shards(world if self.zero_stage == 3 else 1, world if self.zero_stage > 1 else 1, world)


def _kind(value: Any) -> Any:
    return value.get("kind", "ddp") if isinstance(value, dict) else getattr(value, "kind", "ddp")


EngineConfig = Annotated[
    Annotated[DdpConfig, Tag("ddp")]
    | Annotated[FsdpConfig, Tag("fsdp")]
    | Annotated[DeepSpeedConfig, Tag("deepspeed")],
    Discriminator(_kind),
]
"""How the model is distributed over processes, and in what precision it computes."""
