"""Token ids against open_clip's SimpleTokenizer."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data.samples.clip_tokenizer import END, START, Tokenizer, clean_text, encode_truncated

OURS = Tokenizer()
TRICKY = [
    "", " ", "a dog", "It's THE dog's, they'll've", "'S 'ſ İstanbul ﬁ K ß", "&amp;amp; &lt;b&gt; &eacute; &#x1F600;",
    "<start_of_text> x <END_OF_TEXT>", "\x00\x07\x1b[31mred\x1b[0m", "👩🏾‍🚒 woman firefighter 🇫🇷", "schÃ¶n â€™s",
    "日本語のテキスト 한국어", "1234 ½ ² ٣", "\u2028\u200d\ufeff\u00ad", "don’t “quote” it", "a" * 300, "ab" * 200,
    "!?" * 100, "1 < 2 &amp;amp;lt; 3", "x\ty\nz\r\n", "\ufffd\ufffe",
]  # fmt: skip


@pytest.fixture(scope="session")
def theirs(open_clip_tokenizer: ModuleType):
    return open_clip_tokenizer.SimpleTokenizer()


def assert_equal(theirs, text: str, context: int = 77) -> None:
    expected = theirs(text, context)[0].tolist()
    ids = OURS.encode(text, context)
    assert ids == expected[: len(ids)], text
    assert not any(expected[len(ids) :])  # theirs is padded with zeros


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts(theirs, text: str) -> None:
    for context in (2, 5, 77, 300):
        assert_equal(theirs, text, context)


@given(text=st.text(max_size=60))
@settings(max_examples=1500, deadline=None)
def test_any_text(theirs, text: str) -> None:
    assert_equal(theirs, text)


PIECES = [
    "the ", "&amp;", "&lt;", "&#x1F600;", "&eacute", "'ll", "é", "e\u0301", "ß", "\u200d", "🏾", "👩", "🇫🇷", "9", "_",
    "-", "Ã©", "\n", "İ", "\x01", "\x1b[31m", "\x7f", "\x85", "一", "ا", "'", "<start_of_text>",
]  # fmt: skip


@pytest.mark.parametrize("count", [8_000, pytest.param(120_000, marks=pytest.mark.slow)])
def test_many_strings(theirs, count: int) -> None:
    """Words in Latin letters merge most; mixtures of scripts, emoji, entities and control characters meet the cleaning;
    and captions as they are written, of words that recur."""
    draw = random.Random(count)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randrange(1, 9))) for _ in range(500)]
    for n in range(count):
        if n % 3 == 0:
            text = "".join(draw.choice("etaoinshrdlu ") for _ in range(draw.randrange(80)))
        elif n % 3 == 1:
            text = draw.choice((" ", "-", ", ")).join(draw.choices(words, k=draw.randrange(1, 25))).capitalize()
        else:
            letters = [*PIECES, chr(draw.randrange(0xD7FF)), chr(draw.randrange(0x1F000, 0x1FB00))]
            text = "".join(draw.choice(letters) for _ in range(draw.randrange(30)))
        assert_equal(theirs, text)


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_clean_as_open_clip(open_clip_tokenizer: ModuleType, text: str) -> None:
    assert clean_text(text) == open_clip_tokenizer._clean_lower(text)


@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_clean_plain_text_as_open_clip(open_clip_tokenizer: ModuleType, text: str) -> None:
    assert clean_text(text) == open_clip_tokenizer._clean_lower(text)


def test_decode() -> None:
    ids = OURS.encode("Woman Firefighter: dark skin 👩", 77)
    assert ids[0] == START
    assert ids[-1] == END
    assert OURS.decode(ids) == "woman firefighter : dark skin 👩"
    assert OURS.decode([START, END, 60_000, -1]) == ""
    assert OURS.decode(OURS.encode("👩", 77)[1:2]) != ""  # half a character is still text


def test_decode_every_id_as_open_clip(theirs) -> None:
    for i in range(START):
        assert OURS.decode([i]) == theirs.decode([i]).strip()


@given(st.text(max_size=60), st.integers(2, 12))
@settings(deadline=None)
def test_a_caption_that_does_not_fit_is_told_from_one_that_does(text: str, context: int) -> None:
    ids, cut = encode_truncated(OURS, text, context)
    assert ids == OURS.encode(text, context)
    assert cut == (len(OURS.encode(text, 1000)) > context)
