"""Suites against plain numpy, scikit-learn and counting; the same at any number of ranks; bad inputs named."""

from __future__ import annotations

import io
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
from treering.data.evaluation_sets import Form, open_pictures
from treering.models.model import Model, build
from treering.tests.support.small_suites import (
    ALONE,
    NAMES,
    SPEC,
    model_that_tells_apart,
    numpy_embeddings,
    paint,
    result,
    suite,
)
from treering.training.evaluate.embed import embed, embed_prompts
from treering.training.evaluate.embedding_cache import EmbeddingCache
from treering.training.world import World


def test_zero_shot_equals_plain_numpy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(sorted(NAMES)) + "\n")
    (tmp_path / "templates.txt").write_text("a {c}.\na photo of {}\nmany {c}s\n")
    model = model_that_tells_apart()
    path = suite(
        tmp_path, "kinds", "kinds", {"kind": "zero_shot", "classes": "names.txt", "templates": "templates.txt"}
    )
    found = result(model, path)
    images, _, embedded = numpy_embeddings(model, str(folder), Form("class"))
    true = np.array([sorted(NAMES).index(each["class"]) for each in embedded.labels])
    prompts = [t.format(c=n).replace("{}", n) for n in sorted(NAMES) for t in ("a {c}.", "a photo of {c}", "many {c}s")]
    rows = embed_prompts(model, open_pictures(str(folder), Form("class"), 8, 16).tokenizer, prompts, 64, ALONE)
    classes = rows.double().numpy().reshape(6, 3, -1).mean(1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    similar = images @ classes.T
    order = np.argsort(-similar, axis=1)
    assert len(set(order[:, 0].tolist())) > 1
    scores = found.scores
    assert scores["kinds/accuracy@1"] == pytest.approx((order[:, 0] == true).mean())
    assert scores["kinds/accuracy@5"] == pytest.approx((order[:, :5] == true[:, None]).any(1).mean())
    per_class = [(order[true == c, 0] == c).mean() for c in range(6) if (true == c).any()]
    assert scores["kinds/mean_per_class"] == pytest.approx(np.mean(per_class))
    logits = model.scale().item() * similar
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    error = 0.0
    for b in range(15):
        inside = (probability.max(1) > b / 15) & (probability.max(1) <= (b + 1) / 15)
        if inside.any():
            right = (order[inside, 0] == true[inside]).mean()
            error += inside.mean() * abs(right - probability[inside].max(1).mean())
    assert scores["kinds/calibration_error"] == pytest.approx(error, abs=1e-6)
    assert found.chance == {"kinds/accuracy@1": 1 / 6, "kinds/accuracy@5": 5 / 6, "kinds/mean_per_class": 1 / 6}
    for name, (low, high) in found.intervals.items():
        assert low <= high, name
    low, high = found.intervals["kinds/accuracy@1"]
    assert low <= scores["kinds/accuracy@1"] <= high
    assert high - low > 0.1


def test_retrieval_and_pairs_equal_plain_numpy(captions: Path, tmp_path: Path) -> None:
    model = model_that_tells_apart()
    found = result(
        model,
        suite(tmp_path, "photos", str(captions), "retrieval"),
        suite(tmp_path, "order", str(captions), "pairs"),
        suite(tmp_path, "shape", str(captions), "geometry"),
    )
    images, texts, embedded = numpy_embeddings(model, str(captions), Form("captions"))
    owners = embedded.owners.numpy()
    similar = images @ texts.T
    assert similar.shape == (17, sum(1 + i % 3 for i in range(17)))
    for k in (1, 5, 10):
        of_images = np.mean([(owners[np.argsort(-similar[i])[:k]] == i).any() for i in range(17)])
        of_texts = np.mean([owners[j] in np.argsort(-similar[:, j])[:k] for j in range(len(owners))])
        assert found.scores[f"photos/image_to_text@{k}"] == pytest.approx(of_images)
        assert found.scores[f"photos/text_to_image@{k}"] == pytest.approx(of_texts)
    images, texts, _ = numpy_embeddings(model, str(captions), Form("swap"))
    assert len(images) == len(owners)  # a line of the table is a pair
    expected = np.mean([i @ t > i @ w for i, t, w in zip(images, texts[::2], texts[1::2], strict=True)])
    assert found.scores["order/accuracy"] == pytest.approx(expected)
    assert found.chance["order/accuracy"] == 0.5
    assert found.scores["shape/alignment"] == pytest.approx(2 - 2 * np.mean(similar[owners, np.arange(len(owners))]))


def test_the_same_at_any_world_to_the_last_bit(
    folder: Path, captions: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """29 pictures, 17 pictures, 31 captions, in batches of 4: nothing divides."""
    suites = [
        suite(tmp_path, "kinds", str(folder), "zero_shot"),
        suite(tmp_path, "near", {"source": str(folder), "train": str(folder)}, {"kind": "knn_probe", "neighbours": 3}),
        suite(tmp_path, "photos", str(captions), "retrieval"),
        suite(tmp_path, "order", str(captions), "pairs"),
        suite(tmp_path, "shape", str(captions), "geometry"),
        suite(tmp_path, "says", str(captions), {"kind": "captioning", "max_tokens": 6}),
    ]

    def one_rank(group: World) -> dict[str, Any]:
        found = result(model_that_tells_apart(), *suites, world=group)
        return {"scores": found.scores, "intervals": found.intervals, "sizes": found.sizes}

    alone = one_rank(ALONE)
    assert len(alone["scores"]) == 4 + 1 + 6 + 1 + 4 + 2
    for world in (2, 3):
        for ours in on_ranks(world, one_rank):
            assert ours == alone


def test_shards_tables_and_folders_of_one_set_give_one_figure(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    kinds = sorted(NAMES)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i, file in enumerate(files):
            for kind, data in (("png", file.read_bytes()), ("cls", str(kinds.index(file.parent.name)).encode())):
                info = tarfile.TarInfo(f"{i:03}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = "".join(f"{file.relative_to(folder)},{kinds.index(file.parent.name)}\n" for file in files)
    (tmp_path / "table.csv").write_text("path,label\n" + rows)
    names = "".join(json.dumps(row) + "\n" for row in ({"path": str(f), "label": f.parent.name} for f in files))
    (tmp_path / "table.jsonl").write_text(names)
    (tmp_path / "names.json").write_text(json.dumps({"other": ["x"], "mine": kinds}))
    how = {"kind": "zero_shot", "classes": "names.json", "dataset": "mine"}
    found = result(
        model_that_tells_apart(),
        suite(tmp_path, "shards", "set.tar", how),
        suite(tmp_path, "table", {"source": "table.csv", "images": "kinds"}, how),
        suite(tmp_path, "lines", {"source": "table.jsonl", "images": "kinds"}, how),
        suite(tmp_path, "folder", "kinds", how),
    )
    scores = {name: found.scores[f"{name}/mean_per_class"] for name in ("shards", "table", "lines", "folder")}
    assert len(set(scores.values())) == 1, scores
    assert 0 < scores["folder"] < 1


def test_weighted_prompts_and_levels(folder: Path, tmp_path: Path) -> None:
    """Weights as if a prompt were written several times; levels counted by hand."""
    kinds = sorted(NAMES)
    repeated = {k: [f"a {k}", f"a {k}", f"the {k}"] for k in kinds}
    weighted = {k: [{"text": f"a {k}", "weight": 2}, f"the {k}"] for k in kinds}
    above = {"cat": "beast", "dog": "beast", "fox": "beast", "elk": "beast", "owl": "bird", "hen": "bird"}
    for name, content in (
        ("repeated", repeated),
        ("weighted", weighted),
        ("above", above | {"beast": "x", "bird": "x"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    model = model_that_tells_apart()
    found = result(
        model,
        suite(tmp_path, "one", "kinds", {"kind": "zero_shot", "prompts": "repeated.json"}),
        suite(tmp_path, "two", "kinds", {"kind": "zero_shot", "prompts": "weighted.json", "broader": "above.json"}),
    )
    assert found.scores["one/accuracy@1"] == found.scores["two/accuracy@1"]
    assert found.scores["one/calibration_error"] == pytest.approx(found.scores["two/calibration_error"], abs=1e-6)
    images, _, embedded = numpy_embeddings(model, str(folder), Form("class"))
    tokenizer = open_pictures(str(folder), Form("class"), 8, 16).tokenizer
    rows = embed_prompts(model, tokenizer, [p for k in kinds for p in repeated[k]], 64, ALONE)
    unit = rows.double().numpy().reshape(6, 3, -1).mean(1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    nearest = (images @ unit.T).argmax(1)
    right = [above[kinds[n]] == above[each["class"]] for n, each in zip(nearest, embedded.labels, strict=True)]
    assert found.scores["two/broader_1"] == pytest.approx(np.mean(right))
    assert found.scores["two/broader_2"] == 1.0
    share = {"beast": 4 / 6, "bird": 2 / 6}
    assert found.chance["two/broader_1"] == pytest.approx(np.mean([share[above[e["class"]]] for e in embedded.labels]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of options that scikit-learn before 1.9 does not have
@pytest.mark.parametrize("split", [1000])
def test_linear_probe_on_digits_is_as_good_as_scikit_learn(split: int, tmp_path: Path) -> None:
    """Digits as 8 x 8 pictures through a random model; scikit-learn fits the same embeddings."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegressionCV

    digits = load_digits()
    for i, (pixels, kind) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = tmp_path / ("train" if i < split else "test") / str(kind) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(path)
    model = build(SPEC, 3)
    data = {"source": "test", "train": "train"}
    found = result(
        model,
        suite(tmp_path, "digits", data, "linear_probe"),
        suite(tmp_path, "near", data, {"kind": "knn_probe", "neighbours": 1}),
        batch=256,
    )
    features, _, trained = numpy_embeddings(model, str(tmp_path / "train"), Form("class"))
    tested, _, test = numpy_embeddings(model, str(tmp_path / "test"), Form("class"))
    labels, expected = ([each["class"] for each in rows.labels] for rows in (trained, test))
    theirs = LogisticRegressionCV(Cs=np.logspace(-2, 6, 9), cv=3, max_iter=1000, scoring="accuracy").fit(
        features, labels
    )
    assert found.scores["digits/accuracy@1"] == pytest.approx(theirs.score(tested, expected), abs=0.005)
    assert found.scores["digits/accuracy@1"] > 0.8
    nearest = (tested @ features.T).argmax(1)
    assert found.scores["near/accuracy@1"] == pytest.approx(np.mean(np.array(labels)[nearest] == np.array(expected)))


def test_embeddings_are_kept_by_commit_and_data(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    path = suite(tmp_path, "kinds", "kinds", "zero_shot")
    first = result(model_that_tells_apart(), path, embeddings=EmbeddingCache("a", ALONE))
    looked_at: list[int] = []
    embedding = Model.embed_images

    def counted(self: Model, images: torch.Tensor, *rest: Any) -> Any:
        looked_at.append(len(images))
        return embedding(self, images, *rest)

    monkeypatch.setattr(Model, "embed_images", counted)
    other = build(SPEC, 9)  # what is kept under the name of the commit is believed
    assert (
        result(other, path, embeddings=EmbeddingCache("a", ALONE)).scores["kinds/accuracy@1"]
        == first.scores["kinds/accuracy@1"]
    )
    assert looked_at == []
    result(other, path, embeddings=EmbeddingCache("b", ALONE))
    assert sum(looked_at) == 29
    paint(folder / "cat" / "more.png", 77)
    result(other, path, embeddings=EmbeddingCache("b", ALONE))
    assert sum(looked_at) == 29 + 30
    for file in (tmp_path / "cache" / "embeddings").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    result(other, path, embeddings=EmbeddingCache("b", ALONE))
    assert sum(looked_at) == 29 + 30 + 30


def test_captions_are_scored_as_the_packages_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider

    from treering.training.evaluate import captioning

    texts = ["A dog runs in the park.", "two cats sit on a red mat", "an owl"]
    references = [["a dog runs in the park", "a dog in a park"], ["two cats sit on a mat"], ["A night owl!", "an owl"]]
    score, (low, high) = captioning.bleu(texts, references)
    columns = [[each[0] for each in references], [references[0][1], None, references[2][1]]]
    assert score == pytest.approx(sacrebleu.corpus_bleu(texts, columns, lowercase=True).score / 100)
    assert low <= score <= high + 1e-9
    plain = {0: ["a dog runs in the park"], 1: ["two cats sit on a red mat"], 2: ["an owl"]}
    true = {0: references[0], 1: references[1], 2: ["a night owl", "an owl"]}
    assert captioning.ciders(texts, references).tolist() == pytest.approx(
        Cider().compute_score(true, plain)[1].tolist()
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package sacrebleu: pip install 'treering\[captioning\]'"):
        captioning.check_installed(("bleu",))


@pytest.mark.slow
def test_figures_are_those_of_clip_benchmark(
    folder: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metric functions on the same embeddings; skipped where its wheel cannot be fetched."""
    import subprocess
    import sys

    fetched = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "theirs")]
    if subprocess.run([*fetched, "clip-benchmark==1.6.2"], capture_output=True, timeout=200).returncode:
        pytest.skip("no network")
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    class Rows:
        """Gives embeddings by number in place of a model."""

        def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
            self.images, self.texts = images, texts

        def encode_image(self, numbers: torch.Tensor) -> torch.Tensor:
            return self.images[numbers]

        def encode_text(self, numbers: torch.Tensor) -> torch.Tensor:
            return self.texts[numbers]

    model, kinds = model_that_tells_apart(), sorted(NAMES)
    templates = ["a {c}.", "a photo of {c}"]
    found = result(
        model,
        suite(tmp_path, "kinds", "kinds", {"kind": "zero_shot", "templates": templates}),
        suite(tmp_path, "photos", str(captions), "retrieval"),
    )
    data = open_pictures(str(folder), Form("class"), 8, 16)
    rows = embed(model, data, 64, ALONE)
    prompts = [t.format(c=kind) for kind in kinds for t in templates]
    stand_in = Rows(rows.images, embed_prompts(model, data.tokenizer, prompts, 64, ALONE))
    labels = torch.tensor([kinds.index(each["class"]) for each in rows.labels])

    class Batches(list):
        dataset = type("Set", (), {"classes": kinds})

    # Its float(array of one) is refused by this numpy.
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    theirs = zeroshot_classification.evaluate(
        stand_in,
        Batches([(torch.arange(29), labels)]),
        lambda texts: torch.tensor([prompts.index(text) for text in texts]),
        kinds,
        templates,
        "cpu",
        amp=False,
    )
    for ours, name in (("accuracy@1", "acc1"), ("accuracy@5", "acc5"), ("mean_per_class", "mean_per_class_recall")):
        assert found.scores[f"kinds/{ours}"] == pytest.approx(theirs[name]), name
    rows = embed(model, open_pictures(str(captions), Form("captions"), 8, 16), 64, ALONE)
    texts = [[j for j in range(len(rows.owners)) if rows.owners[j] == i] for i in range(17)]
    stand_in = Rows(rows.images, rows.texts)
    theirs = zeroshot_retrieval.evaluate(
        stand_in, [(torch.arange(17), texts)], torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    for k in (1, 5, 10):
        assert found.scores[f"photos/image_to_text@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert found.scores[f"photos/text_to_image@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
