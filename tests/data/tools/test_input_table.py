"""Tables: rows in = rows out + rows refused, by line, whatever they are separated by and whatever is in them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from treering.data.errors import DataError
from treering.data.evaluation_sets import Form, open_pictures
from treering.data.tools.input_table import InputTable, RowTally
from treering.data.tools.pack import pack

CAPTIONS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=30)


def read(path: Path) -> tuple[list[tuple[int, str, str]], list[str]]:
    tally = RowTally()
    rows = [(row.line, row.path, row.captions[0]) for row in InputTable(path).rows(tally)]
    return rows, [each.removeprefix(f"{path}, ") for each in tally.refused]


@given(
    captions=st.lists(CAPTIONS.filter(str.strip), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    header=st.booleans(),
    bom=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    gap=st.booleans(),
)
@example(captions=[","], delimiter="\t", header=False, bom=False, quoting=csv.QUOTE_MINIMAL, gap=False)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read(
    tmp_path: Path, captions: list[str], delimiter: str, header: bool, bom: bool, quoting: int, gap: bool
) -> None:
    """Line breaks, quotes and delimiters within captions, empty lines between rows, any delimiter, a BOM."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    for row in [("path", "caption")] * header + [(f"p{n}.jpg", text) for n, text in enumerate(captions)]:
        writer.writerow(row)
        file.write("\n" * gap)
    path = tmp_path / "t.csv"
    path.write_bytes(("\ufeff" * bom + file.getvalue()).encode())
    rows, refused = read(path)
    assert [(name, text) for _, name, text in rows] == [(f"p{n}.jpg", text.strip()) for n, text in enumerate(captions)]
    assert refused == []


