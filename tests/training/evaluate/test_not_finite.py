"""What is not finite is wrong, never right, in every protocol, and said; equal texts count as one, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from treering.data.errors import DataError
from treering.data.evaluation_sets import Form
from treering.models.model import Model
from treering.tests.support.small_suites import (
    ALONE,
    NAMES,
    label,
    model_that_tells_apart,
    numpy_embeddings,
    paint,
    result,
    suite,
)
from treering.training.evaluate import generate, retrieval, zero_shot
from treering.training.evaluate.compatibility import compatibility
from treering.training.evaluate.embed import Embedded
from treering.training.evaluate.outcome import Evaluation
from treering.training.evaluate.protocols import add_geometry, add_retrieval
from treering.training.logging.jsonl import RunRecords

NAN = float("nan")
DAMAGE = {
    "picture side": "image.projection.weight",
    "text side": "text.projection.weight",
    "both": "logit_scale",
    "first layer": "image.patches.weight",
}


def damaged(name: str, value: float = NAN) -> Model:
    model = model_that_tells_apart()
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(value)
    return model


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Any]:
    """Suites of every protocol on a few pictures: one class, one caption, one picture would be right by chance."""
    for i in range(12):
        paint(tmp_path / "kinds" / NAMES[label(i)] / f"{i:02}.png", i)
        paint(tmp_path / "few" / NAMES[label(i)] / f"{i:02}.png", i + 50)
    rows = [["path", "caption", "swapped"], ["0.png", "a cat on a dog", "a dog on a cat"]]
    paint(tmp_path / "one" / "0.png", 5)
    (tmp_path / "one" / "table.csv").write_text("\n".join(",".join(row) for row in rows))
    (tmp_path / "broader.json").write_text(json.dumps(dict.fromkeys(NAMES, "animal")))
    kinds = {"source": "kinds", "train": "few"}
    return {
        "zero": suite(tmp_path, "zero", "kinds", {"kind": "zero_shot", "broader": "broader.json"}),
        "linear": suite(tmp_path, "linear", kinds, "linear_probe"),
        "knn": suite(tmp_path, "knn", kinds, {"kind": "knn_probe", "neighbours": 3}),
        "found": suite(tmp_path, "found", "one/table.csv", "retrieval"),
        "swap": suite(tmp_path, "swap", "one/table.csv", "pairs"),
        "shape": suite(tmp_path, "shape", "one/table.csv", "geometry"),
    }


@pytest.mark.parametrize("where", ["picture side", "text side", "first layer"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_no_protocol_has_anything_right(where: str, value: float, sets: dict[str, Any]) -> None:
    """One picture with one caption is right by any order, all classes have one broader class; still nothing is."""
    found = result(damaged(DAMAGE[where], value), *sets.values())
    blind = {"linear", "knn"} if where == "text side" else set()  # probes read pictures alone
    rights = {key: score for key, score in found.scores.items() if key.split("/")[0] not in blind}
    assert all(np.isfinite(score) for score in found.scores.values())
    assert {key for key, score in rights.items() if score} == set()
    assert {"zero/accuracy@1", "found/image_to_text@10", "swap/accuracy", "zero/broader_1"} <= rights.keys()
    assert "zero/calibration_error" in found.undefined
    assert "shape/modality_gap" in found.undefined
    assert any("not finite and count as wrong" in note for note in found.notes)


def test_one_broken_picture_is_one_wrong_picture(sets: dict[str, Any], tmp_path: Path) -> None:
    """The others keep their ranks: what has no score is nobody's rival."""
    images, texts = torch.randn(6, 4), torch.randn(6, 4)
    owners = torch.arange(6)
    before = retrieval.ranks(images, texts, owners)
    broken = images.clone()
    broken[2] = NAN
    of_images, of_texts = retrieval.ranks(broken, texts, owners)
    others = owners != 2
    assert torch.equal(of_images[others], before[0][others])
    assert of_images[2] == of_texts[2] == retrieval.NEVER
    assert (of_texts[others] <= before[1][others]).all()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert zero_shot.rivals(broken, texts[:3], labels)[2] == retrieval.NEVER
    assert zero_shot.nearest(broken, texts[:3])[2] == -1


