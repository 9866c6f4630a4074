"""Evaluation embeds in the precision of the training, and scores in fp32."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from treering.data.samples.clip_tokenizer import Tokenizer
from treering.data.samples.sample import Sample
from treering.models.model import Model
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.evaluate.embed import embed_captions, embed_pictures
from treering.training.objectives.contrastive import Contrastive
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=16,
    image=ImageSpec(width=32, depth=2, heads=2, patch=8, resolution=16),
    text=TextSpec(width=32, depth=2, heads=2, context=16),
)
ALONE = World(0, 1, torch.device("cpu"))
CAPTIONS = ["a red dog", "two cats on a mat", "rain"]


def embedded(model: Model) -> tuple[Tensor, Tensor, set[torch.dtype]]:
    """Pictures, captions, and the types of what the first products put out."""
    seen: set[torch.dtype] = set()
    hooks = [
        tower.transformer.blocks[0].mlp.up.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        for tower in (model.image, model.text)
    ]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
    samples = [Sample("", str(n), image, ("",), "", [1, 2], {}) for n, image in enumerate(pixels)]
    with torch.no_grad():
        found = embed_pictures(model, samples, ALONE), embed_captions(model, Tokenizer(), CAPTIONS, 2, ALONE)
    for hook in hooks:
        hook.remove()
    return *found, seen


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_embeds_as_it_trains(precision: Literal["fp32", "bf16"], ema: float | None) -> None:
    """On the model itself or its average; embeddings are unit rows in fp32 either way, and differ by rounding."""
    config, optimizer = DdpConfig(precision=precision), OptimizerConfig(ema=ema)
    engine = DdpEngine(SPEC, [Contrastive(1.0)], config, optimizer, ALONE, 0)
    with engine.whole_model() as model:
        images, texts, seen = embedded(model)
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
        model.in_bf16 = False
        for found, exact in zip((images, texts), embedded(model)[:2], strict=True):
            assert found.dtype == torch.float32
            assert (found.norm(dim=1) - 1).abs().max() < 1e-6
            assert (found - exact).abs().max() <= (0.03 if precision == "bf16" else 0)
