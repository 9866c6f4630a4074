"""A contact sheet that nothing hostile gets out of, as a page and as a picture."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from treering.data import DataError, Source, open_source
from treering.data.tools.contact_sheet import Section, cards, printable, with_notes, write_sheet
from treering.tests.support.photos import photo

WriteTar = Callable[..., Path]
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=https://evil.example/x onerror=alert(1)>', "{{ 7 * 7 }}{% include 'x' %}",
    "\x1b[31mred\x07", "safe\u202egnp.exe", "</li></ul></main></body>", "a & b &amp; &lt;", "' onload='x",
]  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture
def hostile(tmp_path: Path, write_tar: WriteTar) -> Source:
    members: list[tuple[str, bytes]] = []
    for n, text in enumerate(HOSTILE):
        key = f"{n}{text.replace('.', '').replace('/', '')}"
        metadata = {"captions": [text, f"{text} again"], "labels": {text: text}}
        members += [(f"{key}.png", photo(300, 200, n)), (f"{key}.json", json.dumps(metadata).encode())]
    return open_source(str(write_tar(tmp_path / "<b>x.tar", members)))


def test_nothing_gets_out_of_the_sheet(hostile: Source, tmp_path: Path) -> None:
    shown = [with_notes(card, HOSTILE) for card in cards(hostile, range(len(hostile)))]
    write_sheet(tmp_path / "new" / "sheet.html", HOSTILE[1], HOSTILE[0], [Section(HOSTILE[2], shown)])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.html"]
    text = (tmp_path / "new" / "sheet.html").read_text(encoding="utf-8")
    page = Page(text)
    allowed = {
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "p",
        "bdi",
        "main",
        "ul",
        "li",
        "div",
        "img",
    }
    assert {tag for tag, _ in page.tags} == allowed
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("srcset", "action", "style") for name in attributes)
        assert "href" not in attributes or attributes == {"rel": "icon", "href": "data:,"}
        assert "src" not in attributes or str(attributes["src"]).startswith("data:image/jpeg;base64,")
        assert tag != "meta" or "refresh" not in attributes.values()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in text
    assert "@import" not in text
    for caption in HOSTILE:
        assert printable(caption) in page.texts
    assert not any(c in text for c in "\x1b\x07\u202e")
    assert sum(tag == "img" for tag, _ in page.tags) == len(HOSTILE)


def test_thumbnails_show_the_picture(tmp_path: Path, write_tar: WriteTar) -> None:
    pixels = np.zeros((400, 800, 3), np.uint8)
    pixels[:, 400:] = (250, 10, 20)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    source = open_source(str(write_tar(tmp_path / "t.tar", [("a.png", file.getvalue()), ("a.txt", b"x" * 999)])))
    (card,) = cards(source, [0])
    assert card.thumbnail
    image = Image.open(io.BytesIO(base64.b64decode(card.thumbnail.partition(",")[2])))
    assert image.size == (192, 96)
    assert np.abs(np.asarray(image)[48, [20, 170]].astype(int) - [[0, 0, 0], [250, 10, 20]]).max() < 12
    assert card.size == "800 x 400"
    assert card.captions == ("x" * 300 + "…",)


def test_a_sheet_as_a_picture(hostile: Source, tmp_path: Path) -> None:
    shown = [with_notes(card, ["a note " * 20]) for card in cards(hostile, range(len(hostile)))]
    write_sheet(
        tmp_path / "sheet.png", "t", "l", [Section("", shown), Section("more", shown[:1] * 9), Section("x", [])]
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet)
    assert pixels.shape[1] == 8 * 204 + 12
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode((shown[0].thumbnail or "").partition(",")[2]))))
    assert first.shape == (128, 192, 3)
    assert np.array_equal(pixels[40:168, 12:204], first)
    assert 0.5 < (pixels[168:250, 12:204] == 255).mean() < 0.97  # text on white
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == ["sheet.png"]


def test_a_sheet_that_cannot_be_written_leaves_nothing(hostile: Source, tmp_path: Path) -> None:
    (tmp_path / "sheet.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"cannot write .*directory; choose another path"):
        write_sheet(tmp_path / "sheet.html", "t", "l", [])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sheet_of_huge_texts_is_small(tmp_path: Path, write_tar: WriteTar) -> None:
    """Captions of a megabyte, and thousands of labels of one sample."""
    labels = {f"label {n}": "x" * 500 for n in range(2_000)}
    metadata = json.dumps({"captions": ["A" * 1_000_000, "x " * 500_000], "labels": labels}).encode()
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    url = str(
        write_tar(tmp_path / "0.tar", [("k" * 5_000 + ".png", file.getvalue()), ("k" * 5_000 + ".json", metadata)])
    )
    write_sheet(tmp_path / "sheet.html", "t" * 1_000_000, "l", [Section("", cards(open_source(url), [0]))])
    assert (tmp_path / "sheet.html").stat().st_size < 30_000