@given(st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False), st.floats(0, 1))
def test_ranks_are_those_of_a_plain_count(pictures: int, captions: int, random: Any, share: float) -> None:
    """With equal captions, several pictures a caption, ties, and scores that are not finite."""
    values = [0.0, 0.5, 1.0, NAN, float("inf")] if share < 0.5 else [0.0, 0.25, 1.0]
    images = torch.tensor([[random.choice(values) for _ in range(2)] for _ in range(pictures)])
    texts = torch.tensor([[random.choice(values) for _ in range(2)] for _ in range(captions)])
    pairs = [(random.randrange(pictures), caption) for caption in range(captions)]
    pairs += [(random.randrange(pictures), random.randrange(captions)) for _ in range(2)]
    picture_p, caption_p = (torch.tensor(each) for each in zip(*pairs, strict=True))
    found = retrieval.ranks(images, texts, picture_p, caption_p)
    score = (images @ texts.T).numpy()
    for n, rank in enumerate(found[0].tolist()):
        right = {c for p, c in pairs if p == n}
        best = max((score[n, c] for c in right if np.isfinite(score[n, c])), default=None)
        count = sum(score[n, c] >= best for c in range(captions) if c not in right) if best is not None else None
        assert rank == (retrieval.NEVER if count is None else count)
    for m, rank in enumerate(found[1].tolist()):
        right = {p for p, c in pairs if c == m}
        best = max((score[p, m] for p in right if np.isfinite(score[p, m])), default=None)
        count = sum(score[p, m] >= best for p in range(pictures) if p not in right) if best is not None else None
        assert rank == (retrieval.NEVER if count is None else count)


def test_equal_captions_are_one_as_in_training() -> None:
    """Three pictures of a dog with the very same words: any of them is right, and a list shows the words once."""
    captions = ["a dog", "A  dog ", "a dog", "a cat"]
    images = torch.eye(4)
    texts = torch.stack([images[0], images[0], images[0], images[3]])
    data = Embedded(images, texts, torch.arange(4), [0, 1, 2, 3], captions, [{}] * 4, [], list("abcd"))
    found = Evaluation()
    add_retrieval("r", data, found)
    assert found.scores["r/text_to_image@1"] == 1.0
    assert len(found.queries["r/text_to_image@1"]) == 2
    assert found.sizes["r"] == 2
    assert found.notes == ["r: 2 of 4 captions equal others; equal ones count as one"]
    # Two words for four pictures: half are found by chance; a word has three right pictures of four, or one.
    assert found.chance["r/image_to_text@1"] == pytest.approx(0.5)
    assert found.chance["r/text_to_image@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    same = Embedded(torch.eye(3), torch.eye(3), torch.arange(3), [0, 1, 2], ["x"] * 3, [{}] * 3, [], list("abc"))
    alone = Evaluation()
    add_retrieval("r", same, alone)
    assert set(alone.scores.values()) == {1.0}
    assert alone.chance == dict.fromkeys(alone.scores, 1.0)


def test_equal_class_names_are_one(tmp_path: Path) -> None:
    """ImageNet has two cranes: their prompts are equal, so a picture of either is of both."""
    for i in range(8):
        paint(tmp_path / "set" / str(i % 4) / f"{i}.png", i)
    (tmp_path / "names.txt").write_text("crane\nowl\nCrane\nfox\n")
    found = result(
        model_that_tells_apart(), suite(tmp_path, "birds", "set", {"kind": "zero_shot", "classes": "names.txt"})
    )
    assert found.chance["birds/accuracy@1"] == pytest.approx(1 / 3)
    assert found.notes == ["birds: 1 of 4 class names equal others; equal ones count as one"]
    images, _, embedded = numpy_embeddings(model_that_tells_apart(), str(tmp_path / "set"), Form("class"))
    true = np.array([[0, 1, 0, 2][int(each["class"])] for each in embedded.labels])
    rows = model_prompts(["crane", "owl", "fox"])
    assert found.scores["birds/accuracy@1"] == pytest.approx(((images @ rows.T).argmax(1) == true).mean())


def model_prompts(texts: list[str]) -> np.ndarray:
    from treering.data.samples.tokenizer import open_tokenizer
    from treering.training.evaluate.embed import embed_prompts

    return embed_prompts(model_that_tells_apart(), open_tokenizer("clip"), texts, 8, ALONE).double().numpy()


def test_a_swapped_caption_that_is_the_true_one_is_said(tmp_path: Path) -> None:
    paint(tmp_path / "0.png", 1)
    (tmp_path / "t.csv").write_text("path,caption,swapped\n0.png,a dog,a  DOG\n")
    found = result(model_that_tells_apart(), suite(tmp_path, "s", "t.csv", "pairs"))
    assert found.scores["s/accuracy"] == 0.0
    assert found.notes == ["s: in 1 of 1 pairs both captions are equal, which count as wrong"]


def test_a_number_may_be_a_swapped_caption(tmp_path: Path) -> None:
    """A cell such as 7 is read as a number, in a table of any kind; other things are named for what they are."""
    paint(tmp_path / "0.png", 1)
    (tmp_path / "t.csv").write_text("path,caption,swapped\n0.png,7,8\n")
    (tmp_path / "t.jsonl").write_text('{"path": "0.png", "caption": "a dog", "swapped": 8.5}\n')
    for table in ("t.csv", "t.jsonl"):
        assert "s/accuracy" in result(model_that_tells_apart(), suite(tmp_path, "s", table, "pairs")).scores
    for value, said in (
        ("true", "is 'true', not a text"),
        ("[1]", r"is '\[1\]', not a text"),
        ('" "', "is missing or empty"),
    ):
        (tmp_path / "t.jsonl").write_text(f'{{"path": "0.png", "caption": "a dog", "swapped": {value}}}\n')
        with pytest.raises(DataError, match=rf"line 1: no swapped caption: 'swapped' {said}"):
            result(model_that_tells_apart(), suite(tmp_path, "s", "t.jsonl", "pairs"))


def test_a_score_without_a_value_is_left_out_and_said() -> None:
    one = Embedded(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), [0], ["x"], [{}], [], ["a"])
    found = Evaluation()
    add_geometry("geometry", one, found)
    assert found.undefined == ["geometry/uniformity_image", "geometry/uniformity_text"]
    assert set(found.scores) == {"geometry/modality_gap", "geometry/alignment"}
    assert "geometry/uniformity_image is nan here and is left out" in found.notes[0]


