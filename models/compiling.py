"""Blocks compiled by torch.compile, where that works and gives the gradients of the blocks as they are written.

There is no table of where it does: torch 2.11 computes wrong gradients without a word. So, as with the kernel for
captions (`varlen`), it is tried when a model is built: a tiny model with blocks of the same kinds has to have
the same gradients compiled and not.

Pictures always have the same number of tokens in a stage, and their blocks are compiled for it; captions have another
in every step. Evaluation runs the blocks uncompiled, as its batches have shapes of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .model import Model, build
from .output import Extras
from .spec import ModelSpec, TowerSpec
from .transformer import TransformerBlock

_SHAPES = 64
"""distinct block shapes in one model: towers, with and without a graph, the last block of captions"""
_LENGTHS = ((3, 9, 5, 3, 7, 4), (16, 2, 8, 5, 6, 1))
"""tokens of the captions of two batches"""
_OFF, _OFF_OF_ALL = 0.05, 1e-3
"""difference of a gradient that is rounding: relative to its own norm, and to that of the whole gradient"""

SetUp = Callable[[Model], None]
"""chooses the kernels of a model's blocks"""


def compile_blocks(model: Model) -> None:
    """Compile the blocks of a model, at their first pass; names and weights stay."""
    _forget_compiled()
    for name, module in model.named_modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=not name.startswith(("image.", "modalities.")))


def as_written(model: Model) -> contextlib.AbstractContextManager[object]:
    """A context in which the blocks of a model run uncompiled."""
    blocks = (module for module in model.modules() if isinstance(module, TransformerBlock))
    compiled = any(block._compiled_call_impl is not None for block in blocks)
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def refusal(spec: ModelSpec, half: bool, device: torch.device, kernels: str, set_up: SetUp) -> str | None:
    """Why blocks as those of `spec` must not be compiled on a device; None: they may.

    `half`: whether they compute in bf16; `set_up` chooses their kernels, `kernels` says which. Tried once for each kind
    of blocks.
    """
    lacks = None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler ($CXX or g++)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks = "no triton"
    if lacks:
        return f"there is {lacks}, which torch.compile needs"
    key = (_tiny(spec).model_dump_json(), half, str(device), kernels)
    if key not in _tried:
        _tried[key] = _differs(_tiny(spec), half, device, set_up)
    return _tried[key]


_tried: dict[tuple[object, ...], str | None] = {}


def _forget_compiled() -> None:
    """Drop the compiled code of earlier models and raise the limit for the next.

    torch compiles one piece of code per block shape, shared by all blocks of that shape. By default it keeps eight per
    function and then silently stops compiling: too few for towers that grow twice.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = _SHAPES


def _tiny(spec: ModelSpec) -> ModelSpec:
    """A small model whose blocks are of the same kinds, with heads of the same size, which kernels depend on."""

    def small(tower: TowerSpec, **sizes: int) -> TowerSpec:
        return tower.model_copy(
            update={"width": 64, "depth": 2, "heads": 2, "head_dim": tower.head_width, "norm_eps": 1e-5, **sizes}
        )

    image, text = spec.image, spec.text
    return spec.model_copy(
        update={
            "embed_dim": 32,
            "image": small(image, resolution=4 * image.patch, queries=8, pool_heads=2),
            "text": small(text, context=16, vocabulary=128),
            "captioner": spec.captioner and spec.captioner.model_copy(update={"depth": 1}),
            "shared": spec.shared and small(spec.shared),
            "modalities": {name: small(one) for name, one in spec.modalities.items()},
        }
    )


def _differs(spec: ModelSpec, half: bool, device: torch.device, set_up: SetUp) -> str | None:
    """How the gradients of compiled blocks differ from those of the same blocks as they are written, or why they cannot
    be had; None: not."""
    written, compiled = (build(spec, 0).to(device) for _ in range(2))
    set_up(written)
    set_up(compiled)
    try:
        compile_blocks(compiled)
        found = [_gradients(compiled, lengths, half, device) for lengths in _LENGTHS]
    except Exception as error:  # whatever a compiler fails with, blocks as they are written work
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    finally:
        _forget_compiled()
    for lengths, ours in zip(_LENGTHS, found, strict=True):
        truth = _gradients(written, lengths, half, device)
        if worst := _worst(ours, truth):
            return f"compiled blocks give wrong gradients, that of {worst}"
    return None


def _worst(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> str | None:
    """The parameter whose gradient differs most, by more than rounding; None if there is none."""
    whole = float(torch.stack([one.norm() for one in truth.values()]).norm())
    off = {
        name: float((found[name] - one).norm()) / (_OFF * float(one.norm()) + _OFF_OF_ALL * whole)
        for name, one in truth.items()
    }
    name = max(off, key=lambda name: off[name] if off[name] == off[name] else float("inf"))
    return None if off[name] <= 1 else name


def _gradients(model: Model, lengths: tuple[int, ...], half: bool, device: torch.device) -> dict[str, Tensor]:
    """The gradient of a fixed function of everything that the model puts out, by parameter."""
    generator = torch.Generator().manual_seed(len(lengths))
    spec, lengths_b = model.spec, torch.tensor(lengths).clamp(max=model.spec.text.context)
    shape = (len(lengths), 3, spec.image.resolution, spec.image.resolution)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, spec.text.vocabulary, (int(lengths_b.sum()),), generator=generator)
    extras = Extras(
        longest=int(lengths_b.max()),
        modalities={
            name: torch.randn((len(lengths), one.frames, one.features), generator=generator).to(device)
            for name, one in spec.modalities.items()
        },
    )
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = model(images.to(device), tokens.to(device), lengths_b.to(device), extras)
    towers = [output.image, output.text, *output.modalities.values()]
    read = [tower.pooled for tower in towers] + ([] if output.caption is None else [output.caption])
    slopes = [torch.randn(one.shape, generator=generator).to(device) for one in read]
    loss = torch.stack([(one.float() * slope).sum() for one, slope in zip(read, slopes, strict=True)]).sum()
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: one.float() for name, one in zip(named, found, strict=True) if one is not None}
