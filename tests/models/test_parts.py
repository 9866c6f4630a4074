"""The table of parts against built models: names, parameters and the matrix products that torch counts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from treering.models.flops import forward_flops, parameters
from treering.models.model import Model, build, empty
from treering.models.output import Extras
from treering.models.parts import part_of, parts, stream_of
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, SharedSpec, TextSpec

IMAGES = {
    "mean": {},
    "swiglu": {"mlp": "swiglu", "class_token": True},
    "class": {"class_token": True, "pool": "class", "pre_norm": True, "patch_bias": False},
    "pooler": {"class_token": True, "pool": "attention", "queries": 5, "pool_heads": 2},
    "experts": {"experts": 4, "experts_per_token": 2},
    "gains": {"layer_scale": 0.1, "norm_after_pool": True},
}
TEXTS = {
    "end": {},
    "padded": {"causal": False, "pool": "last"},
    "last": {"pool": "last"},
    "class": {"pool": "class"},
    "experts": {"experts": 3, "experts_per_token": 1, "projection_bias": True},
    "gains": {"layer_scale": 0.1, "mlp": "swiglu"},
}
OTHERS = {
    "none": {},
    "captioner": {"captioner": CaptionerSpec(depth=2)},
    "after": {"captioner": CaptionerSpec(depth=2, cross_attention="after", tied_embeddings=False)},
    "shared": {"shared": SharedSpec(width=32, depth=2, heads=2, mlp="swiglu")},
    "modalities": {
        "modalities": {
            "audio": ModalitySpec(width=32, depth=2, heads=2, features=5, frames=4),
            "type": ModalitySpec(width=16, depth=1, heads=2, features=6),
        },
        "logit_bias": True,
    },
}
WIDTHS = {
    "image": {"width": 48, "depth": 3, "heads": 3, "patch": 4, "resolution": 16},
    "text": {"width": 64, "depth": 4, "heads": 2, "context": 13, "vocabulary": 101},
}


def _specs() -> dict[str, ModelSpec]:
    """Every combination that is a valid model."""
    found = {}
    for (image, a), (text, b), (other, c) in product(IMAGES.items(), TEXTS.items(), OTHERS.items()):
        try:
            towers = {
                "image": ImageSpec.model_validate(WIDTHS["image"] | a),
                "text": TextSpec.model_validate(WIDTHS["text"] | b),
            }
            found[f"{image}-{text}-{other}"] = ModelSpec.model_validate({"embed_dim": 16} | towers | c)
        except ValueError:
            continue
    return found


SPECS = _specs()


def test_many_combinations_are_valid() -> None:
    assert len(SPECS) > 100


@pytest.mark.parametrize("name", SPECS)
def test_the_table_names_the_tensors_of_the_model(name: str) -> None:
    """Every transformer has a row of its depth; whatever is in no part is a scale or a bias of the whole model."""
    model, rows = empty(SPECS[name]), {part.name: part for part in parts(SPECS[name])}
    found = {path.removesuffix(".transformer"): one for path, one in model.named_modules() if path.endswith("former")}
    assert rows.keys() == found.keys() == model.transformers().keys()
    assert all(part.depth == len(found[part.name].blocks) for part in rows.values())
    names = [tensor for tensor, _ in model.named_parameters()]
    assert {tensor for tensor in names if part_of(tensor) not in rows} <= {"logit_scale", "logit_bias"}
    assert {stream_of(tensor) for tensor in names if tensor.startswith("captioner.")} <= {"text"}
    assert parameters(SPECS[name]) == sum(p.numel() for p in Model(SPECS[name]).parameters())


@pytest.mark.parametrize("tokens", [False, True], ids=["embeddings", "tokens"])
@pytest.mark.parametrize("name", SPECS)
def test_flops_are_what_torch_counts(name: str, tokens: bool) -> None:
    """torch counts the half of causal attention that the mask hides, and not the output table, which the objective
    multiplies. Captions of one length: nothing is padded."""
    spec, samples, length = SPECS[name], 2, 7
    columns = {"audio": torch.zeros(samples, 4, 5), "type": torch.zeros(samples, 6)}
    extras = Extras(tokens=tokens, modalities={each: columns[each] for each in spec.modalities})
    images, ids = torch.zeros(samples, 3, 16, 16, dtype=torch.uint8), torch.ones(samples * length, dtype=torch.int64)
    model = build(spec, 0)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images, ids, torch.full((samples,), length), extras)
    text, alone = spec.text, not (spec.captioner or spec.shared or tokens)
    read = text.context if text.pool == "last" else length + 2 * (text.pool == "class")
    streams = [(text, read, text.depth - (alone and text.pool != "last"))] if text.causal else []
    streams += [(text, length, spec.captioner.depth)] if spec.captioner else []
    streams += [(spec.shared, length, spec.shared.depth)] if spec.shared else []
    hidden = sum(depth * 4 * n * (n - (n + 1) / 2) * tower.attention_width for tower, n, depth in streams)
    table = 2 * (length - 1) * text.width * text.vocabulary if spec.captioner else 0
    ours = samples * (forward_flops(spec, length, tokens=tokens) + hidden - table)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)
