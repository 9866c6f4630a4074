"""The loss in words: its terms, the held-out loss beside that of training, and what follows; on the page too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from treering.tests.support.made_up_run import lines_of_a_run, page_of, write_run
from treering.training.report.losses import conclusion, gap_text, held_out_text, training_beside


def held(loss: float | None, training: float | None = None, **more: Any) -> dict[str, Any]:
    """A held-out loss of one term of weight 1."""
    row = {"loss": loss, "losses": {"contrastive": loss}, "weights": {"contrastive": 1.0}, "without": [], **more}
    row |= {"samples": 1024, "batch": 256, "data": "samples://emoji/held_out"}
    beside = {"loss": training, "losses": {"contrastive": training}, "lines": 10}
    return row | ({"training": beside} if training is not None else {})


def lines(*pairs: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [{"samples": 1000 * (n + 1), "held_out": held(*pair)} for n, pair in enumerate(pairs)]


def test_the_gap_is_said_with_what_it_is_of() -> None:
    assert gap_text(held(3.41, 1.12)) == "held-out loss 3.41, training 1.12 in the last 10 log lines: gap 2.29"
    assert gap_text(held(3.41)) == "held-out loss 3.41"
    assert gap_text(held(None, 1.12)) == "held-out loss not finite"
    two = held(26.09) | {
        "losses": {"contrastive": 4.47, "caption": 10.81},
        "weights": {"contrastive": 1.0, "caption": 2.0},
    }
    assert held_out_text(two) == "held-out loss 26.09 (contrastive 4.47, caption 2 x 10.81)"
    assert held_out_text(held(3.41) | {"without": ["my_term"]}) == "held-out loss 3.41 without my term"


def test_training_beside_it_is_of_the_same_terms_and_recent() -> None:
    steps = [
        {"samples": 100 * n, "losses": {"a": float(n), "b": 10.0 * n, "other": 1e9}} for n in range(1, 41)
    ]  # the newest tenth: 3,600 to 4,000
    found = training_beside({"weights": {"a": 1.0, "b": 0.5}}, steps)
    assert found == {"loss": 38.0 + 190.0, "losses": {"a": 38.0, "b": 380.0}, "lines": 5}
    steps[-1] = {"samples": 4000, "losses": {"a": None, "b": 1.0}}
    assert training_beside({"weights": {"a": 1.0}}, steps) == {"loss": 37.5, "losses": {"a": 37.5}, "lines": 4}
    assert training_beside({"weights": {"a": 1.0}}, []) is None


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(4.0, 4.2), (3.0, 3.1), (3.5, 1.1)], "It was lowest, 3, at 2,000 samples and has risen since"),
        ([(4.0, 3.8), (3.4, 1.1)], "far better on the samples that it trains on"),
        ([(4.0, 3.9)], "about as well"),
        ([(3.0, 3.9)], "about as well"),
        ([(4.0, 4.2), (3.0, 3.1), (3.5, 3.4)], "about as well"),  # both rose: no sign of learning by heart
        ([(4.0, 3.2)], ""),
        ([(None, 3.2)], ""),
        ([(4.0, None)], ""),
        ([(4.0, 3.9), (None, 3.2)], ""),
        ([(-4.0, -4.5)], ""),
    ],
)
def test_what_follows_from_it(pairs: list[tuple[float | None, float | None]], said: str) -> None:
    found = conclusion(lines(*pairs))
    assert said in found
    assert bool(found) == bool(said)


def test_other_terms_and_weights_do_not_look_like_a_rise() -> None:
    """A term that joins makes any loss larger, and a weight that is raised too."""
    rows = lines((3.0, 4.0), (2.9, 3.0))
    joined = {"losses": {"contrastive": 2.9, "caption": 9.0}, "weights": {"contrastive": 1.0, "caption": 1.0}}
    rows[1]["held_out"] |= {"loss": 11.9, **joined, "training": {"loss": 11.0, **joined, "lines": 1}}
    assert "about as well" in conclusion(rows)
    rows = lines((3.0, 3.1), (2.9, 2.0))
    raised = {"loss": 5.8, "weights": {"contrastive": 2.0}}
    rows[1]["held_out"] |= raised | {"training": {"loss": 4.0, "losses": {"contrastive": 2.0}, "lines": 1}}
    assert "risen" not in conclusion(rows)


def test_the_page_draws_it_on_the_loss_and_its_terms(tmp_path: Path) -> None:
    rows = lines_of_a_run()
    for row in rows:
        if row["event"] == "eval":
            row["held_out"] = held(9.0, 5.0) | {
                "losses": {"contrastive": 3.0, "caption": 3.0},
                "weights": {"contrastive": 1.0, "caption": 2.0},
                "training": {"loss": 5.0, "losses": {"contrastive": 1.0, "caption": 2.0}, "lines": 10},
            }
    page = page_of(write_run(tmp_path / "run", rows))
    assert "Held-out loss 9 (contrastive 3, caption 2 x 3), training 5 in the last 10 log lines: gap 4; on" in page.text
    assert "on 1,024 samples of samples://emoji/held_out in batches of 256." in page.text
    assert "far better on the samples that it trains on" in page.text
    assert ", 9 held out" in page.text
    charts = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    drawn = [chart for chart in charts if "held out: 9 at" in chart or "held out: 3 at" in chart]
    assert len({re.search(r"<title[^>]*>([^<]*)", chart)[1] for chart in drawn}) == 3  # type: ignore[index]
    assert all(chart.count('class="dot s1"') == 3 for chart in drawn)


@pytest.mark.parametrize("value", [None, 3, "text", [], {"loss": "x"}, {"loss": 3.0, "training": 7, "weights": [1]}])
def test_a_page_survives_any_record(value: Any, tmp_path: Path) -> None:
    rows = lines_of_a_run()
    for row in rows:
        if row["event"] == "eval":
            row["held_out"] = value
    assert page_of(write_run(tmp_path / "run", rows)).of("svg")


def test_a_run_with_a_held_out_loss_alone_has_no_scores(tmp_path: Path) -> None:
    rows = lines_of_a_run()
    for row in rows:
        if row["event"] == "eval":
            row |= {"scores": {}, "chance": {}, "sizes": {}, "held_out": held(9.0, 5.0)}
    page = page_of(write_run(tmp_path / "run", rows))
    assert "This run has no scores." in page.text
    assert "The latest of" not in page.text
    assert "Held-out loss 9" in page.text
