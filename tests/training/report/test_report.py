"""The report page, parsed: self-contained, escaped, true to the metrics, written at any time of a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from treering.data.storage.credentials import masked
from treering.tests.support.browser import Browser, check_page
from treering.tests.support.made_up_run import (
    BEGAN,
    NAMES,
    RECIPE,
    Page,
    bad,
    evaluation,
    lines_of_a_run,
    page_of,
    write_run,
)
from treering.training.report import history, readable, write_report
from treering.training.report.reading import read_run

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/p.png onerror=alert(1)>\"&\x1b[31m\u202etxt"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished run with everything in it."""
    ledger = [
        bad("the picture does not decode", 1),
        bad("the picture does not decode", 2),
        bad("the caption is not UTF-8", 3),
    ]
    return write_run(tmp_path / "emoji", lines_of_a_run(), [evaluation(s, s * 256) for s in (79, 158, 236)], ledger)


def assert_self_contained(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
                assert value, (tag, name)
                assert value.startswith(("data:image/", "#")) or (tag, value) == ("link", "data:,"), (tag, name, value)
            if name == "style":
                raise AssertionError("styles belong to page.css")
            assert "url(" not in (value or ""), (tag, name, value)
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "://" not in page.style


def test_page_is_self_contained(whole: Path) -> None:
    page = page_of(whole)
    assert_self_contained(page)
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert len(page.source.encode()) < 2_000_000


def test_the_pictures_of_twemoji_are_credited_also_on_paper(whole: Path) -> None:
    style = page_of(whole).style
    credits = re.findall(r'<p class="credit">(.*?)</p>', (whole / "report.html").read_text())
    assert len(credits) == 1
    for asked in ("Twemoji", "Copyright 2019 Twitter, Inc and other contributors", "CC BY 4.0", "scaled"):
        assert asked in credits[0]
    assert "https://creativecommons.org/licenses/by/4.0/" in credits[0]
    hidden = re.findall(r"([^{}]*)\{ display: none", style)
    assert any(".made" in selectors for selectors in hidden)
    assert not any("footer" in selectors or ".credit" in selectors for selectors in hidden)


def test_evaluation_pictures_are_credited_and_other_sources_are_not(tmp_path: Path) -> None:
    other = RECIPE.replace("samples://emoji", "photos/*.tar")
    for name, recipe, count in (("other", other, 0), ("seen", f"{other}eval: {{data: samples://emoji/held_out}}\n", 1)):
        run = write_run(tmp_path / name, lines_of_a_run(), recipe=recipe)
        assert page_of(run) is not None
        assert (run / "report.html").read_text().count("CC BY 4.0") == count


def test_every_picture_has_words_and_ids_are_unique(whole: Path) -> None:
    page = page_of(whole)
    assert len(page.of("img")) == 12
    assert all(image["alt"] for image in page.of("img"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for svg in page.of("svg"):
        assert svg.get("aria-hidden") == "true" or (
            svg["role"] == "img" and set(svg["aria-labelledby"].split()) <= set(ids)
        )  # type: ignore[union-attr]
    for link in page.of("a"):
        assert str(link["href"])[1:] in ids


def test_final_scores_stand_beside_chance(whole: Path) -> None:
    page = page_of(whole)
    assert page.row("R@5 612 candidates 49.0%") == "R@5 612 candidates 49.0% 0.82% 60 ×"
    assert page.row("role 24 classes") == "role 24 classes 61.3% 4.2% 15 ×"
    assert page.row("skin tone 5 classes") == "skin tone 5 classes 79.3% 20.0% 4 ×"
    for heading in ("Image → text", "Text → image", "Zero-shot"):
        assert heading in page.text


def test_numbers_are_those_of_the_metrics(whole: Path) -> None:
    lines = lines_of_a_run()
    last = [line for line in lines if line["event"] == "step"][-1]
    page = page_of(whole)
    assert f"{last['loss']:.4g}" in page.text
    assert "60,416" in page.text
    assert "14.1 M" in page.text
    assert "grown from 10.2 M" in page.text
    final = page.row("60,416")
    assert final.split() == [
        "60,416",
        f"{last['loss']:.4g}",
        f"{last['losses']['contrastive']:.4g}",
        f"{last['losses']['caption']:.4g}",
        f"{last['lr']:.4g}",
        f"{last['grad_norm']:.4g}",
        "160",
    ]
    assert "2 processes on node-1 (CPU)" in page.text
    assert "Started 22 November 2026, 16:00 UTC" in page.text


def test_growth_and_resume_are_marked(whole: Path) -> None:
    page = page_of(whole)
    marks = [a for t, a in page.elements if t == "line" and str(a.get("class")).startswith("mark")]
    charts = [a for a in page.of("svg") if a.get("class") == "chart"]
    assert sum("growth" in str(m["class"]) for m in marks) == len(charts)
    assert sum("resume" in str(m["class"]) for m in marks) == len(charts)
    labels = re.findall(r'<text class="growth"[^>]*>([^<]*)</text>', page.source)
    assert labels == ["image.depth 4 → 8", "text.depth 3 → 6"] * 2  # once in the wide drawing, once in the narrow one
    assert "grown at 20,224 samples: image.depth 4 → 8, text.depth 3 → 6" in page.text
    assert page.row("After 20,224 samples").endswith(
        "Parameters 10.2 M → 14.1 M, in 0.3 s; logits changed by at most 3.2e-7."
    )
    assert page.row("image.depth") == "image.depth 4 ▲ grown to 8"
    assert page.row("image.width") == "image.width 192 192"


def test_time_adds_up(whole: Path) -> None:
    view = history.time(read_run(whole))
    assert view is not None
    lines = lines_of_a_run()
    steps = [line for line in lines if line["event"] == "step"]
    rows = {row["kind"]: row["seconds"] for row in view["rows"]}
    assert rows["training"] == readable.duration_text(sum(s["seconds"]["compute"] for s in steps))
    assert rows["data"] == readable.duration_text(sum(s["seconds"]["data"] for s in steps))
    assert rows["eval"] == readable.duration_text(3 * 6.5)
    assert rows["commit"] == readable.duration_text(7 * 0.8)
    assert rows["startup"] == readable.duration_text(5.0 + 6.5)
    resumed = next(line for line in lines if line["event"] == "resume")
    before = lines[lines.index(resumed) - 1]
    alive = (before["time"] - BEGAN) + (lines[-1]["time"] - (resumed["time"] - 6.5))
    assert view["total"] == readable.duration_text(alive)


def test_evaluation_between_two_log_lines_is_drawn_over_the_training_around_it(tmp_path: Path) -> None:
    lines = [
        {"event": "start", "step": 0, "samples": 0, "time": BEGAN, "seconds": {"build": 0.0}},
        {"event": "step", "step": 10, "samples": 10, "time": BEGAN + 10, "seconds": {"data": 1.0, "compute": 9.0}},
        {"event": "eval", "step": 14, "samples": 14, "time": BEGAN + 18, "seconds": 4.0},
        {"event": "step", "step": 20, "samples": 20, "time": BEGAN + 24, "seconds": {"data": 0.0, "compute": 10.0}},
    ]
    view = history.time(read_run(write_run(tmp_path / "run", lines)), width=240)
    assert view is not None
    blocks = re.findall(r'class="t-(training|eval)" x="([\d.]+)" y="4" width="([\d.]+)"', str(view["wide"]))
    assert blocks == [("training", "0.0", "100.0"), ("training", "100.0", "140.0"), ("eval", "140.0", "40.0")]
    rows = {row["kind"]: row["seconds"] for row in view["rows"]}
    assert rows == {"training": "19 s", "data": "1.0 s", "eval": "4.0 s"}


def test_right_caption_is_marked_without_colour(whole: Path) -> None:
    run = read_run(whole)
    found = sum(any(n["correct"] for n in e["nearest"]) for e in run.evaluations[-1]["examples"]["retrieval"])
    page = page_of(whole)
    assert 0 < found < 8
    assert (
        page.source.count('<span class="check" aria-hidden="true">✓</span><span class="unseen">right: </span>') == found
    )
    assert page.source.count("The right one is not among these") == 8 - found


def test_a_commit_takes_the_time_that_training_stood_still_for_it(tmp_path: Path) -> None:
    lines = [line | {"seconds": 9.0, "stall": 0.8} if line["event"] == "commit" else line for line in lines_of_a_run()]
    stood = history.time(read_run(write_run(tmp_path / "one", lines)))
    waited = history.time(read_run(write_run(tmp_path / "two", lines_of_a_run())))
    assert stood is not None
    assert waited is not None
    assert stood["rows"] == waited["rows"]


def test_generated_captions_stand_beside_the_true_ones_with_their_history(whole: Path) -> None:
    row = page_of(whole).source.split('id="captions"')[1].split("</li>")
    first = " ".join(re.sub("<[^>]+>", " ", "".join(row[:3])).split())
    assert (
        "generated woma at 60416 true woman firefighter: dark skin tone ; alias woman firefighter: dark skin tone "
        "earlier 20.2 k woma at 20224 40.4 k woma at 40448" in first
    )


def test_bad_samples_are_counted_by_reason(whole: Path) -> None:
    page = page_of(whole)
    assert page.row("the picture does not decode") == "the picture does not decode 2 01 in emoji-00001.tar"
    assert page.row("the caption is not UTF-8") == "the caption is not UTF-8 1 03 in emoji-00001.tar"
    assert "Bad samples were replaced 3 times" in page.text


def test_lineage_tells_attempts_worlds_growth_and_folds_commits(whole: Path) -> None:
    entries = history.lineage(read_run(whole))
    assert [(e["event"], e["count"]) for e in entries] == [
        ("start", 1),
        ("commit", 2),
        ("commit", 1),
        ("grow", 1),
        ("commit", 2),
        ("resume", 1),
        ("commit", 1),
        ("commit", 1),
        ("end", 1),
    ]
    assert entries[5]["text"] == "1 process on node-2 (CPU) from step-000000150; world size 2 → 1"
    assert entries[1]["samples"] == "10,240"
    assert entries[1]["samples_to"] == "15,360"


def test_lineage_of_an_earlier_run_comes_first(whole: Path) -> None:
    earlier = {
        "event": "grow",
        "step": 7,
        "samples": 700,
        "time": BEGAN - 1000,
        "world": 4,
        "detail": {"from": {"image.width": 96}, "to": {"image.width": 192}},
    }
    same = {"event": "start", "step": 0, "samples": 0, "time": BEGAN + 5, "world": 2, "detail": {}}
    (whole / "lineage.json").write_text(json.dumps([earlier, same]))
    entries = history.lineage(read_run(whole))
    assert entries[0]["text"] == "image.width 96 → 192"
    assert [e["event"] for e in entries].count("start") == 1
    assert entries[1]["text"].endswith("world size 4 → 2")


def test_credentials_in_urls_are_blotted_out(whole: Path) -> None:
    page = page_of(whole)
    assert "SECRET" not in page.source
    assert "ACCESS" not in page.source
    assert "s3://***@bucket/runs" in page.text
    assert masked("https://h/x?X-Amz-Signature=abc&part=1") == "https://h/x?X-Amz-Signature=***&part=1"
    assert masked("samples://emoji me@home") == "samples://emoji me@home"


# --------------------------------------------------------------------------------------------- hostile and partial


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    lines = lines_of_a_run()
    for line in lines:
        if line["event"] == "step":
            line["losses"][HOSTILE] = 1.0
        if line["event"] == "grow":
            line["from"][HOSTILE], line["to"][HOSTILE] = 1, 2
        if line["event"] == "eval":
            line["scores"] = {HOSTILE: 0.5, f"zero_shot/{HOSTILE}": 0.5}
            line["chance"] = {HOSTILE: 0.1}
        if line["event"] in ("start", "resume"):
            line["hosts"] = [HOSTILE]
        if line["event"] == "commit":
            line["url"] = line["reason"] = HOSTILE
    e = evaluation(236, 60416, [HOSTILE, *NAMES])
    e["examples"]["captions"][0]["generated"] = HOSTILE
    e["examples"]["retrieval"][1]["image"] = "http://evil.example/p.png"
    e["examples"]["retrieval"][2]["image"] = 'data:image/png;base64,AA" onerror="alert(1)'
    e["examples"]["retrieval"][3]["image"] = "data:image/svg+xml;base64,AAAA"
    entry = dict.fromkeys(("source", "shard", "key", "reason"), HOSTILE)
    recipe = RECIPE.replace(
        "samples://emoji", HOSTILE.replace("'", "''").replace("\x1b", "")
    ) + f"# {HOSTILE}\n".replace("\x1b", "")
    page = page_of(write_run(tmp_path / "run", lines, [e], [entry], recipe))
    assert_self_contained(page)
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    assert page.text.count("<script>alert('x')</script>") > 20
    assert page.source.count("picture not shown") == 3


def test_texts_of_a_megabyte_are_cut(tmp_path: Path) -> None:
    lines = lines_of_a_run()
    e = evaluation(236, 60416, ["A" * 1_000_000, "x " * 500_000, *NAMES])
    e["examples"]["captions"][0]["generated"] = "B" * 1_000_000
    entry = dict.fromkeys(("source", "shard", "key", "reason"), "C" * 1_000_000)
    page = page_of(write_run(tmp_path / "run", lines, [e], [entry]))
    assert len(page.source) < 1_000_000
    assert "A" * 1_000 + "…" in page.text
    for letter in "ABC":
        assert letter * 1_001 not in page.source


def test_unfinished_run_with_a_torn_last_line(tmp_path: Path) -> None:
    lines = lines_of_a_run()[:12]
    run = write_run(tmp_path / "run", lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event":"step","step":60,"samp')
    page = page_of(run)
    assert_self_contained(page)
    assert f"Not finished: {readable.percent(lines[-1]['samples'] / 60416)} of the samples" in page.text
    assert "This run has no scores yet." in page.text
    assert "The model has not changed its size so far." in page.text
    assert "0 bad samples" in page.text
    assert "unreadable" not in page.text


def test_an_unreadable_line_in_the_middle_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of_a_run())
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*text[:5], "{broken\n", *text[5:]]))
    assert "1 unreadable line of metrics.jsonl" in page_of(run).text


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_run_that_has_barely_begun(tmp_path: Path, count: int) -> None:
    page = page_of(write_run(tmp_path / "run", lines_of_a_run()[:count], recipe=RECIPE if count else ""))
    assert_self_contained(page)
    assert "nan" not in page.source.replace("nance", "")


