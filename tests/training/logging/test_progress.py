"""The progress display: a bar on a terminal, plain lines elsewhere, and nothing that a caption can do to it."""

from __future__ import annotations

import io
import os
import threading

import pytest

from treering.training.logging.progress import Progress, Term


class Clock:
    """A clock that moves only when the test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_lines_come_at_the_interval_and_at_events() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(60_416, stages=2, stream=stream, interval=10.0, clock=clock) as progress:
        for second in range(25):
            clock.now = float(second)
            progress.update(256 * (second + 1), 5.0 - second / 10, 256.0, 0, 10_240_512)
        progress.note("grew image.depth 4 → 8")
        progress.update(256 * 26, 2.5, 160.0, 1, 14_091_264)
        progress.update(256 * 27, None, 160.0, 1, 14_091_264)
    assert stream.getvalue().splitlines() == [
        "  0% · 256/60,416 · loss 5 · 256/s · 3 min 55 s left · stage 1/2 · 10.2 M",
        "  5% · 2,816/60,416 · loss 4 · 256/s · 3 min 45 s left · stage 1/2 · 10.2 M",
        "  9% · 5,376/60,416 · loss 3 · 256/s · 3 min 35 s left · stage 1/2 · 10.2 M",
        "grew image.depth 4 → 8",
        " 11% · 6,656/60,416 · loss 2.5 · 160/s · 5 min 36 s left · stage 2/2 · 14.1 M",
        " 11% · 6,912/60,416 · loss not finite · 160/s · 5 min 34 s left · stage 2/2 · 14.1 M",
    ]


def test_the_last_line_says_done_and_close_may_be_called_twice() -> None:
    stream = io.StringIO()
    progress = Progress(512, stream=stream, clock=Clock())
    progress.update(256, 1.0, 100.0, 0, 1000)
    progress.update(512, 1.0, 100.0, 0, 1000)
    progress.close()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1] == "100% · 512/512 · loss 1 · 100/s · done · stage 1/1 · 1.00 k"


def test_a_rate_of_zero_has_no_time_left() -> None:
    stream = io.StringIO()
    with Progress(512, stream=stream) as progress:
        progress.update(256, 1.0, 0.0, 0, 1000)
    assert " – left " in stream.getvalue()


def test_terminal_shows_a_bar_with_all_of_it_and_starts_no_thread() -> None:
    stream, before = Terminal(), threading.active_count()
    with Progress(60_416, stages=2, stream=stream) as progress:
        progress.update(30_208, 3.21449, 160.0, 1, 14_091_264)
        assert threading.active_count() == before
        progress.note("commit step-000000118, 170 MB")
    text = stream.getvalue()
    assert "30,208/60,416 · loss 3.214 · 160/s · 3 min 09 s left · stage 2/2 · 14.1 M" in text
    assert "━" in text
    assert "commit step-000000118, 170 MB\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is given back


def test_bar_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(60_416, stages=2, stream=stream) as progress:
        progress.update(30_208, 3.21449, 160.0, 1, 14_091_264)
    assert "30,208/60,416 · loss 3.214 · 160/s · 3 min 09 s left · stage 2/2 · 14.1 M" in stream.getvalue()
    assert "…" not in stream.getvalue()


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_hostile_text_in_notes_is_shown_not_obeyed(stream_type: type[io.StringIO]) -> None:
    stream = stream_type()
    with Progress(512, stream=stream) as progress:
        progress.note("bad sample [red]key[/red] \x1b[2J\x07 two\nlines \u202e")
    assert "bad sample [red]key[/red] �[2J� two lines �" in stream.getvalue()
    assert "\x07" not in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_a_stream_that_cannot_write_an_arrow_gets_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(512, stream=stream) as progress:
        progress.note("image.depth 4 → 8")
    stream.flush()
    assert raw.getvalue() == f"image.depth 4 ? 8{os.linesep}".encode()


TERMS = [Term("contrastive", 1.0, 4.468), Term("caption", 2.0, 10.81), Term("balance", 0.01, None)]


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ([], ""),
        (TERMS[:1], ""),  # it is the loss
        (TERMS[1:2], " (caption 2 x 10.81)"),
        (TERMS[:2], " (contrastive 4.468, caption 2 x 10.81)"),
        (TERMS[1:], " (caption 2 x 10.81, balance 0.01 x not finite)"),
        ([Term("further_text", 0.0, 3.0), TERMS[0]], " (further text 0 x 3, contrastive 4.468)"),
    ],
)
def test_the_loss_names_its_terms(terms: list[Term], said: str) -> None:
    stream = io.StringIO()
    with Progress(512, stream=stream) as progress:
        progress.update(256, 26.09, 64.0, 0, 1000, terms)
    assert f" · loss 26.09{said} · 64/s" in stream.getvalue()


@pytest.mark.parametrize(("columns", "shown"), [("80", False), ("120", True)])
def test_a_bar_names_them_where_there_is_room(columns: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    with Progress(60_416, stages=2, stream=stream) as progress:
        progress.update(30_208, 26.09, 160.0, 1, 14_091_264, TERMS[:2])
    assert ("loss 26.09 (contrastive 4.468, caption 2 x 10.81) · 160/s" in stream.getvalue()) == shown
    assert "stage 2/2 · 14.1 M" in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_work_between_two_steps_has_lines_of_its_own_after_the_step() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(512, stream=stream, interval=10.0, clock=clock) as progress:
        progress.update(128, 5.0, 64.0, 0, 1000)
        clock.now = 4.0
        progress.update(256, 4.0, 64.0, 0, 1000)  # waits for its turn
        with progress.counting("photos: samples embedded") as report:
            for second in range(5, 30, 5):
                clock.now = float(second)
                report(second, 100)
    assert [line.split(" · ")[0].strip() for line in stream.getvalue().splitlines()] == [
        "25%",
        "50%",
        "photos: samples embedded: 15 of 100, 1 min 02 s left",
        "photos: samples embedded: 25 of 100, 1 min 03 s left",
    ]


def test_work_between_two_steps_takes_the_place_of_the_bars_text() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(512, stream=stream, clock=clock) as progress:
        progress.update(256, 4.25, 64.0, 0, 1000)
        before = stream.getvalue()
        with progress.counting("photos: samples embedded") as report:
            report(3, 100)  # too soon
            assert stream.getvalue() == before
            clock.now = 1.0
            report(7, 100)
            assert "photos: samples embedded: 7 of 100" in stream.getvalue()
        assert "loss 4.25" in stream.getvalue()[len(before) :]
        assert "\n" not in stream.getvalue()[len(before) :]  # one line that is rewritten


def test_the_terms_come_before_the_size_where_not_both_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(60_416, stages=2, stream=stream) as progress:
        progress.update(30_208, 26.09, 160.0, 1, 14_091_264, TERMS[:2])
    assert "loss 26.09 (contrastive 4.468, caption 2 x 10.81) · 160/s · 3 min 09 s left" in stream.getvalue()
    assert "14.1 M" not in stream.getvalue()


def test_a_long_name_leaves_room_for_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Terminal(), Clock()
    name = f"s3://{'a/' * 60}photos.tar: samples embedded"
    with Progress(512, stream=stream, clock=clock) as progress, progress.counting(name) as report:
        clock.now = 1.0
        report(7, 100)
    assert "a/photos.tar: samples embedded: 7 of 100, 13 s left" in stream.getvalue()
