"""The step asks the device for nothing: all it has to know on the host it is told with the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from treering.models import mlp, varlen
from treering.models.mlp import Experts
from treering.models.model import build, empty
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec, TowerSpec
from treering.models.transformer import Attention
from treering.training.engines import micro_batches
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.device_prefetch import Feed
from treering.training.engines.kernels import prepare_kernels
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.balance import Balance
from treering.training.objectives.base import Inputs, Objective, extras_of
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive, LateContrastive, SigmoidContrastive
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=32, depth=2, heads=2, patch=4, resolution=8),
    text=TextSpec(width=32, depth=2, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
    logit_bias=True,
)
DUAL = SPEC.model_copy(update={"captioner": None})
OBJECTIVES = {
    "softmax": lambda: Contrastive(1.0),
    "positives": lambda: Contrastive(1.0, positives="caption", label_smoothing=0.1),
    "sigmoid": lambda: SigmoidContrastive(1.0),
    "filip": lambda: LateContrastive(1.0),
    "caption": lambda: CaptionLoss(1.0),
    "parallel": lambda: CaptionLoss(1.0, parallel_fraction=0.5, seed=3),
}


TOWERS = {
    "classed": DUAL.model_copy(update={"text": SPEC.text.model_copy(update={"pool": "class"})}),
    "captioned class": SPEC.model_copy(update={"text": SPEC.text.model_copy(update={"pool": "class"})}),
    "filled": DUAL.model_copy(update={"text": SPEC.text.model_copy(update={"pool": "last"})}),
    "both ways": DUAL.model_copy(update={"text": SPEC.text.model_copy(update={"pool": "first", "causal": False})}),
    "experts": DUAL.model_copy(
        update={
            "image": SPEC.image.model_copy(update={"experts": 4}),
            "text": SPEC.text.model_copy(update={"experts": 3, "experts_per_token": 1, "mlp": "swiglu"}),
        }
    ),
}
"""models of open_clip's, and mixtures"""


def batch(device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 9, 5, 3, 7, 4])
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    tensors = images, tokens, lengths, torch.arange(6), torch.arange(6) + 10, torch.arange(6)
    return Inputs(*(x.to(device) for x in tensors), host_lengths=lengths)


def backward(objective: Objective, inputs: Inputs, parts: int, spec: ModelSpec | None = None) -> None:
    net = empty(spec or (SPEC if "caption" in objective.needs else DUAL))
    for module in net.modules():
        if isinstance(module, Experts):
            net.bfloat16()  # as the kernel wants it
            module.grouped = True
    world = World(0, 1, torch.device("meta"))

    def forward(piece: Inputs) -> tuple[object, Tensor]:
        extras = extras_of([objective], piece)
        return net(piece.images, piece.tokens, piece.lengths, extras), net.text.token_embedding.weight

    if parts > 1:
        micro_batches.backward(forward, [objective], inputs, parts, world)
    else:
        output, table = forward(inputs)
        objective.partial_loss(output, inputs, table, world).backward()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_and_backward_read_nothing_from_the_device(name: str, parts: int) -> None:
    """On torch's meta device no number exists, so whoever asks for one fails."""
    inputs = batch(torch.device("meta"))
    backward(OBJECTIVES[name](), inputs, parts)
    with pytest.raises(RuntimeError, match="meta"):
        backward(OBJECTIVES[name](), replace(inputs, host_lengths=None), parts)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_no_tower_reads_anything_from_the_device(name: str, parts: int) -> None:
    """Also those that fill texts, or end them with a class token, and mixtures of experts."""
    spec, inputs = TOWERS[name], batch(torch.device("meta"))
    objectives = [
        CaptionLoss(1.0) if spec.captioner else Contrastive(1.0),
        *([Balance(1.0)] if name == "experts" else []),
    ]
    for objective in objectives:
        backward(objective, inputs, parts, spec)
        with pytest.raises(RuntimeError, match="meta"):
            backward(objective, replace(inputs, host_lengths=None), parts, spec)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*OBJECTIVES, *TOWERS])
