"""Statistics against plain numpy and open_clip's tokenizer, and a ledger that leads back to its samples."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from treering.data import DataError, LedgerEntry, Source, open_source
from treering.data.ledger import entries_of, read_ledger
from treering.data.tools.contact_sheet import cards, with_notes
from treering.data.tools.inspect import inspect, locate_entries, open_indexed, sample_numbers, script, sorted_numbers
from treering.data.tools.statistics import Alike, Copies, Values, difference_hash
from treering.tests.support.photos import photo

WriteTar = Callable[..., Path]
CAPTIONS = [
    "a dog",
    "A  dog",
    "eine Katze",
    "собака бежит",
    "一只狗",
    "犬 dog 狗",
    "123",
    "word " * 90,
    "short",
    "a dog",
]
SIZES = [(10 + 7 * n % 50, 10 + 11 * n % 40) for n in range(40)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> str:
    """40 samples in 3 shards: 1 to 3 captions, two labels, pictures 30 to 33 equal; and two bad ones."""
    folder = tmp_path_factory.mktemp("inspected")
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for n in range(shard, 40, 3):
            seed = 30 if 30 <= n < 34 else n
            metadata = {"captions": captions(n), "labels": {"parity": str(n % 2)} | ({"third": "y"} if n % 3 else {})}
            members += [
                (f"{n:02}.png", photo(*SIZES[seed], seed)),
                (f"{n:02}.txt", captions(n)[0].encode()),
                (f"{n:02}.json", json.dumps(metadata | further(n)).encode()),
            ]
        write_tar(
            folder / f"{shard}.tar",
            [*members, (f"bad{shard}.png", b"x"), (f"bad{shard}.txt", b"y")][: 99 if shard else -2],
        )
    return str(folder / "*.tar")


def further(n: int) -> dict[str, object]:
    """Columns of the metadata."""
    score: object = float("nan") if n == 7 else None if n == 8 else n / 2
    return {"score": score, "url": f"https://{n}.example", "nsfw": n % 4 == 0} | ({"boxes": [[n]]} if n % 2 else {})


def captions(n: int) -> list[str]:
    return list(dict.fromkeys(CAPTIONS[(n + i) % len(CAPTIONS)].strip() for i in range(1 + n % 3)))


@pytest.mark.parametrize("workers", [1, 2])
def test_statistics(url: str, workers: int, open_clip_tokenizer: ModuleType) -> None:
    source = open_indexed(url, workers)
    found = inspect(source, sorted_numbers(source, 1000), workers)
    widths, heights = np.array([SIZES[30 if 30 <= n < 34 else n] for n in range(40)]).T
    expected = {
        "width": widths,
        "height": heights,
        "short_side": np.minimum(widths, heights),
        "width_over_height": widths / heights,
    }
    for name, values in expected.items():
        own = found["pictures"][name]
        assert own["mean"] == pytest.approx(np.mean(values))
        for quantile, percent in {"least": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "most": 100}.items():
            assert own[quantile] == pytest.approx(np.percentile(values, percent))
    texts = [text for n in range(40) for text in captions(n)]
    tokenizer = open_clip_tokenizer.SimpleTokenizer()
    tokens = np.array([len(tokenizer.encode(text)) + 2 for text in texts])
    assert found["captions"]["tokens"]["mean"] == pytest.approx(tokens.mean())
    assert found["captions"]["tokens"]["p99"] == pytest.approx(np.percentile(tokens, 99))
    assert found["captions"]["tokens"]["most"] == tokens.max() > 77
    assert found["captions"]["cut_at_77"] == pytest.approx((tokens > 77).mean())
    assert found["captions"]["count"] == len(texts)
    assert found["captions"]["a_sample"]["mean"] == pytest.approx(len(texts) / 40)
    cleaned = Counter(" ".join(text.lower().split()) for text in texts)
    assert found["captions"]["equal"]["copies"] == sum(cleaned.values()) - len(cleaned)
    assert found["captions"]["equal"]["groups"] == sum(count > 1 for count in cleaned.values())
    assert found["captions"]["equal"]["largest"][0]["times"] == cleaned.most_common(1)[0][1]
    assert found["pictures"]["equal"] == {"copies": 3, "groups": 1, "largest": [{"times": 4, "first": "30"}]}
    assert found["labels"] == {"parity": {"0": 20, "1": 20}, "third": {"y": sum(n % 3 > 0 for n in range(40))}}
    characters = [len(text) for text in texts]
    assert found["captions"]["characters"]["p90"] == pytest.approx(np.percentile(characters, 90))
    columns = found["columns"]
    assert list(columns) == ["boxes", "nsfw", "score", "url"]
    assert (columns["boxes"]["samples"], columns["boxes"]["types"]) == (20, {"list": 20})
    assert columns["nsfw"]["texts"] == {"false": 30, "true": 10}
    assert columns["score"]["types"] == {"number": 39, "null": 1}
    scores = [n / 2 for n in range(40) if n not in (7, 8)]
    assert columns["score"]["numbers"]["p50"] == pytest.approx(np.median(scores))
    assert columns["score"]["numbers"]["mean"] == pytest.approx(np.mean(scores))
    assert (columns["url"]["different"], columns["url"]["numbers"]) == (40, None)
    assert len(columns["url"]["texts"]) == 20
    assert found["pictures"]["equal_files"] == found["pictures"]["equal"]
    assert found["pictures"]["alike"]["copies"] == 3  # of noise, only copies look alike
    assert found["pictures"]["alike"]["largest"] == [{"times": 4, "keys": ["30", "33", "31", "32"]}]
    assert found["captions"]["scripts"]["Cyrillic"] == texts.count("собака бежит")
    assert sum(found["captions"]["scripts"].values()) == len(texts)
    assert found["bad"] == {"picture does not decode": 2}
    shards = [Path(shard) for shard in {source.shard(n) for n in range(len(source))}]
    assert (found["shards"], found["samples"], found["inspected"]) == (3, 42, 42)
    assert found["bytes"] == sum(shard.stat().st_size for shard in shards)
    json.dumps(found)


# Tallies


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.sampled_from([5, 64, 1000]))
def test_values(numbers: list[float], most: int) -> None:
    values = Values(most)
    for number in numbers:
        values.add(number)
    found = values.summary()
    assert found is not None
    assert (found["least"], found["most"]) == (min(numbers), max(numbers))
    assert found["mean"] == pytest.approx(np.mean(numbers), abs=1e-6)
    held = numbers
    while len(held) > most:
        held = held[::2]
    if len(numbers) <= most:
        assert found["p50"] == pytest.approx(np.percentile(numbers, 50))
    assert min(numbers) <= found["p10"] <= found["p99"] <= max(numbers)
    assert len(values._kept) <= most


def test_quantiles_of_a_part_are_those_of_all() -> None:
    values = Values(1000)
    for number in np.random.default_rng(0).permutation(50_000):
        values.add(float(number))
    found = values.summary()
    assert found is not None
    for name, expected in {"p10": 5000, "p50": 25_000, "p90": 45_000}.items():
        assert found[name] == pytest.approx(expected, abs=50_000 * 0.05)


@given(st.lists(st.integers(0, 20), max_size=80))
def test_copies(items: list[int]) -> None:
    copies = Copies()
    for n, item in enumerate(items):
        copies.add(bytes([item]), f"{item} at {n}")
    counts = Counter(items)
    found = copies.summary()
    assert found["copies"] == len(items) - len(counts)
    assert found["groups"] == sum(times > 1 for times in counts.values())
    assert sorted(group["times"] for group in found["largest"]) == sorted(
        (times for _, times in counts.most_common(10) if times > 1)
    )
    for group in found["largest"]:
        item, n = (int(part) for part in group["first"].split(" at "))
        assert (items.index(item), group["times"]) == (n, counts[item])


def test_copies_of_more_than_is_held_are_estimated() -> None:
    """A third of 60,000 items come twice, in any order; 1,000 are held."""
    copies = Copies(1000)
    items = [*range(60_000), *range(20_000)]
    for n in np.random.default_rng(1).permutation(len(items)):
        copies.add(items[n].to_bytes(4, "big"), "")
    found = copies.summary()
    assert found["estimated_from"] < 1 / 32
    assert found["copies"] == pytest.approx(20_000, rel=0.2)
    assert len(copies._groups) <= 1000


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_alike_equals_brute_force(seed: int, count: int) -> None:
    """Hashes around a few centres: groups are the connected parts of the graph of near pairs."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 63, 4)
    hashes = []
    for _ in range(count):
        hash = int(centres[rng.integers(4)])
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            hash ^= 1 << int(bit)
        hashes.append(hash)
    alike = Alike()
    for n, hash in enumerate(hashes):
        alike.add(hash, str(n))
    parts = [{n} for n in range(count)]
    for i in range(count):
        for j in range(i):
            if (hashes[i] ^ hashes[j]).bit_count() <= 3:
                one, two = (next(part for part in parts if n in part) for n in (i, j))
                if one is not two:
                    parts.remove(two)
                    one |= two
    found = alike.summary()
    assert found["copies"] == count - len(parts)
    assert found["groups"] == sum(len(part) > 1 for part in parts)
    sizes = sorted((len(part) for part in parts if len(part) > 1), reverse=True)
    assert [group["times"] for group in found["largest"]] == sizes[:10]
    for group in found["largest"]:
        assert {int(key) for key in group["keys"]} <= next(p for p in parts if int(group["keys"][0]) in p)


