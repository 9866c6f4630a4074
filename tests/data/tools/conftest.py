"""What several tests of the tools pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Picture = Callable[..., bytes]


@pytest.fixture
def table(tmp_path: Path, picture: Picture) -> Path:
    """Six pictures, one of them in a folder below, of 11 captions in a table beside them."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for n in range(5):
        (folder / f"p{n}.jpg").write_bytes(picture(n, "jpg"))
    (folder / "more" / "p0.v2.PNG").write_bytes(picture(9))
    lines = [f"p{n}.jpg\tcaption {n} of {i}, 'quoted\" ü" for i in range(2) for n in range(5)] + [
        "more/p0.v2.PNG\tone",
        "",
    ]
    (folder / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "captions.tsv"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Path:
    """60 pictures of very different sizes in bytes."""
    folder = tmp_path_factory.mktemp("many")
    for n in range(60):
        (folder / f"{n:03}.jpg").write_bytes(picture(n, "jpg") + bytes(n % 7 * 3000))  # decoders stop at the end mark
        (folder / f"{n:03}.txt").write_text(f"picture {n}")
    return folder
