"""Pictures of six kinds, suites of them, and a random model that tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from treering.data.evaluation_sets import Form, open_pictures
from treering.models.model import Model, build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.embed import embed
from treering.training.evaluate.embedding_cache import EmbeddingCache
from treering.training.evaluate.outcome import Evaluation
from treering.training.evaluate.suites import evaluate
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=24,
    image=ImageSpec(width=32, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=16),
    captioner=CaptionerSpec(depth=1),
)
ALONE = World(0, 1, torch.device("cpu"))
NAMES = ["cat", "dog", "owl", "fox", "hen", "elk"]


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def label(number: int) -> int:
    return number * 7 % 17 % len(NAMES)


def suite(path: Path, name: str, data: Any, protocol: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "data": data, "protocol": protocol}))
    return str(path / f"{name}.yaml")


def result(
    model: Model, *suites: str, world: World = ALONE, batch: int = 4, embeddings: EmbeddingCache | None = None
) -> Evaluation:
    return evaluate(model, EvalConfig(suites=suites, batch=batch, examples=0), "", world, embeddings=embeddings)


def model_that_tells_apart() -> Model:
    """Random, with weights large enough that the embeddings differ."""
    model = build(SPEC, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name) + p.numel()))
                p.add_(noise * 0.3)
    return model


def numpy_embeddings(model: Model, url: str, form: Form) -> tuple[np.ndarray, np.ndarray, Any]:
    data = open_pictures(url, form, 8, 16)
    found = embed(model, data, 64, ALONE)
    return found.images.double().numpy(), found.texts.double().numpy(), found