def test_the_steady_step_does_not_wait_for_the_gpu(name: str) -> None:
    """torch raises at every synchronisation, from the feed of a batch to the optimizer."""
    device, objective = torch.device("cuda", 0), OBJECTIVES.get(name, lambda: Contrastive(1.0))()
    spec = TOWERS.get(name, SPEC if "caption" in objective.needs else DUAL)
    config = DdpConfig(precision="bf16", activation_budget=0.5)
    engine = DdpEngine(spec, [objective], config, OptimizerConfig(ema=0.9), World(0, 1, device), 0)
    feed, host = Feed(World(0, 1, device), 0), batch(torch.device("cpu"))
    columns = (host.images, host.tokens, host.lengths, host.caption_ids, host.image_ids, host.numbers)
    for _ in range(2):  # the first steps make the optimizer's state and the kernels
        engine.step(Inputs(*feed.move(columns), host_lengths=host.lengths), 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = engine.step(Inputs(*feed.move(columns), host_lengths=host.lengths), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.losses[objective.name].isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_fed_arrives_whole() -> None:
    feed = Feed(World(0, 1, torch.device("cuda", 0)), 0)
    for _ in range(20):
        sent = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
        [arrived] = feed.move([sent])
        assert torch.equal((arrived + 0).cpu(), sent)


# Experts at once


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("active", [1, 2])
def test_experts_at_once_are_experts_one_by_one(kind: Any, active: int) -> None:
    """By torch's own stand-in for the kernel, in bf16; one expert has no token."""
    mixture = Experts(TowerSpec(width=32, depth=1, heads=2, experts=4, experts_per_token=active, mlp=kind)).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
        mixture.router.weight[2] = -100
    x_td = torch.randn(37, 32, generator=generator).abs().bfloat16()
    found: list[list[Tensor]] = []
    for grouped in (True, False):
        mixture.grouped = grouped
        leaf_td = x_td.clone().requires_grad_()
        mixed_td, routing = mixture(leaf_td)
        weights = [leaf_td, *mixture.experts.parameters()]
        slopes = torch.autograd.grad(mixed_td.float().square().sum(), weights)
        found.append([mixed_td.detach(), *slopes])
    assert routing.counts_e[2] == 0
    for ours, truth in zip(*found, strict=True):
        assert float((ours - truth).float().norm()) <= 0.02 * float(truth.float().norm())


def test_the_kernel_for_experts_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TowerSpec(width=32, depth=1, heads=2, experts=4)
    mlp.grouped_refusal.cache_clear()
    assert mlp.grouped_refusal(spec, torch.device("cpu")) is None
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: real(x, w, offs=offs.flip(0).sort().values - 1))
    mlp.grouped_refusal.cache_clear()
    assert mlp.grouped_refusal(spec, torch.device("cpu")) is not None
    mlp.grouped_refusal.cache_clear()


# Attention without padding


def right(query_thc: Tensor, key_thc: Tensor, value_thc: Tensor, starts: Tensor, longest: int) -> Tensor:
    """By a mask over the whole stream."""
    place_t = torch.arange(len(query_thc))
    sample_t = torch.searchsorted(starts[1:].long(), place_t, right=True)
    seen_tt = (sample_t[:, None] == sample_t) & (place_t[:, None] >= place_t)
    q, k, v = (x.transpose(0, 1) for x in (query_thc, key_thc, value_thc))
    scores_htt = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen_tt, float("-inf"))
    return (scores_htt.softmax(-1) @ v).transpose(0, 1)


def sees_the_future(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    parts = zip(*(x.transpose(0, 1).split(starts.diff().tolist(), 1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)


def test_a_kernel_is_tried_before_it_is_used() -> None:
    cpu = torch.device("cpu")
    assert varlen.refusal(3, 16, cpu, right) is None
    assert "differs" in str(varlen.refusal(3, 16, cpu, sees_the_future))
    wrong_slope = lambda *inputs: right(*inputs).detach() + 0 * right(*inputs)  # noqa: E731
    assert "differs" in str(varlen.refusal(3, 16, cpu, wrong_slope))
    assert "NotImplementedError" in str(varlen.refusal(3, 16, cpu)), "torch's kernel is for GPUs"


def test_a_model_says_how_it_attends() -> None:
    model = build(SPEC, 0)
    found = prepare_kernels(model, DdpConfig(precision="bf16"), torch.device("cpu"))
    assert found == {"pictures": "flash", "captions": "flash, padded (bf16 on cpu)"}
    with sdpa_kernel(SDPBackend.MATH):
        found = prepare_kernels(model, DdpConfig(), torch.device("cpu"))
    assert found == {"pictures": "math", "captions": "math, padded (fp32 on cpu)"}
    assert not any(module.varlen for module in model.modules() if isinstance(module, Attention))


def test_a_tower_without_padding_is_the_padded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the kernel is asked, with the right places; in fp32 it is not."""
    asked = []

    def kernel(*inputs: Tensor) -> Tensor:
        asked.append(inputs[3].tolist())
        return right(*inputs)

    monkeypatch.setattr(varlen, "causal", kernel)
    model, inputs = build(SPEC, 0), batch(torch.device("cpu"))

    def gradient() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            caption = model(inputs.images, inputs.tokens, inputs.lengths).caption
        (caption.float() * torch.linspace(-1, 1, caption.numel()).view_as(caption)).sum().backward()
        slope = model.text.transformer.blocks[0].attention.key.weight.grad
        return caption.detach().float(), slope.clone()

    padded, padded_slope = gradient()
    for module in model.modules():
        if isinstance(module, Attention):
            module.varlen = True
    found, slope = gradient()
    assert asked == [[0, 3, 12, 17, 20, 27, 31]] * 3, "two blocks of the tower and one of the captioner"
    assert float((found - padded).norm() / padded.norm()) < 0.01
    assert float((slope - padded_slope).norm() / padded_slope.norm()) < 0.02
    model(inputs.images, inputs.tokens, inputs.lengths)
    assert len(asked) == 3