def test_what_a_picture_looks_like(picture: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(3)
    field = np.cumsum(np.cumsum(rng.normal(size=(300, 400, 3)), 0), 1)  # smooth, as photos are
    field = np.uint8(255 * (field - field.min()) / np.ptp(field))
    image, hash = Image.fromarray(field), difference_hash(field)
    assert hash is not None
    file = io.BytesIO()
    image.resize((200, 150)).save(file, "JPEG", quality=60)
    for other in (Image.open(file), image.point(lambda v: v * 0.8 + 20), image.resize((97, 61))):
        near = difference_hash(np.asarray(other.convert("RGB")))
        assert near is not None
        assert (hash ^ near).bit_count() <= 3
    mirrored = difference_hash(field[:, ::-1])
    assert mirrored is not None
    assert (hash ^ mirrored).bit_count() > 12
    assert difference_hash(np.full((30, 30, 3), 200, np.uint8)) is None
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = "".join(str(int(small[y, x + 1] > small[y, x])) for y in range(8) for x in range(8))
    assert hash == int(bits, 2)


def test_equal_pictures_in_other_files(tmp_path: Path, write_tar: WriteTar) -> None:
    image, members = Image.open(io.BytesIO(photo(30, 20, 1))), []
    for level in (1, 9, 9):
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=level)
        members += [(f"{len(members)}.png", file.getvalue()), (f"{len(members)}.txt", b"x")]
    found = inspect(open_source(str(write_tar(tmp_path / "t.tar", members))), [0, 1, 2])["pictures"]
    assert (found["equal"]["copies"], found["equal_files"]["copies"], found["alike"]["copies"]) == (2, 1, 2)


