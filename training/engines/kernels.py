"""Chooses the kernels that run a model's blocks on a device, compiled or not. The function of the model is unchanged.

Available kernels depend on shapes, so kernels are prepared whenever a model is built, also after a growth.
"""

from __future__ import annotations

import contextlib
import os

import torch

from ...data.errors import DataError
from ...data.storage.files import cache_folder
from ...models import compiling, mlp, varlen
from ...models.mlp import Experts
from ...models.model import Model
from ...models.transformer import Attention, kernel
from ..state import TrainingError
from .config import EngineConfig


def prepare_kernels(model: Model, config: EngineConfig, device: torch.device) -> dict[str, str]:
    """Set up a model's blocks for a device as the config says; names and weights stay.

    Returns the attention kernel of `pictures` and of `captions`: captions use `varlen`, without padding, or another one
    in a padded grid, with the reason; and on a GPU what runs the `blocks`. Raises TrainingError if blocks are to be
    compiled and cannot be.
    """
    half = config.precision == "bf16" and device.type == "cuda"
    refused = None if half else f"{config.precision} on {device.type}"
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        refused = refused or varlen.kernel_refusal(
            attention.heads, attention.key.out_features // attention.heads, device
        )

    def set_up(some: Model) -> None:
        for module in some.modules():
            if isinstance(module, Attention):
                module.varlen, module.fused = refused is None, config.fuse_projections
            if isinstance(module, Experts) and half and config.groups_experts:
                module.grouped = mlp.grouped_refusal(module.spec, device) is None

    set_up(model)
    image, text, dtype = model.spec.image, model.spec.text, torch.bfloat16 if config.precision == "bf16" else None
    captions = kernel(text, text.context, text.causal, device, dtype)
    found = {
        "pictures": kernel(image, image.grid**2 + image.class_token, False, device, dtype),
        "captions": "varlen" if refused is None else f"{captions}, padded ({refused})",
    }
    return found | _compiled(model, config, device, " ".join(found.values()), set_up)


def _compiled(
    model: Model, config: EngineConfig, device: torch.device, kernels: str, set_up: compiling.SetUp
) -> dict[str, str]:
    """Compile a model's blocks if the config says so, or leaves it open and it works; what there is to say of it."""
    wanted, half = config.compile, config.precision == "bf16"
    if wanted is False or (wanted == "auto" and device.type not in _COMPILING):
        return {}
    with contextlib.suppress(DataError):  # else torch keeps what it compiles in a place of its own, until a restart
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    why: str | None = "engine.deterministic" if wanted == "auto" and config.deterministic else None
    kinds = f"{kernels} {config.fuse_projections}"
    why = why or compiling.refusal(model.spec, half, device, kinds, set_up)
    if wanted is True and why:
        raise TrainingError(
            f"engine.compile = true does not work here: {why}; mend that, or leave engine.compile out, which compiles "
            f"where it works"
        )
    if why:
        return {"blocks": f"torch, uncompiled ({why})"}
    compiling.compile_blocks(model)
    return {"blocks": "torch.compile"}


_COMPILING = ("cuda",)
"""kinds of devices on which blocks are compiled unless the recipe says otherwise"""
