"""Labels as captions: in the promised shares, equal by class, in shards with labels alone, whatever a label holds."""

from __future__ import annotations

import io
import json
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from treering.data.config import DataConfig, SourceConfig
from treering.data.errors import BadSample, DataError
from treering.data.loading.loader import Loader
from treering.data.order import stream
from treering.data.samples.captions import draw_caption, read_texts
from treering.data.samples.sample import Batch, caption_id
from treering.data.shards.source import open_source
from treering.data.tools.lint import examine_sample
from treering.data.tools.pack_input import folder_items
from treering.tests.support.made_up_shards import shard

SIDE = 16
TEMPLATES = {"animal": ("a photo of a {}", "{c} in the wild"), "tone": ("{}",)}


def read(labels: Any, txt: str | None = "own", templates: dict[str, tuple[str, ...]] = TEMPLATES) -> list[str]:
    fields = {"json": json.dumps({"labels": labels}).encode()} | ({"txt": txt.encode()} if txt else {})
    return [caption.text for caption in read_texts(fields, templates).captions]


def test_what_labels_become() -> None:
    assert read({"animal": "cat", "other": "x"}) == ["own", "a photo of a cat", "cat in the wild"]
    assert read({"animal": ["cat", "dog"], "tone": "dark"}, None) == [
        "a photo of a cat", "cat in the wild", "a photo of a dog", "dog in the wild", "dark",
    ]  # fmt: skip
    assert read({"animal": "{} or {c}"}, None) == ["a photo of a {} or {c}", "{} or {c} in the wild"]
    assert read({"animal": "cat"}, "own", {}) == ["own"]
    found = read_texts({"json": b'{"labels": {"animal": ["cat", "dog"], "tone": "dark"}}'}, TEMPLATES)
    assert found.labels == {"tone": "dark"}  # what the scores go by: one class a picture
    assert [caption.tag for caption in found.captions] == ["label:animal"] * 4 + ["label:tone"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"animal": " "}, "label 'animal' is empty"),
        ({"animal": "x" * 1001}, "label 'animal' is too long: 1,001 characters"),
        ({"animal": "\ud800"}, "label 'animal' is not Unicode"),
        ({"animal": 3}, "no caption: neither .txt nor captions in .json, nor a label 'animal', 'tone'"),
        ({"animal": []}, "nor a label 'animal'"),
        (["cat"], "labels must map names to classes"),
        ({}, "nor a label 'animal'"),
    ],
)
def test_labels_that_cannot_be_used(labels: Any, reason: str) -> None:
    """Alone they make a sample bad; beside a caption they are listed."""
    with pytest.raises(BadSample, match=reason):
        read(labels, None)
    assert read(labels) == ["own"]


def test_a_class_number_is_not_a_caption() -> None:
    templates = {"cls": ("a {}",)}
    assert [c.text for c in read_texts({"cls": b"cat\n"}, templates).captions] == ["a cat"]
    with pytest.raises(BadSample, match=r"label cls is a number, '7': only a class's name makes a caption"):
        read_texts({"cls": b"7"}, templates)


@pytest.mark.parametrize("weights", [{}, {"alt": 3, "label:animal": 1}])
def test_drawn_in_the_promised_shares(weights: dict[str, float]) -> None:
    """Without weights a label counts as one caption, however many templates it has; a tag has its weight."""
    fields = {
        "json": json.dumps({"captions": [{"text": "own", "source": "alt"}], "labels": {"animal": "cat"}}).encode()
    }
    captions, count = read_texts(fields, TEMPLATES).captions, 6000
    config = SourceConfig(source="x", caption_weights=weights)
    found = Counter(draw_caption(captions, config.tag_weights, stream(1, "label", n)).text for n in range(count))
    own = 0.75 if weights else 0.5
    for text, chance in {"own": own, "a photo of a cat": (1 - own) / 2, "cat in the wild": (1 - own) / 2}.items():
        deviation = (count * chance * (1 - chance)) ** 0.5
        assert abs(found[text] - count * chance) < 4 * deviation, found


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"animal": ["a photo"]}, "labels.animal: 'a photo' has no place for the class; write {} or {c} in it"),
        ({"animal": []}, "labels.animal is empty"),
        ({"animal": 3}, "labels.animal"),
    ],
)
def test_templates_are_checked(labels: Any, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        SourceConfig.model_validate({"source": "x", "labels": labels})
    assert said in str(error.value)
    assert SourceConfig.model_validate({"source": "x", "labels": {"animal": "a {}"}}).labels == {"animal": ("a {}",)}


# In a run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 samples with labels alone: three classes in turn."""
    members = []
    for n in range(24):
        file = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (n, 0, 0)).save(file, "PNG")
        members += [(f"{n:02}.png", file.getvalue())]
        members += [(f"{n:02}.json", json.dumps({"labels": {"animal": ("cat", "dog", "owl")[n % 3]}}).encode())]
    return str(shard(tmp_path_factory.mktemp("labelled") / "0.tar", members))


def batches(url: str, steps: int, world: int = 1, rank: int = 0, **source: Any) -> list[Batch]:
    config = DataConfig.model_validate({"train": [{"source": url, **source}], "batch": 8})
    with closing(Loader(config, SIDE, 12, 1, rank, world).batches(0)) as each:
        return list(islice(each, steps))


def test_shards_with_labels_alone_are_trained_on(labelled: str) -> None:
    """Pairs of a class have one id whatever their template, that of the plain caption; all ranks draw alike."""
    templates = {"animal": ["{}", "a photo of a {}"]}
    one = batches(labelled, 6, labels=templates)
    drawn = set()
    for batch in one:
        assert not batch.bad
        for key, caption, number in zip(batch.keys, batch.captions, batch.caption_ids.tolist(), strict=True):
            name = ("cat", "dog", "owl")[int(key) % 3]
            assert caption in (name, f"a photo of a {name}")
            assert number == caption_id(name)
            drawn.add(caption)
    assert len(drawn) == 6
    halves = [batches(labelled, 6, 2, rank, labels=templates) for rank in range(2)]
    assert [batch.captions for batch in one] == [a.captions + b.captions for a, b in zip(*halves, strict=True)]


def test_labels_that_no_sample_has_are_refused_before_a_run(labelled: str) -> None:
    with pytest.raises(
        DataError, match=r"labels names 'animla', but none of 24 .*; found 'label:animal' \(24 samples\)"
    ):
        batches(labelled, 1, labels={"animla": "a {}"})
    with pytest.raises(DataError, match=r"caption_weights names 'alt', but none"):
        batches(labelled, 1, labels={"animal": "a {}"}, caption_weights={"alt": 1})
    with pytest.raises(DataError, match=r"no caption, only labels, which data.train\[i\].labels makes captions of"):
        batches(labelled, 1)


def test_the_tools_take_what_training_can(labelled: str, tmp_path: Path) -> None:
    assert examine_sample(open_source(labelled), 3) is None
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"labels": {"animal": "cat"}}')
    (item,) = folder_items(tmp_path)
    assert item.members().keys() == item.sizes.keys() == {"png", "json"}
    assert json.loads(item.json)["labels"] == {"animal": "cat"}
