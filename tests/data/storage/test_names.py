"""What a name means: exactly what exists under it, else a pattern, else what it is of another tool's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.data import open_source
from treering.data.errors import DataError
from treering.data.shards.listing import list_shards
from treering.data.storage.gzip_cache import is_gzip
from treering.data.storage.names import is_pattern, literal_part
from treering.tests.support.made_up_shards import shard
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.store import Store, StoreError

FOLDERS = [
    "[2024] photos",
    "a*b",
    "why?",
    "{old}",
    "{a,b}",
    "{1..3}",
    "x[!y",
    "[",
    "]",
    "a::b",
    "100%",
    "s3:",
    "pipe:x",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_what_it_is_called(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in full, from beside it and from within; a whole name, a glob and a range."""
    here = tmp_path / folder
    for name in ("0.tar", "1.tar"):
        shard(here / name, [])
    os.symlink(here / "0.tar", here / "link.tar")
    both = [str(here / "0.tar"), str(here / "1.tar")]
    for place, before in ((tmp_path, str(here)), (tmp_path, f"./{folder}"), (here, "."), (tmp_path, f"file://{here}")):
        monkeypatch.chdir(place)

        def found(name: str, before: str = before) -> list[str]:
            return [each.url.removeprefix("file://") for each in list_shards(f"{before}/{name}")]

        assert found("0.tar") == both[:1]
        assert found("[01].tar") == both
        assert found("{0..1}.tar") == both
        assert found("?.tar") == both
        assert found("l*k.tar") == [str(here / "link.tar")]
        assert found("**/[01].tar") == both


@pytest.mark.parametrize("name", [f"{folder}.tar" for folder in FOLDERS])
def test_a_file_is_what_it_is_called(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside others that it would match as a pattern."""
    for other in ("2 photos.tar", "axb.tar", "whyx.tar", "a.tar", "b.tar", "1.tar", "2.tar", "3.tar"):
        shard(tmp_path / other, [])
    shard(tmp_path / name, [])
    monkeypatch.chdir(tmp_path)
    for url in (name, f"./{name}", str(tmp_path / name), f"file://{tmp_path}/{name}"):
        assert [each.url.removeprefix("file://") for each in list_shards(url)] == [str(tmp_path / name)]


def test_what_does_not_exist_as_written_is_a_pattern(tmp_path: Path) -> None:
    for name in ("a1/0.tar", "a2/0.tar", "b[1]/0.tar", "b1/0.tar"):
        shard(tmp_path / name, [])

    def found(pattern: str) -> list[str]:
        return [each.url.removeprefix(f"{tmp_path}/") for each in list_shards(f"{tmp_path}/{pattern}")]

    assert found("a[12]/*.tar") == found("a{1,2}/0.tar") == found("{a1/0,a2/0}.tar") == ["a1/0.tar", "a2/0.tar"]
    assert found("b[1]/*.tar") == ["b[1]/0.tar"]
    assert found("b?/*.tar") == ["b1/0.tar"]
    assert found("*/0.tar") == ["a1/0.tar", "a2/0.tar", "b1/0.tar", "b[1]/0.tar"]
    with pytest.raises(DataError, match="not found; check the path"):
        found("c[1]/*.tar")


def test_samples_beside_a_pattern_s_signs_can_be_read(tmp_path: Path) -> None:
    """Index, summary and reading use the same name."""
    here = tmp_path / "[2024] {x} photos?"
    shard(here / "0.tar", [("a.jpg", b"1"), ("a.txt", b"one")])
    for url in (f"{here}/0.tar", f"{here}/*.tar"):
        for _ in range(2):  # built, and read from the cache
            assert open_source(url).record(0).fields["txt"] == b"one"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:aws s3 cp s3://bucket/a.tar -", "pipe: a command is not run"),
        ("a.tar::b.tar", "a list with :: is not read; write {a,b} or a pattern"),
        ("s3://bucket/a.tar::s3://bucket/b.tar", "a list with :: is not read"),
        ("s3:bucket/a.tar", "a URL has two slashes after s3: as in s3://BUCKET/NAME"),
        ("s3:/bucket/a.tar", "a URL has two slashes after s3"),
        ("HTTPS:/host/a.tar", "a URL has two slashes after HTTPS: as in https://"),
        (" a.tar", "begins or ends with a space"),
        ("a.tar\n", "begins or ends with a space"),
    ],
)
def test_what_is_of_another_kind_is_said_to_be(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For data and for a store, where a folder of that name would otherwise be made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refused:
        list_shards(url)
    assert said in str(refused.value)
    with pytest.raises(StoreError) as refused_store:
        Store(url)
    assert said in str(refused_store.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_store_in_a_folder_of_any_name(folder: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / folder))
    store.check()
    assert Commits(store).claim_attempt("me") == 1
    assert Commits(Store(str(tmp_path / folder))).claim_attempt("me") == 2
    assert {path.name for path in (tmp_path / folder).iterdir()} == {"attempt-0001.json", "attempt-0002.json"}


def test_a_query_is_no_pattern() -> None:
    assert not is_pattern("https://host/a.tar?download=true")
    assert is_pattern("https://host/*.tar?download=true")
    assert not is_pattern("s3://bucket/a.tar?versionId=abc")
    assert is_pattern("s3://bucket/a?.tar")
    assert is_gzip("https://host/a.tar.gz?download=true")
    assert not is_gzip("a.tar.gz?x")


@given(st.lists(st.text(alphabet="a*[?{", min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_the_literal_part_is_the_longest_that_exists(parts: list[str], data: st.DataObject) -> None:
    """Against trying every length."""
    path = "/" + "/".join(parts)
    whole = path.split("/")
    prefixes = ["/".join(whole[:count]) for count in range(1, len(whole) + 1)]
    depth = data.draw(st.integers(1, len(prefixes)))
    folder, pattern = literal_part(path, lambda name: name in prefixes[:depth])
    assert f"{folder}/{pattern}" == path if pattern else folder == path
    special = [count for count, part in enumerate(whole, 1) if set(part) & set("*?[{") and count > depth]
    assert len(folder.split("/")) == (special[0] - 1 if special else len(whole))