@pytest.mark.parametrize("kind", ["greedy", "beam", "nucleus"])
def test_a_broken_captioner_says_nothing(kind: Any) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    written = generate.write(kind, damaged("captioner.transformer.norm.weight"), images, 1, 2, 9)
    assert written == [[], []]


def test_compatibility_has_nothing_right_either() -> None:
    images = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    broken = torch.full_like(images, NAN)
    numbers, words = list(range(8)), [f"c{i}" for i in range(8)]
    old, new = (Embedded(rows, rows, torch.arange(8), numbers, words, [{}] * 8, []) for rows in (images, broken))
    with pytest.raises(ValueError, match="embeddings of the texts are not finite"):
        compatibility(old, new, images, broken)
    half = images.clone()
    half[0] = NAN
    found = compatibility(old, new, images.repeat(3, 1), half.repeat(3, 1))
    assert set(found.scores["new"].values()) == {0.0}


def test_records_are_json(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.write_json("x.json", {"a": [NAN, (float("inf"), 1.0)], "b": NAN})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {"a": [None, [None, 1.0]], "b": None}


def test_figures_name_their_data(sets: dict[str, Any], tmp_path: Path) -> None:
    found = result(model_that_tells_apart(), *sets.values())
    assert found.data["zero"] == str(tmp_path / "kinds")
    assert found.data["linear"] == f"{tmp_path / 'kinds'}, trained on {tmp_path / 'few'}"
    assert found.data.keys() == sets.keys()


def test_pictures_of_one_colour(tmp_path: Path) -> None:
    """A picture that a model maps to zero has no direction: ties with everything, so it is wrong, and nothing fails."""
    (tmp_path / "p").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "p" / f"{i}.png")
    (tmp_path / "p" / "t.csv").write_text("path,caption\n0.png,a\n1.png,b\n2.png,c\n")
    found = result(damaged("image.projection.weight", 0.0), suite(tmp_path, "r", "p/t.csv", "retrieval"))
    assert found.scores["r/image_to_text@1"] == 0.0
