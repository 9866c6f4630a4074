"""The sigmoid objective through the model and its bias: formula, ranks, recipe, growth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.flops import parameters
from treering.models.model import Model, build
from treering.models.spec import ImageSpec, ModelSpec, SpecError, TextSpec
from treering.training.engines.base import Engine
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.growth.grow import grow
from treering.training.objectives.base import Inputs
from treering.training.objectives.contrastive import SigmoidContrastive
from treering.training.objectives.terms import ObjectivesConfig, build_objectives
from treering.training.stages import GrowthConfig
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=9),
    logit_bias=True,
)
ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 6
SIGMOID = ["objectives.contrastive.kind=sigmoid"]


def batch(part: slice = slice(None)) -> Inputs:
    """Captions 0 and 4 are equal, so are pictures 2 and 3; every caption has five tokens."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 49408, (PAIRS, 5), generator=generator)
    captions, pictures = torch.tensor([9, 1, 2, 3, 9, 5]), torch.tensor([0, 1, 7, 7, 4, 5])
    lengths = torch.full((PAIRS,), 5)[part]
    return Inputs(images[part], tokens[part].flatten(), lengths, captions[part], pictures[part])


def dense(model: Model, inputs: Inputs) -> Tensor:
    output = model(inputs.images, inputs.tokens, inputs.lengths)
    a, t = F.normalize(output.image.pooled, dim=-1), F.normalize(output.text.pooled, dim=-1)
    logits = model.logit_scale.exp() * a @ t.T + model.logit_bias
    total = torch.zeros((), dtype=torch.float64)
    for i in range(PAIRS):
        for j in range(PAIRS):
            if i == j:
                total = total - F.logsigmoid(logits[i, j])
            elif inputs.caption_ids[i] != inputs.caption_ids[j] and inputs.image_ids[i] != inputs.image_ids[j]:
                total = total - F.logsigmoid(-logits[i, j])
    return total / PAIRS


def gradients(loss: Tensor, model: Model) -> dict[str, np.ndarray]:
    loss.backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_equals_the_dense_formula_on_any_number_of_ranks(
    world: int, on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())  # as in test_objectives

    def one_rank(group: World) -> tuple[float, dict[str, np.ndarray]]:
        size = PAIRS // group.size
        model, inputs = build(SPEC, 3).double(), batch(slice(group.rank * size, (group.rank + 1) * size))
        output = model(inputs.images, inputs.tokens, inputs.lengths)
        loss = SigmoidContrastive(1.0).partial_loss(output, inputs, model.text.token_embedding.weight, group)
        return loss.item(), gradients(loss, model)

    answers = on_ranks(world, one_rank) if world > 1 else [one_rank(ALONE)]
    model = build(SPEC, 3).double()
    expected = dense(model, batch())
    truth = gradients(expected, model)
    assert "logit_bias" in truth
    assert sum(loss for loss, _ in answers) == pytest.approx(expected.item(), rel=1e-12)
    for name in truth:
        summed = sum(found[name] for _, found in answers)
        np.testing.assert_allclose(summed, truth[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_bias_is_a_parameter_of_the_model_that_asks_for_it() -> None:
    model = build(SPEC, 0)
    assert model.logit_bias.shape == (1,)
    assert (model.logit_bias.item(), model.scale().item()) == pytest.approx((-10, 10))
    assert parameters(SPEC) == sum(p.numel() for p in model.parameters())
    plain = SPEC.model_copy(update={"logit_bias": False})
    assert build(plain, 0).logit_bias is None
    assert build(plain, 0).scale().item() == pytest.approx(1 / 0.07)
    assert parameters(plain) == parameters(SPEC) - 1


def test_the_bias_is_no_size() -> None:
    assert "logit_bias" not in SPEC.sizes()
    with pytest.raises(SpecError, match="no such size"):
        SPEC.grown({"logit_bias": 2})


def test_it_trains_and_grows() -> None:
    """The bias moves, and goes through growth with its moments."""
    objectives = build_objectives(ObjectivesConfig.model_validate({"contrastive": {"kind": "sigmoid"}}))

    def engine(spec: ModelSpec) -> Engine:
        return DdpEngine(spec, objectives, DdpConfig(), OptimizerConfig(), ALONE, seed=1)

    small = engine(SPEC)
    losses = [small.step(batch(), 1e-2).losses["contrastive"].item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    before = {kind: small.logical_state()[f"{kind}/logit_bias"].clone() for kind in ("model", "exp_avg", "exp_avg_sq")}
    assert before["model"].item() != -10
    large, growth = grow(small, engine, SPEC.grown({"image.depth": 2}), batch(), seed=1, how=GrowthConfig())
    assert growth.logit_difference < 1e-5
    for kind, value in before.items():
        assert torch.equal(large.logical_state()[f"{kind}/logit_bias"], value)
        assert math.isfinite(value.item())


def test_steps_do_not_depend_on_the_world(on_ranks: Callable[..., list[Any]]) -> None:
    """Through DDP, whose own collectives run while the loss is still gathering gradients."""
    objectives = build_objectives(ObjectivesConfig.model_validate({"contrastive": {"kind": "sigmoid"}}))

    def one_rank(group: World) -> dict[str, np.ndarray]:
        size = PAIRS // group.size
        engine = DdpEngine(SPEC, objectives, DdpConfig(), OptimizerConfig(), group, seed=1)
        for _ in range(3):
            engine.step(batch(slice(group.rank * size, (group.rank + 1) * size)), 1e-2)
        state = {name: tensor.numpy().copy() for name, tensor in engine.logical_state().items()}
        engine.close()
        return state

    alone = one_rank(ALONE)
    for state in on_ranks(2, one_rank):
        for name, value in alone.items():
            # Where the true gradient is zero (a bias of keys), Adam makes steps of rounding: far under 1e-2.
            np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_recipe() -> None:
    recipe = read_recipe("emoji", [*SIGMOID, "model.logit_bias=true"]).recipe
    assert isinstance(build_objectives(recipe.objectives)[-1], SigmoidContrastive)
    assert all(spec.logit_bias for spec in recipe.specs())
    with pytest.raises(RecipeError, match=r"add `logit_bias: true` to model"):
        read_recipe("emoji", SIGMOID)
    with pytest.raises(RecipeError, match=r"logit_bias is never trained"):
        read_recipe("emoji", ["model.logit_bias=true"])