@given(lines=st.lists(st.text('ab",\n;\t', max_size=20), max_size=8), kind=st.sampled_from(["csv", "tsv"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_line_is_lost(tmp_path: Path, lines: list[str], kind: str) -> None:
    """Whatever stands between them, rows that are whole are read or refused by their own line."""
    text = "".join(f"p{n}.jpg,good {n}\n{line}\n" for n, line in enumerate(lines))
    path = tmp_path / f"t.{kind}"
    path.write_text(f"path,caption\n{text}", encoding="utf-8", newline="")
    rows, refused = read(path)
    named = {row[0] for row in rows} | {int(each.split(":")[0].removeprefix("line ")) for each in refused}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.startswith(b"p") and b".jpg,good" in line:
            assert number in named, (line, rows, refused)
    assert {(name, caption) for _, name, caption in rows} >= {
        (f"p{n}.jpg", f"good {n}") for n, line in enumerate(lines)
    }


OPEN = "a quote opens in this row and is not closed"


@pytest.mark.parametrize(
    ("name", "text", "used", "refused"),
    [
        ("t.csv", 'path,caption\np0.jpg,a\np1.jpg,"open\np2.jpg,b\np3.jpg,c\n', [2, 4, 5], [f"line 3: {OPEN}"]),
        ("t.csv", 'p0.jpg,a\np1.jpg,"open\np2.jpg,b"\np3.jpg,c\n', [1, 3, 4], [f"line 2: {OPEN}"]),
        ("t.csv", 'p0.jpg,"open\np1.jpg,"b"\np2.jpg,"c, d"\n', [2, 3], [f"line 1: {OPEN}"]),
        ("t.csv", 'caption,path\n"two\nlines",p0.jpg\n"open,p1.jpg\nb,p2.jpg\n', [2, 5], [f"line 4: {OPEN}"]),
        ("t.csv", 'p0.jpg,"two\n\nlines; p9.jpg"\np1.jpg,b\n', [1, 4], []),
        ("t.csv", 'p0.jpg,"a "big" dog"\np1.jpg,b\n', [2], ["line 1: ',' expected after '\"'"]),
        ("t.csv", "p0.jpg,a,b\np1.jpg\np2.jpg,c\n", [3], ["line 1: 3 columns", "line 2: 1 columns"]),
        ("t.csv", "Path;Caption\np0.jpg;a, b\np1.jpg;c;d\n", [2], ["line 3: 3 columns instead of 2; put a caption in"]),
        ("t.csv", 'path\tcaption\tn\np0.jpg\t"a\tb"\t1\np1.jpg\tc\n', [2], ["line 3: 2 columns instead of 3"]),
        ("t.csv", "path,caption\np0.jpg,a\npath,caption\np1.jpg,b\n", [2, 3, 4], []),
        ("t.csv", f'p0.jpg,"{"x" * 140_000}"\np1.jpg,b\n', [2], ["line 1: field larger than field limit"]),
        ("t.csv", "\n\npath,caption\n\np0.jpg,a\n", [5], []),
        ("t.tsv", 'p0.jpg\t"open\np1.jpg\ta, b\n', [1, 2], []),
        ("t.tsv", "path,caption\np0.jpg,a\n", [2], []),
        ("t.tsv", "p0.jpg\ta\np1.jpg b\np2.jpg\t\n", [1], ["line 2: 1 columns", "line 3: the caption is empty"]),
        ("t.jsonl", '{"path": "p0.jpg", "caption": "a"}\n{"path": \n[]\n\n{"path": "p1.jpg", "text": "b"}\n', [1, 5],
         ["line 2: not JSON", "line 3: not an object"]),
    ],
)  # fmt: skip
def test_rows_by_hand(tmp_path: Path, name: str, text: str, used: list[int], refused: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    rows, found = read(tmp_path / name)
    assert [line for line, _, _ in rows] == used
    assert len(found) == len(refused)
    assert all(each.startswith(words) for each, words in zip(found, refused, strict=True)), found


def test_a_line_that_is_not_utf8_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"p0.jpg,caf\xe9\np1.jpg,b\n")
    assert read(tmp_path / "t.csv") == (
        [(2, "p1.jpg", "b")],
        ["line 1: not UTF-8 (byte 0xe9); save the table as UTF-8"],
    )
    (tmp_path / "t.jsonl").write_bytes(b'{"path": "p0.jpg", "caption": "\xff"}\n{"path": "p1.jpg", "caption": "b"}\n')
    assert [row[0] for row in read(tmp_path / "t.jsonl")[0]] == [2]


def test_packed_rows_and_refused_rows_are_all_rows(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for n in range(4):
        (tmp_path / f"p{n}.jpg").write_bytes(picture(n, "jpg"))
    lines = [
        "p0.jpg,a",
        'p1.jpg,"open',
        "p2.jpg,b",
        "p2.jpg,b two",
        "p9.jpg,missing",
        "p3.jpg,\x01",
        "p3.jpg,c",
        "p1.jpg",
    ]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as error:
        pack(table, str(tmp_path / "out"))
    assert str(error.value).startswith(f"{table}: 4 of 8 rows cannot be used\n{table}, line 2: {OPEN}")
    packed = pack(table, str(tmp_path / "out"), skip_bad=True)
    assert (packed.rows, len(packed.refused), packed.samples) == (8, 4, 3)
    assert sorted(int(each.split("line ")[1].split(":")[0]) for each in packed.refused) == [2, 5, 6, 8]
    with tarfile.open(packed.shards[0]) as tar:
        texts = {m.name: json.load(tar.extractfile(m))["captions"] for m in tar if m.name.endswith("json")}  # type: ignore[arg-type]
    assert texts == {"p0.json": ["a"], "p2.json": ["b", "b two"], "p3.json": ["c"]}


def test_an_evaluation_set_refuses_such_tables(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    (tmp_path / "p0.jpg").write_bytes(picture(0, "jpg"))
    (tmp_path / "t.csv").write_text('path;label\np0.jpg;cat\np0.jpg;"dog\n', encoding="utf-8")
    with pytest.raises(DataError, match=f"line 3: {OPEN}"):
        open_pictures(str(tmp_path / "t.csv"), Form("class"), 16, 16)
    (tmp_path / "t.csv").write_text("path;label\np0.jpg;cat\n", encoding="utf-8")
    assert open_pictures(str(tmp_path / "t.csv"), Form("class"), 16, 16).known_labels == ["cat"]


@pytest.mark.parametrize("header", ["path,species,caption", "caption,path,species", "text,path,species"])
def test_a_class_may_stand_beside_a_caption(tmp_path: Path, picture: Callable[..., bytes], header: str) -> None:
    (tmp_path / "p.jpg").write_bytes(picture(0))
    cells = {"path": "p.jpg", "species": "wren", "caption": "a bird", "text": "a bird"}
    (tmp_path / "t.csv").write_text(f"{header}\n{','.join(cells[name] for name in header.split(','))}\n")
    assert open_pictures(str(tmp_path / "t.csv"), Form("class", label="species"), 16, 8).known_labels == ["wren"]
