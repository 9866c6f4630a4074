"""How the blocks of a model are run on a device: by which kernels, compiled or not. Nothing of it changes a model.

Shapes decide which kernels there are, so a model is prepared whenever one is built, also after a growth.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

import torch

from ...models import mlp, varlen
from ...models.mlp import Experts
from ...models.model import Model
from ...models.transformer import Attention, TransformerBlock, kernel
from ..state import TrainingError

if TYPE_CHECKING:
    from .config import EngineConfig

_SHAPES = 64
"""of blocks in one model: towers, with and without a graph, the last block of captions"""


def prepare(model: Model, config: EngineConfig, device: torch.device) -> dict[str, str]:
    """Switch a model's blocks to how the config wants them run on a device; names and weights stay.

    The answer says by which kernel `pictures` and `captions` attend; captions by `varlen`, without padding, or by
    another one in a padded grid, and why. Raises TrainingError if blocks cannot be compiled here.
    """
    half = config.precision == "bf16" and device.type == "cuda"
    refused = None if half else f"{config.precision} on {device.type}"
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        refused = refused or varlen.kernel_refusal(
            attention.heads, attention.key.out_features // attention.heads, device
        )
    if config.compile:
        check_compiler(device)
        forget_compiled()
    for module in model.modules():
        if isinstance(module, Attention):
            module.varlen = refused is None
        if isinstance(module, Experts) and half and config.groups_experts:
            module.grouped = mlp.grouped_refusal(module.spec, device) is None
        if isinstance(module, TransformerBlock) and config.compile:
            module.compile(dynamic=True)
    image, text, dtype = model.spec.image, model.spec.text, torch.bfloat16 if config.precision == "bf16" else None
    captions = kernel(text, text.context, text.causal, device, dtype)
    return {
        "pictures": kernel(image, image.grid**2 + image.class_token, False, device, dtype),
        "captions": "varlen" if refused is None else f"{captions}, padded ({refused})",
    }


def check_compiler(device: torch.device) -> None:
    """TrainingError where torch.compile lacks what it makes code with, or makes wrong code."""
    # Seen with 2.11: the gradients of the captions' position embeddings are wrong, silently.
    if torch.__version__ < "2.13":  # a TorchVersion, which compares as versions do
        raise TrainingError(
            f"engine.compile = true needs torch 2.13 or newer, and {torch.__version__} is installed, whose compiled "
            f"blocks give wrong gradients; pip install 'torch>=2.13', or leave engine.compile out"
        )
    lacks = None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler ($CXX or g++)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks = "no triton"
    if lacks:
        raise TrainingError(
            f"engine.compile = true cannot be here: there is {lacks}, which torch.compile makes code with; install it, "
            f"or leave engine.compile out"
        )


def forget_compiled() -> None:
    """Make room for the code of a new model's blocks.

    torch keeps one piece of code for each shape of a block, for all blocks that have it, however deep the model is. Of
    one function it keeps eight pieces at most and then silently compiles no more: too few for towers that grow twice.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = _SHAPES
