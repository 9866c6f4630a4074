"""Growth of models with open_clip's parts, in fp64: the function stays, and gradients are the mapped ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from treering.models.flops import forward_flops, parameters
from treering.models.growth.operator import grown
from treering.models.growth.options import WidthInit
from treering.models.growth.plan import plan_growth
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.spec import ModelSpec
from treering.tests.support.grown_models import grow, perturbed

IMAGE = {"width": 12, "depth": 1, "heads": 2, "patch": 4, "resolution": 8, "patch_bias": False, "class_token": True}
TEXT = {"width": 8, "depth": 1, "heads": 2, "context": 9, "vocabulary": 60}
COCA = {
    "embed_dim": 8,
    "image": IMAGE | {"pool": "attention", "queries": 3, "pool_heads": 2, "pre_norm": True, "layer_scale": 0.3},
    "text": TEXT | {"pool": "class", "layer_scale": 0.2, "mlp": "quick_gelu"},
    "captioner": {"depth": 1, "cross_attention": "after", "tied_embeddings": False},
}
TIED = {
    "embed_dim": 6,
    "image": IMAGE | {"pool": "class", "pre_norm": True},
    "text": TEXT | {"projection_bias": True},
    "captioner": {"depth": 1, "cross_attention": "after"},
    "logit_bias": True,
}
FILLED = {
    "embed_dim": 6,
    "image": IMAGE | {"norm_after_pool": True},
    "text": TEXT | {"causal": False, "pool": "last", "mlp": "gelu_tanh"},
}
SPECS = {name: ModelSpec.model_validate(tree) for name, tree in {"coca": COCA, "tied": TIED, "filled": FILLED}.items()}

WIDTHS: dict[str, Any] = {"image.width": 24, "text.width": 24}
TARGETS: list[tuple[str, dict[str, Any]]] = [
    *((name, WIDTHS) for name in SPECS),
    *((name, {"image.mlp_ratio": 5.0, "text.mlp_ratio": 4.5}) for name in SPECS),
    *((name, {"image.head_dim": 8, "text.head_dim": 6}) for name in SPECS),
    *((name, {"image.heads": 5, "image.head_dim": 6, "text.heads": 3, "text.head_dim": 4}) for name in SPECS),
]
KEPT: list[tuple[str, dict[str, Any]]] = [
    *TARGETS,
    ("filled", {"image.width": 18}),
    ("tied", {"embed_dim": 9}),
    ("coca", {"image.depth": 3, "text.depth": 2, "captioner.depth": 4}),
    ("coca", {"text.experts": 3, "image.experts": 2}),
    ("tied", WIDTHS | {"image.depth": 2, "text.depth": 3, "captioner.depth": 2}),
    ("filled", {"text.vocabulary": 70, "text.width": 12}),
]


def outputs(model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 60, (15,), generator=generator)
    tokens[1] = 0
    output = model(images, tokens, torch.tensor([4, 9, 2]))
    image, text = (torch.nn.functional.normalize(x.pooled, dim=-1) for x in (output.image, output.text))
    found = [output.scale * image @ text.T + (0 if output.bias is None else output.bias)]
    found += [output.image.pooled.norm(dim=1), output.text.pooled.norm(dim=1)]
    return found + ([(output.caption @ model.output_table.T)[:, :60]] if output.caption is not None else [])


@pytest.mark.parametrize("copies", ["noise", "lemon"])
@pytest.mark.parametrize(("name", "targets"), KEPT, ids=str)
def test_the_function_stays(name: str, targets: dict[str, Any], copies: WidthInit) -> None:
    model = perturbed(SPECS[name])
    larger = grow(model, targets, copies)
    with torch.no_grad():
        for before, after in zip(outputs(model), outputs(larger), strict=True):
            assert (before - after).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "targets"), TARGETS, ids=str)
def test_the_grown_gradient_is_the_mapped_one(name: str, targets: dict[str, Any]) -> None:
    """For plain copies."""
    model = perturbed(SPECS[name])
    larger = grow(model, targets, "duplicate")
    for each in (model, larger):
        sum(part.sin().sum() for part in outputs(each)).backward()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    first = grown(plan_growth(model.spec, larger.spec, 3, "duplicate"), lambda kind, n: gradients[n])
    for n, p in larger.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(first("exp_avg", n), gradient, rtol=1e-9, atol=1e-12), n


@pytest.mark.parametrize("name", list(SPECS))
def test_single_tokens_in_the_joint_space(name: str) -> None:
    """They go the way of what is pooled: of pictures whose patches are all alike the mean of the patches is each."""
    model = perturbed(SPECS[name])
    images, tokens, lengths = torch.full((2, 3, 8, 8), 9, dtype=torch.uint8), torch.tensor([5, 3, 4]), [2, 1]
    with torch.no_grad():
        model.image.position_embedding.zero_()
        output = model(images, tokens, torch.tensor(lengths), Extras(tokens=True))
    assert output.text_tokens.shape == (3, model.spec.embed_dim)
    assert output.image_tokens.shape[::2] == (2, model.spec.embed_dim)
    if model.spec.image.pool == "mean":
        assert torch.allclose(output.image_tokens, output.image.pooled[:, None])


@pytest.mark.parametrize("name", list(SPECS))
def test_work_and_parameters_are_counted(name: str) -> None:
    """Against torch's own counter of matrix products; both count a causal half, ours leaves it out."""
    from torch.utils.flop_counter import FlopCounterMode

    spec, samples, length = SPECS[name], 4, 7
    model = build(spec, 0)
    assert parameters(spec) == sum(p.numel() for p in model.parameters())
    images, tokens = torch.zeros(samples, 3, 8, 8, dtype=torch.uint8), torch.ones(samples * length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images, tokens, torch.full((samples,), length))
    text = spec.text
    read = length + 2 * (text.pool == "class")
    seen = [(read, text.depth)] if text.causal else []
    seen += [(length, spec.captioner.depth)] if spec.captioner else []
    masked = sum(depth * 4 * n * (n - (n + 1) / 2) * text.attention_width for n, depth in seen)
    head = 2 * (length - 1) * text.width * text.vocabulary if spec.captioner else 0
    assert samples * (forward_flops(spec, length) - head + masked) == pytest.approx(counter.get_total_flops(), rel=1e-6)
