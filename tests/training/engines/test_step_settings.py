"""Settings that make a step cheaper: the exact ones equal the plain step, patch dropout is what it says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.spec import CaptionerSpec, ModelSpec
from treering.tests.support.five_pairs import PLAIN, SPEC, batch, gradients
from treering.training.engines.config import DdpConfig
from treering.training.engines.kernels import prepare_kernels
from treering.training.loop import train
from treering.training.sample_rng import kept

AFTER = SPEC.model_copy(update={"captioner": CaptionerSpec(depth=1, cross_attention="after")})


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("spec", [SPEC, PLAIN, AFTER])
def test_projections_as_one_product_are_the_same_function(spec: ModelSpec, half: bool) -> None:
    """Output and every gradient, in fp64 to the last digits; with fewer matrix products, by torch's own count."""
    found, products = [], []
    for fused in (False, True):
        model = build(spec, 3)
        prepare_kernels(model, DdpConfig(fuse_projections=fused), torch.device("cpu"))
        model = model if half else model.double()
        with torch.profiler.profile() as seen, torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(*batch())
        products.append(sum(event.name == "aten::linear" for event in seen.events()))
        found.append(gradients(model, output))
    assert found[0].keys() == found[1].keys(), "commits keep their names"
    for name, truth in found[0].items():
        off = np.linalg.norm(found[1][name] - truth)
        assert off <= (0.02 if half else 1e-12) * np.linalg.norm(truth) + (0.02 if half else 1e-12), name
    # Two products less in every block that attends to itself; one less for another stream, or where one token asks.
    fewer = 4 + 3 if spec.captioner is None else 4 + 4 + 3
    assert products[0] - products[1] == fewer * (1 + half), "autocast calls the product once more"


def test_the_last_block_works_only_where_it_is_read() -> None:
    """The embedding and every gradient are those of the whole block; with a captioner all tokens are there."""
    pruned, whole = (build(PLAIN, 3).double() for _ in range(2))
    rows: list[int] = []
    pruned.text.transformer.blocks[-1].mlp.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    short = pruned(*batch())
    images, tokens, lengths = batch()
    long = short._replace(image=whole.embed_images(images), text=whole.embed_texts(tokens, lengths))
    assert rows == [5]
    assert (len(short.text.tokens), len(long.text.tokens)) == (0, int(lengths.sum()))
    torch.testing.assert_close(short.text.pooled, long.text.pooled, rtol=1e-12, atol=1e-12)
    mine, truth = gradients(pruned, short), gradients(whole, long)
    for name, gradient in truth.items():
        np.testing.assert_allclose(mine[name], gradient, rtol=1e-9, atol=1e-12, err_msg=name)
    assert len(build(SPEC, 3)(*batch()).text.tokens) == int(lengths.sum())
    assert len(build(PLAIN, 3)(*batch(), Extras(tokens=True)).text.tokens) == int(lengths.sum())


def test_patches_that_are_left_out_do_not_exist() -> None:
    """Against a tower that is given only the kept patches, picture by picture; all kept is the plain tower."""
    model = build(PLAIN, 3).double()
    images, tokens, lengths = batch()
    patches = kept(1, "image/patches", torch.arange(5), 16, 0.3)
    assert patches.shape == (5, 5)
    pooled = model(images, tokens, lengths, Extras(patches_bk=patches)).image.pooled
    tower = model.image
    pixels = (images.double() / 255 - model.image_mean) / model.image_std
    for i in range(5):
        unfolded = F.unfold(pixels[i : i + 1], 4, stride=4)[0].T
        x = tower.patches(unfolded[patches[i]]) + tower.position_embedding[patches[i]]
        for block in tower.transformer.blocks:
            h = block.attention_norm(x)
            q, k, v = (
                getattr(block.attention, part)(h).view(5, 2, 8).transpose(0, 1) for part in ("query", "key", "value")
            )
            mixed = (q @ k.transpose(1, 2) / 8**0.5).softmax(2) @ v
            x = x + block.attention.out(mixed.transpose(0, 1).reshape(5, 16))
            x = x + block.mlp(block.mlp_norm(x))
        truth = tower.projection(tower.transformer.norm(x).mean(0))
        torch.testing.assert_close(pooled[i], truth, rtol=1e-10, atol=1e-12)
    everything = kept(1, "image/patches", torch.arange(5), 16, 1.0)
    assert torch.equal(
        model(images, tokens, lengths, Extras(patches_bk=everything)).image.pooled, model(*batch()).image.pooled
    )


def test_every_patch_is_kept_as_often() -> None:
    drawn = kept(0, "image/patches", torch.arange(4000), 16, 0.25)
    assert drawn.shape == (4000, 4)
    assert (drawn[:, 1:] > drawn[:, :-1]).all()
    counts = torch.bincount(drawn.flatten(), minlength=16)
    assert ((counts - 1000).abs() < 5 * 750**0.5).all()
    assert torch.equal(kept(0, "image/patches", torch.arange(7, 9), 16, 0.25), drawn[7:9])
    assert training_flops(PLAIN, 9.0, 4) < 0.6 * training_flops(PLAIN, 9.0)


def test_a_run_with_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FILIP, parallel captions, a schedule, pieces, a bound on activations, half of the patches, then all; a trace."""
    seen: list[tuple[int, ...] | None] = []
    embed = Model.embed_images

    def embed_images(
        self: Model, images: torch.Tensor, patches: torch.Tensor | None = None, pooled_only: bool = False
    ) -> Any:
        if len(images) == 2:
            seen.append(None if patches is None else tuple(patches.shape))
        return embed(self, images, patches, pooled_only)

    monkeypatch.setattr(Model, "embed_images", embed_images)
    overrides = [
        "data.batch=4",
        "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 24}, "
        "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
        "objectives={contrastive: {kind: filip, label_smoothing: 0.1}, "
        "caption: {weight: 1.0, parallel_fraction: 0.5, schedule: [[0.0, 1.0], [1.0, 0.0]]}}",
        "stages=[{samples: 20, patch_keep: 0.5}, {samples: 20}]",
        "engine={micro_batches: 2, activation_budget: 0.5}",
        "schedule.warmup=4",
        "eval={suites: [retrieval], caption_decoding: beam, examples: 2}",
        "log={every: 1, profile: true, gradient_norms: true}",
    ]
    summary = train(read_recipe("emoji", overrides).recipe, tmp_path)
    assert summary.finished
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert len(steps) == 10
    for row in steps:
        weight = 1 - (row["step"] - 1) * 4 / 40
        assert row["gradient_norms"].keys() == {"contrastive", "caption"}
        assert all(norm > 0 for norm in row["gradient_norms"].values())
        assert row["loss"] == pytest.approx(row["losses"]["contrastive"] + weight * row["losses"]["caption"], rel=1e-5)
    assert seen[:80] == [(2, 2)] * 40 + [None] * 40  # ten steps of two pieces, twice each, and as often for the norms
    with gzip.open(tmp_path / "trace-rank-0.json.gz") as file:
        trace = json.loads(file.read())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