def test_nothing_usable_gives_no_numbers(tmp_path: Path, write_tar: WriteTar) -> None:
    source = open_source(str(write_tar(tmp_path / "t.tar", [("a.png", b"x"), ("a.txt", b"y")])))
    found = inspect(source, [0])
    assert found["bad"] == {"picture does not decode": 1}
    assert found["pictures"]["width"] is found["captions"]["tokens"] is found["captions"]["cut_at_77"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "Latin"), ("ＦＵＬＬ ｗｉｄｔｈ", "Latin"), ("собака dog", "Cyrillic"), ("一只狗", "Han"),
        ("いぬがいる", "Hiragana"), ("イヌ", "Katakana"), ("ｲﾇｶﾞ", "Katakana"), ("개가 있다", "Hangul"),
        ("كلب", "Arabic"),
        ("σκύλος", "Greek"), ("कुत्ता", "Devanagari"), ("123 🐕!", "none"), ("", "none"), ("naïve café", "Latin"),
    ],
)  # fmt: skip
def test_script(text: str, expected: str) -> None:
    assert script(text) == expected


def test_drawn_is_a_sample_without_replacement(url: str) -> None:
    source = open_source(url)
    assert sorted(sample_numbers(source, 99)) == list(range(42))
    assert sample_numbers(source, 10) == sample_numbers(source, 20)[:10] == sample_numbers(open_source(url), 10)
    assert sample_numbers(source, 42) != list(range(42))


# The ledger


def test_rows_of_another_release_are_read_as_far_as_they_are_known() -> None:
    row = {"source": "s", "shard": "0.tar", "key": "a", "offset": 0, "reason": "was bad", "position": 7}
    rows = [row | {"step": 1, "severity": "high"}, {"step": 2}, {k: v for k, v in row.items() if k != "position"}]
    first = LedgerEntry("s", "0.tar", "a", 0, "was bad", 7)
    assert entries_of(rows) == [first, replace(first, position=-1)]


def entry(source: Source, number: int, reason: str, **changes: object) -> LedgerEntry:
    place = {"shard": source.shard(number), "key": source.key(number), "offset": source.offset(number)}
    return LedgerEntry(**({"source": source.url, **place, "reason": reason, "position": 7} | changes))  # type: ignore[arg-type]


def test_a_ledger_leads_back_to_its_samples(url: str, tmp_path: Path) -> None:
    source = open_source(url)
    bad = next(n for n in range(42) if source.key(n) == "bad1")
    entries = [
        entry(source, 5, "was bad: once"),
        entry(source, bad, "picture does not decode: x"),
        entry(source, bad, "picture does not decode: x"),
        entry(source, 3, "gone", key="no such key"),
        entry(source, 3, "other", shard="elsewhere.tar"),
    ]
    path = tmp_path / "ledger.jsonl"
    rows = [json.dumps({"step": 1, **asdict(each)}) for each in entries]
    path.write_text("\n".join(rows) + '\n{"step": 2, "sou')  # the last line is being written
    assert read_ledger(path) == entries
    found = locate_entries(source, read_ledger(path))
    assert found.notes == {5: ["was bad: once"], bad: ["picture does not decode: x (met 2 times)"]}
    assert list(found.notes) == [5, bad]
    assert (found.gone, found.elsewhere) == (1, 1)
    one, two = (
        with_notes(card, notes) for card, notes in zip(cards(source, [5, bad]), found.notes.values(), strict=True)
    )
    assert (one.key, one.fault, one.notes, bool(one.thumbnail)) == (source.key(5), "", ("was bad: once",), True)
    assert two.fault.startswith("picture does not decode")
    assert (two.key, two.captions, two.thumbnail) == ("bad1", ("y",), None)


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"source": 1}', "[" * 100_000, "\ud800", "1" * 9999])
def test_an_invalid_ledger_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(DataError, match="line 1: not an entry of a ledger"):
        read_ledger(path)
    with pytest.raises(DataError, match="cannot read"):
        read_ledger(tmp_path / "none")
