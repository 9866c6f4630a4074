"""Decoding processes: what they hand over, and what happens when one dies, hangs or loses its parent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treering.data import DataConfig, DataError, Loader
from treering.data.loading import placed
from treering.data.loading import workers as workers_module
from treering.data.loading.workers import Note, _concatenate

WriteSource = Callable[..., str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, write_source: WriteSource) -> str:
    return write_source(tmp_path_factory.mktemp("good"), 2, 20)


def loader(url: str, **options: Any) -> Loader:
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": 8, "workers": 2, **options})
    return Loader(config, 24, 16, seed=5)


def at_one_sample(monkeypatch: pytest.MonkeyPatch, each: Loader, position: int, act: Callable[[], object]) -> list[str]:
    """Lets the process that decodes the picture for `position` do something; what the error must name."""
    place = next(p for p in each.order.places(position // 8) if p.position == position)
    source, parent, decode = each.sources[0], os.getpid(), placed.picture
    victim = source.record(place.number).fields["png"]

    def picture(fields: dict[str, bytes], *options: Any) -> Any:
        if fields["png"] == victim and os.getpid() != parent:
            act()
        return decode(fields, *options)

    monkeypatch.setattr(placed, "picture", picture)
    return [f"'{source.key(place.number)}'", source.shard(place.number), source.url, f"position {position} "]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_dead_process_is_an_error_that_names_the_sample(url: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    each = loader(url)
    named = at_one_sample(monkeypatch, each, 29, lambda: os.kill(os.getpid(), getattr(signal, how)))
    with closing(each.batches(0)) as batches, pytest.raises(DataError, match=rf"died \(signal {how}\)") as error:
        for _ in islice(batches, 5):
            pass
    assert all(name in str(error.value) for name in named), error.value
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_a_sample_that_takes_too_long_is_a_bad_sample(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced by its spare and recorded; all other samples are those of a run without it."""
    with closing(loader(url, workers=0).batches(0)) as batches:
        expected = list(islice(batches, 4))
    each = loader(url, decode_timeout=2)
    at_one_sample(monkeypatch, each, 21, lambda: time.sleep(1000))
    place = next(p for p in each.order.places(2) if p.position == 21)
    spare = each.sources[0].key(each.order.spare(place, 0) or 0)
    with closing(each.batches(0)) as batches:
        found = list(islice(batches, 4))
    (entry,) = {entry for batch in found for entry in batch.bad}
    assert (entry.key, entry.position) == (each.sources[0].key(place.number), 21)
    assert entry.reason == "sample too slow: it took more than 2 seconds"
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys == tuple(spare if key == entry.key else key for key in other.keys)
        same = [i for i, key in enumerate(other.keys) if key != entry.key]
        assert torch.equal(batch.images[same], other.images[same])
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_processes_that_hang_again_and_again_are_an_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_MOST_SLOW", 0)
    each = loader(url, decode_timeout=2)
    named = at_one_sample(monkeypatch, each, 21, lambda: time.sleep(1000))
    with closing(each.batches(0)) as batches, pytest.raises(DataError, match=r"hangs") as error:
        for _ in islice(batches, 5):
            pass
    assert all(name in str(error.value) for name in named), error.value
    assert "data.decode_timeout = 2" in str(error.value)
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_a_fault_of_ours_shows_where_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    each = loader(url)
    at_one_sample(monkeypatch, each, 3, lambda: [][1])
    with closing(each.batches(0)) as batches, pytest.raises(RuntimeError, match=r"(?s)Traceback.*in picture.*IndexErr"):
        next(batches)


def test_batches_that_are_held_stay_as_they_are(url: str) -> None:
    with closing(loader(url, workers=0).batches(0)) as batches:
        expected = [batch.images.clone() for batch in islice(batches, 12)]
    with closing(loader(url).batches(0)) as batches:
        held = list(islice(batches, 12))  # many more than the memory of the processes holds
    gc.collect()
    assert all(torch.equal(batch.images, images) for batch, images in zip(held, expected, strict=True))
    with closing(loader(url).batches(0)) as batches:
        assert all(torch.equal(next(batches).images, images) for images in expected)  # none held
    del batches
    assert not multiprocessing.active_children()


def test_a_slow_reader_does_not_make_processes_run_ahead(url: str, tmp_path: Path) -> None:
    each = loader(url)
    log, decode = tmp_path / "decoded", each._samples._decoded
    log.touch()

    def decoded(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("x")
        return decode(*arguments)

    each._samples._decoded = decoded  # type: ignore[method-assign]
    with closing(each.batches(0)) as batches:
        next(batches)
        time.sleep(0.5)
        assert 8 <= log.stat().st_size <= 8 * 7


def test_no_process_outlives_its_parent(url: str) -> None:
    program = f"""
        import multiprocessing, os, signal
        from treering.data import DataConfig, Loader
        if __name__ == "__main__":
            config = DataConfig.model_validate({{"train": [{{"source": {url!r}}}], "batch": 8, "workers": 2}})
            batches = Loader(config, 24, 16, seed=5).batches(0)
            next(batches)
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in re.findall(r"\d+", out.stdout)]
    assert len(pids) == 2, out.stderr
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("still there after ten seconds")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_note_is_read_by_others() -> None:
    memory = bytearray(3 * Note.size)
    note, other = Note(memory, Note.size), Note(memory, Note.size)
    assert other.read() == (None, 0.0)
    note.write(5_850_000_000, 3, 7)
    place, seconds = other.read()
    assert place == (5_850_000_000, 3, 7)
    assert 0 <= seconds < 5
    assert not any(memory[: Note.size] + memory[2 * Note.size :])
    note.clear()
    assert other.read() == (None, 0.0)


def test_joining_goes_field_by_field() -> None:
    parts = [{"a": torch.arange(n), "b": (n, "x"), "c": None} for n in (2, 3)]
    joined = _concatenate(parts)
    assert np.array_equal(joined["a"].numpy(), [0, 1, 0, 1, 2])
    assert (joined["b"], joined["c"]) == ((2, "x", 3, "x"), None)