def test_losses_that_are_not_numbers_leave_a_gap(tmp_path: Path) -> None:
    lines = [line for line in lines_of_a_run() if line["event"] in ("start", "step")]
    lines[5]["loss"], lines[6]["loss"], lines[7]["losses"] = None, float("nan"), {"contrastive": float("inf")}
    page = page_of(write_run(tmp_path / "run", lines))
    path = re.search(r'<path class="line s0" d="([^"]*)"', page.source)
    assert path
    assert path[1].count("M") == 2
    assert not re.search(r"\b(nan|inf)\b", page.source)


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: .* `treering train"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_is_replaced_in_one_piece(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole / "report.html").write_text("the old one")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(whole)
    assert (whole / "report.html").read_text() == "the old one"
    write_report(whole)
    assert [p.name for p in whole.iterdir() if p.name.startswith(".report")] == []


def test_page_stays_small_when_the_run_is_long(tmp_path: Path) -> None:
    step = next(line for line in lines_of_a_run() if line["event"] == "step")
    lines = [{**step, "step": n, "samples": n * 256, "time": BEGAN + n, "loss": 3 + math.sin(n)} for n in range(20_000)]
    e = evaluation(19_999, 19_999 * 256)
    photo = "data:image/jpeg;base64," + "A" * 300_000
    e["examples"] = {
        "retrieval": [x | {"image": photo} for x in e["examples"]["retrieval"]],
        "captions": [x | {"image": photo} for x in e["examples"]["captions"]],
    }
    path = write_report(write_run(tmp_path / "run", lines, [e]))
    assert path.stat().st_size < 2_000_000
    longest = max(
        d.count("L") + d.count("M") for d in re.findall(r'<path class="line[^"]*" d="([^"]*)"', path.read_text())
    )
    assert 300 < longest <= 400


# ---------------------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_writing_is_readable_on_every_ground_in_light_dark_and_print(whole: Path) -> None:
    style = page_of(whole).style
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    palettes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", style)
    ]
    assert len(palettes) == 3
    assert len({frozenset(p) for p in palettes}) == 1, "light, dark and print define the same variables"
    writing = set(re.findall(r"(?<![\w-])color: var\(--([\w-]+)\)", style)) | set(
        re.findall(r"text[^{}]*\{[^}]*fill: var\(--([\w-]+)\)", style)
    )
    assert writing == {"ink", "quiet", "accent"}
    grounds = set(re.findall(r"background: var\(--([\w-]+)\)", style)) - writing
    assert grounds == {"paper", "raised"}
    lines = {name for name in palettes[0] if re.fullmatch(r"s\d", name)}
    assert len(lines) == 6
    for palette in palettes:
        for ink in writing | lines:
            for ground in grounds:
                assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground, palette)
    assert not re.search(
        r"(?<![\w-])(color|fill|stroke|background): (#|rgb|white|black)", style.replace("background: #ffffff", "")
    ), "colours come from the variables"


def test_what_a_growth_lost_and_won_is_told(whole: Path) -> None:
    section = page_of(whole).source.split('id="growth"')[1].split("</section>")[0]
    assert "after 20,224 samples, before the last growth" in section
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", section.split("McNemar")[1])
    assert cells[5:] == ["zero_shot/role", "17", "43", "612", "0.00104"]


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_the_page_in_a_browser(whole: Path, browser: Browser, width: int, height: int, dark: bool) -> None:
    page_of(whole)
    assert check_page(browser, whole / "report.html", width, height, dark) >= 6
