"""A sample's texts: its captions with tags and weights, and the draw of the one that training uses at a position.

key.txt is one caption. key.json may hold more captions and other metadata of the picture:
`{"captions": [TEXT or {"text": TEXT, "source": TAG, "weight": 2.5}, ...], "labels": {NAME: CLASS}, ...}`. A plain text
has the tag `untagged` and the weight 1.

The draw has two steps. If the recipe gives a source weights by tag (`caption_weights: {alt: 1, recaption: 3}`), a tag
is drawn by these weights among those that the sample has; then one of its captions is drawn by the captions' weights.
So a tag keeps its probability however many captions it has. Weights are integers in millionths: the draw is exact, and
depends only on the seed, the position and the sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import CAPTION_UNIT, UNTAGGED
from ..errors import BadSample, shown
from .clip_tokenizer import clean_text
from .draws import Draws

if TYPE_CHECKING:
    import numpy as np

    from .draws import Draws

MOST_TEXT = 1 << 20  # bytes of a caption or its metadata
_MOST_CAPTIONS = 10_000
_LONGEST_TAG = 100
_HEAVIEST = 1_000_000
_LOOKS = 16  # places in a source that are probed, and samples at each of them


class Caption(NamedTuple):
    """One caption of a sample."""

    text: str
    tag: str = UNTAGGED
    weight: int = CAPTION_UNIT  # millionths


class Texts(NamedTuple):
    """The texts and metadata of a sample."""

    captions: tuple[Caption, ...]  # the one of the .txt first; unique in (text, tag)
    labels: dict[str, str]
    metadata: dict[str, Any]  # the whole .json


def read_texts(fields: Mapping[str, bytes]) -> Texts:
    """The captions, labels and metadata among a record's members. Raises BadSample.

    An untagged caption that also occurs with a tag is dropped. img2dataset's "caption" is used only if there is no
    other caption.
    """
    metadata = _metadata(fields["json"]) if "json" in fields else {}
    captions = [Caption(_text(fields["txt"], "caption").strip())] if "txt" in fields else []
    first = captions[0].text if captions else ""
    additional = metadata.get("captions", [metadata["caption"]] if metadata.get("caption") and not captions else [])
    if not isinstance(additional, list) or len(additional) > _MOST_CAPTIONS:
        raise BadSample("metadata is wrong: captions must be a list of texts or of {text, source, weight}")
    captions += [_caption(each) for each in additional]
    if not captions:
        raise BadSample("no caption: neither .txt nor captions in .json")
    tagged = {caption.text for caption in captions if caption.tag != UNTAGGED}
    if tagged:
        captions = [caption for caption in captions if caption.tag != UNTAGGED or caption.text not in tagged]
        captions.sort(key=lambda caption: caption.text != first)
    unique: dict[tuple[str, str], Caption] = {}
    for caption in captions:
        check_text(caption.text, "caption")
        unique.setdefault((caption.text, caption.tag), caption)
    labels = metadata.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise BadSample("metadata is wrong: labels must map names to classes")
    return Texts(tuple(unique.values()), labels, metadata)


def draw_caption(
    captions: Sequence[Caption], tag_weights: Mapping[str, int], random: Draws | np.random.Generator
) -> Caption:
    """One caption: a tag drawn by `tag_weights` (empty: all tags together), then a caption of it drawn by its weight.
    Raises BadSample if there is none to draw."""
    allowed = [caption for caption in captions if caption.weight]
    if tag_weights:
        present = {caption.tag for caption in allowed}
        tags = [tag for tag in tag_weights if tag in present]
        if not tags:
            wanted, found = (", ".join(shown(tag, 40) for tag in each) for each in (tag_weights, tags_of(captions)))
            raise BadSample(f"no caption from {wanted}: found {found}")
        tag = tags[_weighted([tag_weights[tag] for tag in tags], random)]
        allowed = [caption for caption in allowed if caption.tag == tag]
    if not allowed:
        raise BadSample("no caption to draw: all have the weight 0")
    return allowed[_weighted([caption.weight for caption in allowed], random)]


def tags_of(captions: Iterable[Caption]) -> list[str]:
    return sorted({caption.tag for caption in captions})


def _weighted(weights: Sequence[int], random: Draws | np.random.Generator) -> int:
    """An index, drawn with probability exactly proportional to its weight."""
    unit = gcd(*weights)
    at = int(random.integers(sum(weights) // unit))
    for i, weight in enumerate(weights):
        at -= weight // unit
        if at < 0:
            return i
    raise AssertionError("the weights are their sum")


def probe_numbers(length: int) -> list[int]:
    """The numbers of the samples that are inspected before a run: a few from each of several places in a source of
    `length` samples, the places in turn."""
    numbers = (place * length // _LOOKS + step for step in range(_LOOKS) for place in range(_LOOKS))
    return list(dict.fromkeys(number for number in numbers if number < length))


def _caption(item: object) -> Caption:
    if isinstance(item, str):
        return Caption(item.strip())
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise BadSample("metadata is wrong: captions must be a list of texts or of {text, source, weight}")
    tag, weight = item.get("source", UNTAGGED), item.get("weight", 1)
    if not isinstance(tag, str) or not 0 < len(tag) <= _LONGEST_TAG:
        raise BadSample(f"metadata is wrong: a caption's source must be a name of 1 to {_LONGEST_TAG} characters")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= _HEAVIEST:
        raise BadSample(f"metadata is wrong: a caption's weight must be a number from 0 to {_HEAVIEST:,}")
    return Caption(item["text"].strip(), tag, round(weight * CAPTION_UNIT))


def check_text(text: str, what: str) -> None:
    """Raises BadSample if a text is empty or not valid Unicode."""
    if not clean_text(text):
        raise BadSample(f"{what} is empty")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSample(f"{what} is not Unicode: it holds half of a surrogate pair")


def _text(data: bytes, what: str) -> str:
    if len(data) > MOST_TEXT:
        raise BadSample(f"{what} is too long: {len(data):,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(_text(data, "metadata"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"metadata is not JSON: {ascii(str(error))[1:-1][:100]}") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not JSON: an object is expected")
    return metadata
