"""What shows that a long piece of work goes on; and which pieces of an evaluation do."""

from __future__ import annotations

import io
import itertools
import re
import threading
from typing import Any

import pytest

from treering.training.evaluate.embed import own_batches
from treering.training.logging.counting import Lines, counting, waiting
from treering.training.world import World


def shown(times: list[tuple[float, int]], total: int) -> list[str]:
    """The lines for work of which so much was done at these seconds."""
    stream, clock = io.StringIO(), iter([0.0, *(second for second, _ in times)])
    with counting("samples embedded", stream, clock=lambda: next(clock)) as report:
        for _, done in times:
            report(done, total)
    return stream.getvalue().splitlines()


def test_work_of_less_than_ten_seconds_is_silent() -> None:
    assert shown([(1, 10), (9.9, 99), (11, 100)], 100) == []


def test_a_line_comes_every_ten_seconds_with_the_time_left() -> None:
    assert shown([(5, 500), (10, 1000), (15, 1500), (19.9, 1990), (25, 2500), (36, 3600), (40, 4000)], 4000) == [
        "samples embedded: 1,000 of 4,000, 30 s left",
        "samples embedded: 2,500 of 4,000, 15 s left",
        "samples embedded: 3,600 of 4,000, 4.0 s left",
    ]
    assert shown([(20, 0)], 7) == ["samples embedded: 0 of 7"]


def test_names_are_shown_not_obeyed() -> None:
    stream = io.StringIO()
    clock = iter([0.0, 10.0])
    with counting("a\x1b[2Jb", stream, clock=lambda: next(clock)) as report:
        report(1, 2)
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_has_a_bar_that_goes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        with counting("[red]samples", stream) as report:
            report(3, 10)
    assert re.search(r"\[red\]samples.*3/10", stream.getvalue())


def test_a_pipe_that_nobody_reads_ends_the_lines_alone() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    clock = iter([0.0, 20.0])
    with counting("samples", Gone(), clock=lambda: next(clock)) as report:
        report(1, 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_counts_up_to_all_items(world: int) -> None:
    import torch

    for rank in range(world):
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        batches = list(own_batches(range(10), 2, World(rank, world, torch.device("cpu")), tell))
        assert len(told) == len(batches)
        assert [done for done, _ in told] == sorted(min(10, (i + 1) * 2 * world) for i in range(len(batches)))
        assert {total for _, total in told} == {10}


class Told(io.StringIO):
    """A stream that says when a line came."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if "\n" in text:
            self.came.set()
        return written


def test_work_that_cannot_be_counted_says_how_long_it_has_gone_on() -> None:
    stream, clock = Told(), itertools.count(0.0, 12.0)
    with waiting("reading b\x1b[2J.pt", stream, interval=0.001, clock=lambda: next(clock)):
        assert stream.came.wait(60)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading b\ufffd[2J.pt: 12 s so far"
    assert len(lines) == next(clock) // 12 - 1  # none after the end
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_silent_work_says_what_is_known_of_it() -> None:
    """A first shard that takes a minute, a listing, the end of the work."""
    told: list[str] = []
    clock = iter([0.0, 10.0, 12.0, 13.0, 25.0, 30.0, 40.0])
    report = Lines("shards packed", told.append, 10.0, lambda: next(clock))
    report.tick()  # at 10 s
    report(0, 4)  # at 12 s
    report.tick()  # at 13 s
    report(1, 4)  # at 25 s
    report(4, 4)  # needs no time
    report.tick()  # at 30 s
    report.tick()  # at 40 s
    assert told == ["shards packed: 10 s so far", "shards packed: 1 of 4, 1 min 15 s left", "shards packed: 4 of 4"]


def test_a_count_that_does_not_come_is_replaced_by_ticks() -> None:
    stream, clock = Told(), itertools.count(0.0, 12.0)
    with counting("shards packed", stream, interval=0.001, clock=lambda: next(clock)):
        assert stream.came.wait(60)
    assert stream.getvalue().splitlines()[0] == "shards packed: 12 s so far"


def test_work_that_is_soon_done_or_fails_leaves_nothing() -> None:
    stream = Told()
    with pytest.raises(ValueError, match="broken"), waiting("reading", stream, interval=60):
        raise ValueError("broken")
    assert stream.getvalue() == ""
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize("show", [counting, waiting])
def test_a_terminal_that_cannot_rewrite_a_line_gets_lines(show: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    class Terminal(Told):
        def isatty(self) -> bool:
            return True

    stream, clock = Terminal(), itertools.count(0.0, 12.0)
    with show("shards", stream, interval=0.001, clock=lambda: next(clock)) as report:
        if report:
            report(1, 3)
        assert stream.came.wait(60)
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_shows_what_goes_on_on_one_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with waiting("[red]reading", stream):
        pass
    assert "[red]reading" in stream.getvalue()


@pytest.mark.parametrize("columns", ["80", "120"])
def test_a_long_name_leaves_room_for_the_count(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with counting(f"s3://{'a/' * 60}photos.tar: samples embedded", stream) as report:
        report(1234, 56789)
    assert "a/photos.tar: samples embedded" in stream.getvalue()
    assert "1234/56789" in stream.getvalue()
