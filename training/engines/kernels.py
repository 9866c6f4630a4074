"""Chooses the kernels that run a model's blocks on a device, compiled or not. The function of the model is unchanged.

Available kernels depend on shapes, so kernels are prepared whenever a model is built, also after a growth.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from ...models import mlp, varlen
from ...models.mlp import Experts
from ...models.model import Model
from ...models.transformer import Attention, TransformerBlock, kernel
from ..state import TrainingError
from .config import EngineConfig

_SHAPES = 64
"""distinct block shapes in one model: towers, with and without a graph, the last block of captions"""


def prepare_kernels(model: Model, config: EngineConfig, device: torch.device) -> dict[str, str]:
    """Set up a model's blocks for a device as the config says; names and weights stay.

    Returns the attention kernel of `pictures` and of `captions`: captions use `varlen`, without padding, or another one
    in a padded grid, with the reason. Raises TrainingError if blocks cannot be compiled here.
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
    """Raise TrainingError if torch.compile lacks its compiler or is known to compute wrong gradients."""
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
            f"engine.compile = true does not work here: there is {lacks}, which torch.compile needs; install it, or "
            f"leave engine.compile out"
        )


def forget_compiled() -> None:
    """Drop the compiled code of earlier models and raise the limit for the next.

    torch compiles one piece of code per block shape, shared by all blocks of that shape. By default it keeps eight per
    function and then silently stops compiling: too few for towers that grow twice.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = _SHAPES
