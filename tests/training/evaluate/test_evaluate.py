"""Scores against plain numpy on the same embeddings, and the same at any number of ranks, dividing or not."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from treering.data.errors import DataError
from treering.data.loading.loader import EvaluationSet
from treering.models.model import build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.evaluate import retrieval, zero_shot
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.embed import embed
from treering.training.evaluate.generate import greedy
from treering.training.evaluate.suites import evaluate
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=12),
    captioner=CaptionerSpec(depth=1),
)
ALONE = World(0, 1, torch.device("cpu"))


def write_shard(folder: Path, samples: int, broken: set[int], labels: bool = True) -> str:
    """Coloured squares, sample i with 1 + i mod 3 captions; `broken` ones hold no picture."""
    random = np.random.default_rng(0)
    with tarfile.open(folder / "set-0.tar", "w") as tar:
        for i in range(samples):
            picture = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(picture, "PNG")
            captions = [f"caption {j} of picture {i}" for j in range(1 + i % 3)]
            facts = {"captions": captions} | ({"labels": {"parity": "odd" if i % 2 else "even"}} if labels else {})
            members = {
                "png": b"not a picture" if i in broken else picture.getvalue(),
                "txt": captions[0].encode(),
                "json": json.dumps(facts).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:03}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / "set-0.tar")


def unit(rows: int, seed: int) -> torch.Tensor:
    x = np.random.default_rng(seed).normal(size=(rows, 5))
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_recalls_equal_a_plain_count() -> None:
    images, texts, owners = unit(23, 0), unit(40, 1), np.sort(np.random.default_rng(2).integers(0, 23, 40))
    owners[:23] = np.arange(23)  # every picture has a caption
    found = retrieval.recalls(images, texts, torch.from_numpy(owners))
    scores = images.numpy() @ texts.numpy().T
    for k in (1, 5, 10):
        hits = [any(owners[j] == i for j in np.argsort(-scores[i])[:k]) for i in range(23)]
        assert found[f"image_to_text@{k}"] == pytest.approx(np.mean(hits))
        hits = [owners[j] in np.argsort(-scores[:, j])[:k] for j in range(40)]
        assert found[f"text_to_image@{k}"] == pytest.approx(np.mean(hits))


def test_a_collapsed_model_gets_nothing() -> None:
    same = torch.ones(20, 4) / 2
    assert set(retrieval.recalls(same, same, torch.arange(20)).values()) == {0.0}
    assert zero_shot.accuracy(same, same[:3], torch.zeros(20, dtype=torch.int64)) == 0.0


def test_chance_is_the_mean_over_all_orders() -> None:
    owners = torch.tensor([0, 0, 1, 2])
    expected = np.mean(
        [any(owners[j] == i for j in order[:1]) for order in itertools.permutations(range(4)) for i in range(3)]
    )
    found = retrieval.chance(3, owners)
    assert found["image_to_text@1"] == pytest.approx(expected)
    assert found["text_to_image@1"] == pytest.approx(1 / 3)
    assert found["image_to_text@10"] == 1.0


def test_zero_shot_equals_a_plain_argmax() -> None:
    images, prompts = unit(30, 3), unit(12, 4)
    classes = zero_shot.class_embeddings(prompts, 4)
    means = prompts.numpy().reshape(4, 3, 5).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    labels = np.random.default_rng(5).integers(0, 4, 30)
    expected = ((images.numpy() @ means.T).argmax(1) == labels).mean()
    assert zero_shot.accuracy(images, classes, torch.from_numpy(labels)) == pytest.approx(expected)
    assert zero_shot.prompts(["a", "b{}"], ["{} {x}", "no"]) == ["a {x}", "no", "b{} {x}", "no"]


@pytest.mark.parametrize("world", [2, 3])
def test_scores_do_not_depend_on_the_world(world: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """17 samples of which two are broken: nothing divides."""
    url = write_shard(tmp_path, 17, {4, 11})
    config = EvalConfig(suites=("retrieval", "zero_shot"), batch=3, examples=0)

    def one_rank(group: World) -> dict[str, Any]:
        found = evaluate(build(SPEC, 1), config, url, group)
        return {"scores": found.scores, "chance": found.chance, "sizes": found.sizes, "bad": len(found.bad)}

    alone = one_rank(ALONE)
    assert alone["bad"] == 2
    captions, pictures = sum(1 + i % 3 for i in range(17) if i not in {4, 11}), 15
    assert alone["sizes"] == {"retrieval": captions, "retrieval/text_to_image": pictures, "zero_shot/parity": 2}
    for ours in on_ranks(world, one_rank):
        assert ours == alone


def test_embeddings_lie_in_index_order(tmp_path: Path) -> None:
    url, model = write_shard(tmp_path, 7, {2}), build(SPEC, 1)
    found = embed(model, EvaluationSet(url, 8, 12), 2, ALONE)
    assert found.numbers == [0, 1, 3, 4, 5, 6]
    assert [found.captions[j] for j in range(len(found.captions)) if found.owners[j] == 2] == ["caption 0 of picture 3"]
    alone = embed(model, EvaluationSet(url, 8, 12), 64, ALONE)
    assert (found.images - alone.images).abs().max() < 1e-6
    assert (found.texts - alone.texts).abs().max() < 1e-6


def test_what_cannot_be_evaluated_says_so(tmp_path: Path) -> None:
    unlabelled = write_shard(tmp_path, 3, set(), labels=False)
    with pytest.raises(DataError, match=r"no sample of .* has labels"):
        evaluate(build(SPEC, 1), EvalConfig(suites=("zero_shot",)), unlabelled, ALONE)


def test_greedy_writes_the_most_likely_token_each_time() -> None:
    """Against a loop over single pictures and whole prefixes."""
    model = build(SPEC, 2)
    with torch.no_grad():  # let the picture and the prefix matter
        for p in model.captioner.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
        images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        end = 7
        together = greedy(model, images, 5, end, 6)
        for i in range(3):
            written = [5]
            while len(written) < 6 and (len(written) == 1 or written[-1] != end):
                output = model(images[i : i + 1], torch.tensor(written), torch.tensor([len(written)]))
                written.append(int((output.caption[-1] @ model.text.token_embedding.weight.T).argmax()))
            assert together[i] == [t for t in written[1:] if t != end]
    assert len({tuple(t) for t in together}) > 1
