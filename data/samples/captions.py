"""A sample's texts: its captions with tags and weights, and the draw of the one that training uses at a position.

key.txt is one caption. key.json may hold more captions and other metadata of the picture:
`{"captions": [TEXT or {"text": TEXT, "source": TAG, "weight": 2.5}, ...], "labels": {NAME: CLASS}, ...}`. A plain text
has the tag `untagged` and the weight 1.

The draw has two steps. If the recipe gives a source weights by tag (`caption_weights: {alt: 1, recaption: 3}`), a tag
is drawn by these weights among those that the sample has; then one of its captions is drawn by the captions' weights.
So a tag keeps its probability however many captions it has. Weights are integers in millionths: the draw is exact, and
depends only on the seed, the position and the sample.

Labels are captions too where a source says so (`labels: {animal: [a photo of a {}]}`): their tag is `label:animal`, and
the templates of a label share the weight of one caption. Whatever the template, captions of one class are equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..config import CAPTION_UNIT, UNTAGGED
from ..errors import BadSample, shown
from ..shards.columns import LONGEST_JSON
from .clip_tokenizer import clean_text
from .draws import Draws
from .templates import filled

if TYPE_CHECKING:
    import numpy as np

    from .draws import Draws

T = TypeVar("T")
MOST_TEXT = 1 << 20  # bytes of a caption
_MOST_CAPTIONS = 10_000
_LONGEST_TAG, _LONGEST_CLASS = 100, 1_000
CLS = "cls"  # the member with a sample's class, as WebDataset's users write it
_HEAVIEST = 1_000_000
_METADATA = "metadata"
_UNREADABLE = tuple(f"{_METADATA} is {what}" for what in ("not ", "too "))  # reasons of a .json that is not read
_USUAL: dict[str, Any] = {"source": UNTAGGED, "weight": 1}
_NO_TEMPLATES: Mapping[str, Sequence[str]] = {}
_LOOKS = 16  # places in a source that are probed, and samples at each of them


class Caption(NamedTuple):
    """One caption of a sample."""

    text: str
    tag: str = UNTAGGED
    weight: int = CAPTION_UNIT  # millionths
    equal: str = ""  # captions with the same text here are equal; empty: the text itself


class Texts(NamedTuple):
    """The texts and metadata of a sample."""

    captions: tuple[Caption, ...]  # the one of the .txt first; unique in (text, tag)
    labels: dict[str, str]  # those with one class
    metadata: dict[str, Any]  # the whole .json; empty if it cannot be read
    faults: tuple[str, ...] = ()  # why further captions, labels or the metadata were not read

    def whole_metadata(self) -> dict[str, Any]:
        """The metadata, for a recipe that needs more of it than captions. Raises BadSample if it cannot be read."""
        wrong = next((fault for fault in self.faults if fault.startswith(_UNREADABLE)), None)
        if wrong is not None:
            raise BadSample(wrong)
        return self.metadata


def read_texts(
    fields: Mapping[str, bytes], templates: Mapping[str, Sequence[str]] = _NO_TEMPLATES, bare: bool = False
) -> Texts:
    """The captions, labels and metadata among a record's members. Raises BadSample if there is no caption among them.

    Labels named in `templates` become captions. `bare`: a sample with labels alone is read too, without a caption.

    One good caption makes a sample good: empty, foreign or unreadable ones beside it are skipped, and so is
    metadata that cannot be read (its faults are listed, for whoever needs what is in it). An untagged caption that also
    occurs with a tag is dropped. img2dataset's "caption" is used only if there is no other caption.
    """
    faults: list[str] = []
    metadata = _tried(lambda: _metadata(fields["json"]), faults) if "json" in fields else None
    metadata = {} if metadata is None else metadata
    txt = _tried(lambda: _caption(_text(fields["txt"], "caption")), faults) if "txt" in fields else None
    captions = [txt] if txt else []
    additional = _tried(lambda: _listed(metadata.get("captions")), faults) or []
    captions += [caption for item in additional if (caption := _tried(partial(_caption, item), faults))]
    if not captions and metadata.get("caption"):
        captions = [caption for caption in [_tried(lambda: _caption(metadata["caption"]), faults)] if caption]
    classes = _tried(lambda: _classes(metadata.get("labels")), faults) or {}
    own = _tried(lambda: _label_captions(classes, fields, templates), faults) if templates else []
    captions += own or []
    if not captions and not (bare and classes):
        raise BadSample(faults[0] if faults else _no_caption(classes, templates))
    first = txt.text if txt else ""
    tagged = {caption.text for caption in captions if caption.tag != UNTAGGED}
    if tagged:
        captions = [caption for caption in captions if caption.tag != UNTAGGED or caption.text not in tagged]
        captions.sort(key=lambda caption: caption.text != first)
    unique: dict[tuple[str, str], Caption] = {}
    for caption in captions:
        unique.setdefault((caption.text, caption.tag), caption)
    labels = {name: each[0] for name, each in classes.items() if isinstance(metadata["labels"][name], str)}
    return Texts(tuple(unique.values()), labels, metadata, tuple(faults))


def _tried(read: Callable[[], T], faults: list[str]) -> T | None:
    """The result of `read`; None if it raises BadSample, whose reason is appended to `faults`."""
    try:
        return read()
    except BadSample as error:
        faults.append(str(error))
        return None


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


def _listed(items: object) -> list[object]:
    if items is None:
        return []
    if not isinstance(items, list) or len(items) > _MOST_CAPTIONS:
        raise BadSample("metadata is wrong: captions must be a list of texts or of {text, source, weight}")
    return items


def _caption(item: object) -> Caption:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise BadSample("metadata is wrong: captions must be a list of texts or of {text, source, weight}")
    tag, weight = (item[name] if item.get(name) is not None else usual for name, usual in _USUAL.items())
    if not isinstance(tag, str) or not 0 < len(tag) <= _LONGEST_TAG:
        raise BadSample(f"metadata is wrong: a caption's source must be a name of 1 to {_LONGEST_TAG} characters")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= _HEAVIEST:
        raise BadSample(f"metadata is wrong: a caption's weight must be a number from 0 to {_HEAVIEST:,}")
    if len(item["text"]) > MOST_TEXT:
        raise BadSample(f"caption is too long: {len(item['text']):,} characters")
    check_text(item["text"], "caption")
    return Caption(item["text"].strip(), tag, round(weight * CAPTION_UNIT))


def _classes(labels: object) -> dict[str, tuple[str, ...]]:
    """The classes of each label: a text or a list of texts. Others, such as a foreign data set's lists of numbers, are
    not classes of ours."""
    if labels is None:
        return {}
    if not isinstance(labels, dict):
        raise BadSample("metadata is wrong: labels must map names to classes")
    listed = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    found = {name: tuple(each for each in values if isinstance(each, str)) for name, values in listed.items()}
    return {name: values[:_MOST_CAPTIONS] for name, values in found.items() if values}


def _label_captions(
    classes: Mapping[str, Sequence[str]], fields: Mapping[str, bytes], templates: Mapping[str, Sequence[str]]
) -> list[Caption]:
    """The captions that a sample's labels give."""
    if CLS in templates and CLS in fields:
        name = _text(fields[CLS], "label cls").strip()
        if name.isdecimal():
            raise BadSample(f"label cls is a number, {shown(name)}: only a class's name makes a caption")
        classes = {**classes, CLS: (name,)}
    captions = []
    for label, sentences in templates.items():
        for name in classes.get(label, ()):
            check_text(name, f"label {shown(label, 40)}")
            if len(name) > _LONGEST_CLASS:
                raise BadSample(f"label {shown(label, 40)} is too long: {len(name):,} characters")
            texts, equal = [filled(each, name.strip()) for each in sentences], filled(sentences[0], name.strip())
            weight = max(1, CAPTION_UNIT // len(texts))
            captions += [Caption(text, f"label:{label}", weight, equal) for text in texts]
    return captions


def _no_caption(classes: Mapping[str, object], templates: Mapping[str, object]) -> str:
    """Why a sample has no caption."""
    if templates:
        wanted = ", ".join(shown(name, 40) for name in templates)
        return f"no caption: neither .txt nor captions in .json, nor a label {wanted}"
    if classes:
        found = ", ".join(shown(name, 40) for name in sorted(classes)[:5])
        return f"no caption, only labels, which data.train[i].labels makes captions of: {found}"
    return "no caption: neither .txt nor captions in .json"


def check_text(text: str, what: str) -> None:
    """Raises BadSample if a text is empty or not valid Unicode."""
    if not clean_text(text):
        raise BadSample(f"{what} is empty")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSample(f"{what} is not Unicode: it holds half of a surrogate pair")


def _text(data: bytes, what: str, most: int = MOST_TEXT) -> str:
    if len(data) > most:
        raise BadSample(f"{what} is too long: {len(data):,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(_text(data, _METADATA, LONGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"metadata is not JSON: {ascii(str(error))[1:-1][:100]}") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not JSON: an object is expected")
    return metadata
