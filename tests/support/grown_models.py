"""Small models as after training, their growth in memory, and what they give before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.growth.operator import Operator, grown
from treering.models.growth.options import WidthInit
from treering.models.growth.plan import plan_growth
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, TextSpec

TIED = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=12, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
)
AUDIO = ModalitySpec(width=12, depth=1, heads=2, features=5, frames=4, mlp="swiglu")


def perturbed(spec: ModelSpec, dtype: torch.dtype = torch.float64) -> Model:
    """A model as after training: no parameter at its initial zero or one."""
    model = build(spec, 0).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.05)
    return model


def filled(spec: ModelSpec, operators: list[Operator], old: dict[str, Tensor], dtype: torch.dtype) -> Model:
    """The model of `spec` whose every tensor a plan makes, in its exact shape."""
    read = grown(operators, lambda kind, name: old[name])
    larger = build(spec, 99).to(dtype)
    with torch.no_grad():
        for name, p in larger.named_parameters():
            made = read("model", name)
            assert made.shape == p.shape, name
            p.copy_(made)
    return larger


def grow(model: Model, targets: dict[str, Any], copies: WidthInit = "noise", seed: int = 3) -> Model:
    spec = model.spec.grown(targets)
    old = {name: p.detach() for name, p in model.named_parameters()}
    return filled(spec, plan_growth(model.spec, spec, seed, copies), old, model.image_mean.dtype)


def outputs(model: Model, lengths: tuple[int, ...] = (4, 9, 2)) -> dict[str, Tensor]:
    """Scaled cosines, all embeddings and the captioner's logits on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    side = model.spec.image.resolution
    images = torch.randint(0, 256, (len(lengths), 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 49408, (sum(lengths),), generator=generator)
    modalities = {
        name: torch.randn(len(lengths), tower.frames, tower.features, generator=generator).to(model.image_mean)
        for name, tower in model.spec.modalities.items()
    }
    output = model(images, tokens, torch.tensor(lengths), Extras(modalities=modalities))
    image, text = output.image.pooled, output.text.pooled
    found = {"logits": output.scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T}
    found |= {"image": image, "text": text}
    if output.caption is not None:
        found["caption"] = output.caption @ model.text.token_embedding.weight.T
    for name, tower in output.modalities.items():
        similar = F.normalize(tower.pooled, dim=-1) @ F.normalize(text, dim=-1).T
        found |= {name: tower.pooled, f"{name} logits": tower.scale * similar}
    return found


@torch.no_grad()
def difference(model: Model, larger: Model) -> float:
    """Largest difference of any output; new channels of the joint space count with what they hold."""
    before, after = outputs(model), outputs(larger)
    if "caption" in before:  # the scores of new tokens are new
        after["caption"] = after["caption"][:, : before["caption"].shape[1]]
    return max((F.pad(b, (0, after[k].shape[1] - b.shape[1])) - after[k]).abs().max().item() for k, b in before.items())
