"""Comparisons against scipy and counting; the page in a real browser, at two sizes, light and dark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treering.data.errors import DataError
from treering.tests.support.browser import Browser, check_page
from treering.training.evaluate.comparing import comparison, tasks
from treering.training.evaluate.outcome import Evaluation
from treering.training.evaluate.reliability import calibration_interval, difference, holm
from treering.training.report.comparison_page import render_comparison, signed, verdict

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/p.png>\x1b[31m"


def evaluation(seed: int, rate: float, queries: int = 400) -> Evaluation:
    random = np.random.default_rng(seed)
    base = np.random.default_rng(0).random(queries)
    found = Evaluation()
    names = [f"key {i} {HOSTILE if i < 3 else ''}" for i in range(queries)]
    for task, more in (("pets/accuracy@1", 0.0), ("flickr/image_to_text@1", 0.05), ("flickr/image_to_text@5", 0.1)):
        noise = 0.1 * random.standard_normal(queries)
        found.add(task, torch.from_numpy(base + noise < rate + more), names, 0.1)
    found.add("says/cider", torch.from_numpy(base + random.random(queries) + rate), names)
    found.put("pets/calibration_error", 0.1 * rate, (0.05 * rate, 0.15 * rate))
    found.put("shape/modality_gap", rate)
    return found


def test_flips_intervals_and_significance_are_counted() -> None:
    from scipy.stats import binomtest

    first, second, third = evaluation(1, 0.5), evaluation(2, 0.6), evaluation(1, 0.5)
    found = {task.key: task for task in tasks(["a", "b", "c"], [first, second, third])}
    assert list(found) == list(first.scores)
    task = found["pets/accuracy@1"]
    before, after = (each.queries["pets/accuracy@1"].numpy() for each in (first, second))
    change, same = task.changes
    assert (change.lost, change.won) == ((before & ~after).sum(), (~before & after).sum())
    assert change.p_value == pytest.approx(binomtest(change.lost, change.lost + change.won).pvalue)
    assert change.value == pytest.approx(after.mean() - before.mean())
    assert change.low < change.value < change.high
    spread = (after.astype(float) - before).std() / 20
    assert change.high - change.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert list(change.flips) == [task_name(first, i) for i in np.nonzero(before & ~after)[0][:8]]
    assert (same.value, same.lost, same.won, same.p_value, same.low, same.high) == (0, 0, 0, 1, 0, 0)
    cider = found["says/cider"].changes[0]
    assert cider.lost is None
    assert cider.p_value < 0.05
    assert found["shape/modality_gap"].changes[0].p_value is None
    values = [t.changes[0].p_value for t in found.values() if t.changes[0].p_value is not None]
    assert [t.changes[0].adjusted for t in found.values() if t.changes[0].p_value is not None] == holm(values)


def task_name(found: Evaluation, i: int) -> str:
    return found.names["pets/accuracy@1"][i]


def test_other_queries_are_refused() -> None:
    with pytest.raises(DataError, match="a and b were not evaluated on the same queries of 'pets/accuracy@1'"):
        tasks(["a", "b"], [evaluation(1, 0.5), evaluation(1, 0.5, 399)])
    with pytest.raises(DataError, match="no score in common"):
        tasks(["a", "b"], [evaluation(1, 0.5), Evaluation()])


def test_the_bootstrap_of_differences_and_holm() -> None:
    """Of right and wrong, by one multinomial draw, as by drawing rows; Holm's against its definition."""
    random = np.random.default_rng(3)
    before, after = torch.from_numpy(random.random(300) < 0.5), torch.from_numpy(random.random(300) < 0.6)
    quick, slow = difference(before, after), difference(before.double() + 1e-9, after.double() + 1e-9 * before)
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.02)
    assert difference(before, before).p_value == 1.0
    assert difference(before, ~before | True).p_value < 0.01
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    probability = torch.from_numpy(random.random((200, 3))).softmax(1)
    low, high = calibration_interval(probability, torch.from_numpy(random.integers(0, 3, 200)))
    assert 0 <= low < high < 1


def test_verdicts_know_which_way_is_better() -> None:
    change = {"value": -0.1, "adjusted": 0.01}
    assert verdict("pets/accuracy@1", change) == "worse"
    assert verdict("pets/calibration_error", change) == "better"
    assert verdict("shape/modality_gap", change) == ""
    assert verdict("pets/accuracy@1", {"value": -0.1, "adjusted": 0.06}) == ""
    assert signed("pets/accuracy@1", -0.125) == "−12.5 pp"
    assert signed("says/cider", 0.5) == "+0.5"


def write_run(folder: Path, shift: float) -> str:
    folder.mkdir()
    rows = [
        {"event": event, "step": n, "samples": 100 * n, "time": n, "loss": 5 / n + shift, "scores": {"x/y": n / 9}}
        for n in range(1, 9)
        for event in ("step", "eval")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    names = ["first", "second", f"third {HOSTILE}"]
    models = [
        {
            "name": name,
            "commit": f"s3://me:hunter2@bucket/{n}",
            "samples": 72_000,
            "parameters": 5_800_000,
            "run": write_run(tmp_path / f"run-{n}", n * 0.3) if n < 2 else None,
        }
        for n, name in enumerate(names)
    ]
    evaluations = [evaluation(1, 0.5), evaluation(2, 0.62), evaluation(3, 0.45)]
    return comparison(models, tasks(names, evaluations)) | {"data": "samples://emoji/held_out"}


def test_the_page_says_what_was_found(found: dict[str, Any]) -> None:
    page = render_comparison(found)
    assert "<script" not in page
    assert "hunter2" not in page
    assert "\x1b" not in page
    assert "evil.example" in page  # as text
    assert not re.findall(r"(?:src|href)=\"(?!#|data:,)", page)
    change = found["tasks"][0]["changes"][0]
    lost = f'<td class="number">{change["lost"]}</td>'
    for text in (f"+{100 * change['value']:.1f} pp", lost, "flickr: image → text: R@1", "5.80 M"):
        assert text in page, text
    assert "better" in page
    assert "worse" in page


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_the_page_in_a_browser(
    found: dict[str, Any], browser: Browser, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    page = tmp_path / "comparison.html"
    page.write_text(render_comparison(found), encoding="utf-8")
    assert check_page(browser, page, width, height, dark) == 3  # the forest, and two curves
    shown = "[...document.querySelectorAll('svg.chart')].find(e => e.getClientRects().length)"
    marks = browser.evaluate(f"{shown}.querySelectorAll('circle.point').length")
    assert marks == 2 + 3 * 2  # a legend of two, and two models in three tasks
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
