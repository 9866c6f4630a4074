"""Small shards to test with: pictures made here, tars written by plain `tarfile`."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

Members = Iterable[tuple[str, bytes]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    """A cache folder of the session's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREERING_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(seed, kind) -> the bytes of a 48 x 40 picture."""

    def make(seed: int, kind: str = "png") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(kind, kind.upper()))
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """write_tar(path, [(name, bytes), ...]) -> path."""

    def write(path: Path, members: Members, format: int = tarfile.GNU_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def write_source(picture: Callable[..., bytes], write_tar: Callable[..., Path]) -> Callable[..., str]:
    """write_source(folder, shards, each, bad) -> the URL of shards x each samples, several captions for some;
    `bad` maps sample numbers to members that replace theirs."""

    def write(folder: Path, shards: int, each: int, bad: dict[int, list[tuple[str, bytes]]] | None = None) -> str:
        for shard in range(shards):
            members: list[tuple[str, bytes]] = []
            for n in range(shard * each, (shard + 1) * each):
                captions = [f"picture {n} number {i}" for i in range(1 + n % 3)]
                own = [
                    ("png", picture(n)),
                    ("txt", captions[0].encode()),
                    ("json", json.dumps({"captions": captions}).encode()),
                ]
                members += [(f"{n:05d}.{kind}", data) for kind, data in (bad or {}).get(n, own)]
            write_tar(folder / f"part-{shard:03d}.tar", members)
        return str(folder / f"part-{{000..{shards - 1:03d}}}.tar")

    return write


@pytest.fixture(scope="session")
def open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer module, loaded by path: importing open_clip itself takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    module_spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
