"""Captions with tags and weights: what is read, what is drawn, and that the draw has the promised probabilities."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from treering.data import Batch, DataConfig, DataError, EvaluationSet, Loader, Sample, open_source
from treering.data.config import UNTAGGED, SourceConfig
from treering.data.errors import BadSample
from treering.data.loading.loader import check_tags
from treering.data.order import stream
from treering.data.samples.captions import Caption, draw_caption, probe_numbers, read_texts

WriteTar = Callable[..., Path]


def texts(txt: str | None, **metadata: Any) -> list[tuple[str, str, int]]:
    fields = {} if txt is None else {"txt": txt.encode()}
    return [c[:3] for c in read_texts(fields | {"json": json.dumps(metadata).encode()}).captions]


def test_what_is_read() -> None:
    alt = {"text": " a dog ", "source": "alt"}
    assert texts(None, captions=["x", alt]) == [("x", UNTAGGED, 10**6), ("a dog", "alt", 10**6)]
    assert texts("a dog", captions=["x", alt]) == [("a dog", "alt", 10**6), ("x", UNTAGGED, 10**6)]
    both = [alt, {"text": "a dog", "source": "blip", "weight": 2.5}, alt | {"weight": 7}]
    assert texts(None, captions=both) == [("a dog", "alt", 10**6), ("a dog", "blip", 2_500_000)]
    assert texts("b", captions=["a", "b", "a", "c"]) == [(text, UNTAGGED, 10**6) for text in "bac"]
    assert texts(None, captions=[{"text": "t", "weight": 1e-6, "score": 3}]) == [("t", UNTAGGED, 1)]
    assert texts("t", captions=[], caption="img2dataset's own") == [("t", UNTAGGED, 10**6)]
    assert read_texts({"txt": b"t", "json": b'{"labels": {"a": "b"}, "x": [1]}'}).metadata["x"] == [1]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"source": "alt"}, "captions must be a list of texts or of {text, source, weight}"),
        ({"text": 3}, "captions must be a list"),
        (None, "captions must be a list"),
        ([], "captions must be a list"),
        ("x" * ((1 << 20) + 1), "caption is too long"),
        ({"text": "t", "source": ""}, "a caption's source must be a name of 1 to 100"),
        ({"text": "t", "source": "s" * 101}, "a caption's source"),
        ({"text": "t", "weight": -1}, "a caption's weight must be a number from 0 to 1,000,000"),
        ({"text": "t", "weight": float("nan")}, "a caption's weight"),
        ({"text": "t", "weight": float("inf")}, "a caption's weight"),
        ({"text": "t", "weight": 10**400}, "a caption's weight"),
        ({"text": "t", "weight": True}, "a caption's weight"),
        ({"text": "t", "weight": "1"}, "a caption's weight"),
        ({"text": " ", "source": "alt"}, "caption is empty"),
    ],
)
def test_what_is_wrong(item: Any, reason: str) -> None:
    """Alone it makes a sample bad; beside a good caption, before or behind it, it is skipped and said."""
    with pytest.raises(BadSample) as error:
        texts(None, captions=[item])
    assert reason in str(error.value)
    for captions in ([item, "good"], ["good", item]):
        found = read_texts({"json": json.dumps({"captions": captions}).encode()})
        assert [caption.text for caption in found.captions] == ["good"]
        assert len(found.faults) == 1
        assert reason in found.faults[0]
    assert texts("good", captions=[item]) == [("good", UNTAGGED, 10**6)]


@pytest.mark.parametrize(
    ("txt", "json_", "expected"),
    [
        (b"", b'{"captions": ["a"]}', ["a"]),
        (b" \n\t", b'{"captions": [null, "", "a"]}', ["a"]),
        (b"\xff\xfe", b'{"captions": ["a"]}', ["a"]),
        (b"x" * 2_000_000, b'{"captions": ["a"]}', ["a"]),
        (b"", b'{"caption": "a"}', ["a"]),
        (None, b'{"captions": null, "caption": "a"}', ["a"]),
        (None, b'{"captions": [null], "caption": "a"}', ["a"]),
        (None, b'{"captions": [{"text": "a", "source": null, "weight": null}]}', ["a"]),
        (b"a", b'{"captions": null, "labels": null}', ["a"]),
        (b"a", b'{"captions": {"0": "b"}, "labels": [3, 4]}', ["a"]),
        (b"a", b'{"caption": 7, "labels": {"id": 3, "tone": "dark"}}', ["a"]),
        (b"a", b'{"caption": ', ["a"]),
        (b"a", b"", ["a"]),
        (b"a", b"null", ["a"]),
        (b"a", b"\xff\xfe{\x00}\x00", ["a"]),
        (b"a", b'{"exif": "%s"}' % (b"x" * 3_000_000), ["a"]),
        (b"a", b'{"exif": "%s"}' % (b"x" * 5_000_000), ["a"]),
        (None, b'{"caption": "a", "exif": "%s"}' % (b"x" * 3_000_000), ["a"]),
        (b"a", b'{"n": 1%s}' % (b"0" * 5_000), ["a"]),
        (b"a", b'{"deep": %s' % (b"[" * 100_000), ["a"]),
        (b"a", b'{"captions": ["\\ud800", {"text": "b"}]}', ["a", "b"]),
    ],
)
def test_what_is_beside_the_point_makes_no_sample_bad(txt: bytes | None, json_: bytes, expected: list[str]) -> None:
    fields = {"json": json_} | ({} if txt is None else {"txt": txt})
    assert [caption.text for caption in read_texts(fields).captions] == expected


def test_metadata_that_is_needed_must_be_readable() -> None:
    for json_ in (b"{", b"[1]", b"\xff", b" " * 5_000_000):
        with pytest.raises(BadSample, match=r"^metadata is "):
            read_texts({"txt": b"a", "json": json_}).whole_metadata()
    assert read_texts({"txt": b"a", "json": b'{"captions": 3, "x": 1}'}).whole_metadata() == {"captions": 3, "x": 1}
    assert read_texts({"txt": b"a", "json": b'{"labels": {"id": 3, "tone": "dark"}}'}).labels == {"tone": "dark"}


def expected_shares(captions: list[Caption], shares: dict[str, int]) -> dict[Caption, Fraction]:
    """The chance of each caption, by the words of the documentation."""
    tags = {c.tag for c in captions if c.weight}
    total = sum(Fraction(weight) for tag, weight in shares.items() if tag in tags)
    chance = {}
    for caption in captions:
        same = [c for c in captions if not shares or c.tag == caption.tag]
        own = Fraction(caption.weight, sum(c.weight for c in same) or 1)
        chance[caption] = own * (Fraction(shares.get(caption.tag, 0)) / total if shares else 1)
    return chance


@pytest.mark.parametrize("shares", [{}, {"alt": 1}, {"alt": 1, "blip": 3}, {"alt": 2, "blip": 1, "untagged": 1}])
def test_drawn_in_the_promised_shares(shares: dict[str, float]) -> None:
    captions = [
        Caption("a", "alt"), Caption("b", "blip", 10**6), Caption("c", "blip", 3 * 10**6), Caption("d"),
        Caption("never", "alt", 0), Caption("e", "alt", 500_000),
    ]  # fmt: skip
    config = SourceConfig(source="x", caption_weights=shares)
    count = 20_000
    found = Counter(draw_caption(captions, config.tag_weights, stream(3, "caption", n)) for n in range(count))
    for caption, chance in expected_shares(captions, config.tag_weights).items():
        spread = 4.5 * (count * float(chance * (1 - chance))) ** 0.5
        assert abs(found[caption] - count * float(chance)) <= spread, caption


def test_the_draw_by_hand() -> None:
    """Whole numbers below the sum of the weights, divided by what they share: 1, 3 and then 2, 6 -> 1, 3."""
    captions = [Caption("a", "alt"), Caption("b", "blip", 2 * 10**6), Caption("c", "blip", 6 * 10**6)]
    shares = SourceConfig(source="x", caption_weights={"blip": 3, "alt": 1}).tag_weights
    assert list(shares) == ["alt", "blip"]  # by name, whatever the recipe's order
    for n in range(200):
        random = stream(0, "caption", n)
        expected = "a" if random.integers(4) < 1 else "bccc"[random.integers(4)]
        assert draw_caption(captions, shares, stream(0, "caption", n)).text == expected


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9), st.integers(0, 2**32))
def test_plain_captions_are_drawn_alike(plain: list[str], seed: int) -> None:
    index = int(np.random.default_rng(seed).integers(len(plain)))
    assert draw_caption([Caption(t) for t in plain], {}, np.random.default_rng(seed)).text == plain[index]


def test_nothing_to_draw() -> None:
    captions = [Caption("a", "alt"), Caption("b", "blip", 0), Caption("c", "\x1b[2J")]
    random = np.random.default_rng(0)
    with pytest.raises(BadSample, match=r"^no caption from 'blip', 'x': found '\\x1b\[2J', 'alt', 'blip'$"):
        draw_caption(captions, {"blip": 1, "x": 1}, random)
    with pytest.raises(BadSample, match="no caption to draw: all have the weight 0"):
        draw_caption([captions[1]], {}, random)


def test_looks_are_spread_and_distinct() -> None:
    assert probe_numbers(1) == [0]
    assert sorted(probe_numbers(100)) == list(range(100))
    many = probe_numbers(1_000_000)
    assert len(many) == len(set(many)) == 256
    assert many[:3] == [0, 62_500, 125_000]
    assert max(probe_numbers(300)) < 300


def test_weights_of_tags_are_checked() -> None:
    for weight in (0, -1, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValidationError, match=r"caption_weights\.alt = .* must be from 0\.000001"):
            SourceConfig(source="x", caption_weights={"alt": weight})


# In a run


RESOLUTION = 16


@pytest.fixture(scope="module")
def tagged_url(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> str:
    """24 samples with an alt text and three recaptions; those whose number 6 divides have alt texts alone."""
    members = []
    for n in range(24):
        file = io.BytesIO()
        Image.new("RGB", (RESOLUTION, RESOLUTION), (n, 0, 0)).save(file, "PNG")
        captions: list[Any] = [{"text": f"alt {n}", "source": "alt"}]
        if n % 6:
            captions += [{"text": f"re {n} {i}", "source": "recaption", "weight": 1 + i} for i in range(3)]
        members += [(f"{n:02}.png", file.getvalue()), (f"{n:02}.txt", f"alt {n}".encode())]
        members.append((f"{n:02}.json", json.dumps({"captions": captions}).encode()))
    return str(write_tar(tmp_path_factory.mktemp("tagged") / "0.tar", members))


def batches(url: str, steps: int, world: int = 1, rank: int = 0, **source: Any) -> list[Batch]:
    config = DataConfig.model_validate({"train": [{"source": url, **source}], "batch": 8})
    with closing(Loader(config, RESOLUTION, 12, 1, rank, world).batches(0)) as each:
        return list(islice(each, steps))


def test_a_run_draws_by_tag(tagged_url: str) -> None:
    found: Counter[str] = Counter()
    for batch in batches(tagged_url, 300, caption_weights={"alt": 1, "recaption": 3}):
        assert not batch.bad
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert int(caption.split()[1]) == int(key)
            if int(key) % 6:
                found[caption.split()[0]] += 1
                found[caption.split()[-1]] += caption.startswith("re ")
    total = found["alt"] + found["re"]
    assert total == 2000
    assert abs(found["re"] / total - 0.75) < 0.05
    assert abs(found["2"] / found["re"] - 0.5) < 0.06  # weights 1, 2, 3


def test_a_sample_without_an_allowed_tag_is_bad(tagged_url: str) -> None:
    one = batches(tagged_url, 3, caption_weights={"recaption": 1})
    bad = {entry.key: entry.reason for batch in one for entry in batch.bad}
    assert bad == dict.fromkeys(("00", "06", "12", "18"), "no caption from 'recaption': found 'alt'")
    assert all(caption.startswith("re ") for batch in one for caption in batch.captions)
    halves = [batches(tagged_url, 3, 2, rank, caption_weights={"recaption": 1}) for rank in range(2)]
    for i, batch in enumerate(one):
        assert batch.captions == halves[0][i].captions + halves[1][i].captions


def test_unknown_tags_are_refused_before_a_run(tagged_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as error:
        batches(tagged_url, 1, caption_weights={"alt": 1, "recaptoin": 3})
    assert str(error.value) == (
        f"{tagged_url}: caption_weights names 'recaptoin', but none of 24 inspected samples has it; "
        f"found 'alt' (24 samples), 'recaption' (20 samples); correct the name or remove it"
    )
    source = open_source(tagged_url)
    read, record = [], source.record
    monkeypatch.setattr(source, "record", lambda n, kinds: read.append((n, kinds)) or record(n, kinds), raising=False)
    check_tags(source, ["alt", "recaption"], {})
    assert read == [(0, {"txt", "json"}), (1, {"txt", "json"})]  # no more than it takes, and no pictures
    check_tags(source, [], {})
    assert len(read) == 2


def test_evaluation_sees_all_captions(tagged_url: str) -> None:
    sample = EvaluationSet(tagged_url, RESOLUTION, 12).sample(1)
    assert isinstance(sample, Sample)
    assert sample.captions == ("alt 1", "re 1 0", "re 1 1", "re 1 2")
    assert sample.caption == "alt 1"
