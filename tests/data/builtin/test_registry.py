"""`samples://NAME` of a package that is installed: a real dist-info on the path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from treering.data import DataError, held_out, open_source
from treering.data.shards.source import attribution

WriteSource = Callable[..., str]
PAGE = Path(__file__).parents[3] / "docs" / "sources.md"
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(package, entry): its dist-info with one entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, entry: str) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[treering.samples]\n{entry}\n")

    return write


def test_a_set_of_another_package(tmp_path: Path, install: Install, write_source: WriteSource) -> None:
    """The page's own code, with its bucket in a folder."""
    (code,) = re.findall(r"```python\n(from treering.data.builtin .*?)```", PAGE.read_text(), re.DOTALL)
    urls = {part: write_source(tmp_path / part, 2, 3 + len(part)) for part in ("train", "held_out")}
    for part, url in urls.items():
        code = re.sub(rf"s3://BUCKET/birds/{part}[^\"]*", lambda _, url=url: url, code)
    (tmp_path / "bird_photos.py").write_text(code)
    install("bird-photos", "birds = bird_photos:SAMPLES")
    assert len(open_source("samples://birds")) == 2 * 8
    assert held_out("samples://birds") == "samples://birds/held_out"
    assert len(open_source("samples://birds/held_out")) == 2 * 11
    assert attribution("samples://birds") == "Photos: the birds' owners, CC BY 4.0"
    with pytest.raises(
        DataError, match="fish is unknown; available are samples://birds, samples://emoji; a package adds"
    ):
        open_source("samples://fish")


def test_what_is_no_set_is_refused(tmp_path: Path, install: Install) -> None:
    (tmp_path / "odd_sets.py").write_text(
        "from treering.data.builtin import SampleSet\nODD = 3\nBARE = SampleSet(str)\n"
    )
    install("odd-one", "odd = odd_sets:ODD")
    install("odd-two", "gone = odd_sets:GONE")
    install("odd-three", "far = nowhere_to_be_found:SET")
    install("odd-four", "bare = odd_sets:BARE")
    install("odd-five", "emoji = odd_sets:BARE")
    for name, reason in (
        ("odd", "odd_sets:ODD is int, not a SampleSet"),
        ("gone", "cannot be loaded from odd_sets:GONE: .*repair that package"),
        ("far", "cannot be loaded from nowhere_to_be_found:SET: No module named"),
        ("bare/held_out", "has no held-out samples"),
        ("emoji", "is registered by .*emoji:SAMPLES and by odd_sets:BARE; uninstall all but one"),
    ):
        with pytest.raises(DataError, match=reason):
            open_source(f"samples://{name}")
    assert held_out("samples://bare") is None
    assert held_out("samples://gone") is None
    assert attribution("samples://bare") is None
