"""Sweeps without a cluster: the grid against a count by hand, ranks against scipy's, the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from typer.testing import CliRunner

from treering.launch.cli import app
from treering.launch.commands.status import read_status
from treering.launch.errors import RecipeError
from treering.launch.jobs.sweep import GridPoint, grid_points, write_sweep
from treering.launch.recipe.load import read_recipe
from treering.tests.support.browser import Browser, check_page
from treering.training.report import write_report
from treering.training.report.reading import read_run
from treering.training.report.sweep_page import Member, ranking, read_sweep

HOSTILE = "<img src=http://evil.example/p.png>\x1b[31m"


def test_every_point_of_the_grid_has_a_folder_values_and_a_store() -> None:
    points = grid_points(["lr=1e-3,5e-4", "data.batch=256, 512"], "s3://bucket/run/")
    assert [(p.name, p.values["optimizer.lr"], p.values["data.batch"], p.store) for p in points] == [
        (f"lr={lr}_batch={batch}", lr, batch, f"s3://bucket/run/lr={lr}_batch={batch}")
        for lr in ("1e-3", "5e-4")
        for batch in ("256", "512")
    ]
    recipe = read_recipe("emoji", points[3].overrides).recipe
    assert (recipe.optimizer.lr, recipe.data.batch, recipe.checkpoint.to) == (5e-4, 512, points[3].store)
    assert [p.overrides for p in grid_points(["seed=0,1"], None)] == [["seed=0"], ["seed=1"]]
    assert grid_points([], "s3://bucket/run") == [GridPoint("", {}, None)]


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["lr"], "write a key and its values"),
        (["lr=1e-3,"], "write a key and its values"),
        (["lr=1e-3,1e-3"], "names a value twice"),
        (["lr=1e-3", "optimizer.lr=5e-4"], "is given twice"),
        (["checkpoint.to=a,b"], "is set by the sweep already"),
        (["nothing=1,2"], "no key has this name"),
        (["samples=1,2"], "write the full path"),
        (["name=a/b,a?b"], "would share a folder"),
        (["seed=" + ",".join(map(str, range(1001)))], "at most 1,000"),
    ],
)
def test_an_invalid_sweep_is_refused(sweeps: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        grid_points(sweeps, None)


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True))
def test_no_value_leaves_the_folder(values: list[str]) -> None:
    try:
        points = grid_points([f"name={','.join(values)}"], None)
    except RecipeError:
        return
    for point in points:
        assert re.fullmatch(r"name=[A-Za-z0-9.=+-]*", point.name)


def write_run(folder: Path, scores: dict[str, float] | None, loss: float = 1.0, end: bool = True) -> None:
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: tiny\ndata: {batch: 100}\nstages: [{samples: 800}]\n")
    rows = [{"event": "start", "step": 0, "samples": 0, "time": 1}]
    for n in range(1, 9):
        rows.append({"event": "step", "step": n, "samples": 100 * n, "time": n, "loss": loss + 1 / n})
        if scores is not None and n % 4 == 0:
            evaluated = {key: value * n / 8 for key, value in scores.items()}
            intervals = {key: (0.9 * value, 1.1 * value) for key, value in evaluated.items()}
            rows.append({**rows[-1], "event": "eval", "scores": evaluated, "intervals": intervals, "chance": {}})
    if end:
        rows.append({"event": "end", "step": 8, "samples": 800, "time": 9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four points: two that were evaluated, one that still trains, one that has not started."""
    folder = tmp_path / "sweep"
    points = grid_points(["lr=1e-3,5e-4", "batch=256,512"], None)
    write_sweep(folder, [*points[:3], GridPoint(points[3].name, points[3].values | {"name": HOSTILE}, None)])
    names = ["retrieval/image_to_text@1", "x/calibration_error"]
    write_run(folder / points[0].name, dict(zip(names, (0.4, 0.02), strict=True)))
    write_run(folder / points[1].name, dict(zip(names, (0.6, 0.01), strict=True)))
    write_run(folder / points[2].name, None, end=False)
    return folder


def test_the_page_says_which_run_is_ahead(sweep: Path) -> None:
    page = write_report(sweep).read_text()
    assert "2 of 4 runs finished" in page
    assert "<strong><bdi>lr=1e-3_batch=512</bdi></strong> is ahead: " in page
    assert "its 95% interval is clear of all others&#39; in 2 of 2 scores" in page
    for text in ("60.0%<small>54.0% to 66.0%</small>", "Not started", "Not finished", "<small>of 800</small>", "5e-4"):
        assert text in page, text
    assert len(re.findall(r'<td class="number changed">', page)) == 2  # the best scores; three losses are equal
    assert "<img" not in page
    assert "\x1b" not in page
    assert re.findall(r'href="([^#"]+)"', page)[1] == "lr%3D1e-3_batch%3D256/report.html"


@pytest.mark.parametrize(
    ("other", "said", "marked"),
    [
        ((0.41, 0.02), "No run is ahead of all others", 0),  # inside the interval
        ((0.6, 0.05), "No run is ahead of all others", 2),  # each is better in one
        ((0.4, 0.02), "No run is ahead of all others", 0),  # a tie
        ((0.6, 0.021), "is ahead: its 95% interval is clear of all others&#39; in 1 of 2 scores", 1),
    ],
)
def test_no_run_is_ahead_inside_an_interval(tmp_path: Path, other: tuple[float, float], said: str, marked: int) -> None:
    """Neither in words nor by colour; the loss is that of `treering status`."""
    folder, names = tmp_path / "sweep", ["retrieval/image_to_text@1", "x/calibration_error"]
    points = grid_points(["lr=1e-3,5e-4"], None)
    write_sweep(folder, points)
    write_run(folder / points[0].name, dict(zip(names, (0.4, 0.02), strict=True)), loss=2.0)
    write_run(folder / points[1].name, dict(zip(names, other, strict=True)))
    page = write_report(folder).read_text()
    assert said in page
    marks = re.findall(r'<td class="number changed">([^<]*)', page)
    assert len(marks) == marked + 1
    losses = [run["loss"] for run in read_status(str(folder))["runs"].values()]
    assert losses == [2.125, 1.125]
    assert marks[0] == "1.125"
    assert ">2.125<" in page


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_the_page_in_a_browser(sweep: Path, browser: Browser, width: int, height: int, dark: bool) -> None:
    assert check_page(browser, write_report(sweep), width, height, dark) == 3


def test_a_run_that_ends_writes_the_page_and_what_is_wrong_there_stops_no_run(sweep: Path) -> None:
    run = sweep / "lr=1e-3_batch=256"
    write_report(run)
    assert "2 of 4 runs finished" in (sweep / "report.html").read_text()
    (sweep / "sweep.json").write_text('{"runs": {"../other": {}}}')
    (run / "report.html").unlink()
    assert write_report(run).is_file()
    with pytest.raises(ValueError, match=r"'../other', which is not a folder name"):
        read_sweep(sweep)
    with pytest.raises(RecipeError, match=r"'../other', which is not a folder name"):
        write_sweep(sweep, grid_points(["seed=7,8"], None))


def test_a_sweep_that_is_submitted_again_keeps_its_runs(sweep: Path) -> None:
    write_sweep(sweep, grid_points(["seed=7,8"], None))
    assert [m.name for m in read_sweep(sweep)][3:] == ["lr=5e-4_batch=512", "seed=7", "seed=8"]


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=6))
def test_ranks_are_means_of_places(tmp_path_factory: pytest.TempPathFactory, table: list[tuple[int, ...]]) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    keys = ["a/accuracy@1", "b/accuracy@1", "c/calibration_error"]
    members = []
    for n, row in enumerate(table):
        write_run(folder / str(n), dict(zip(keys, map(float, row), strict=True)))
        members.append(Member(str(n), {}, read_run(folder / str(n))))
    signs = (-1, -1, 1)
    places = [rankdata([sign * row[c] for row in table]) for c, sign in enumerate(signs)]
    expected = [float(sum(column[n] for column in places)) / 3 for n in range(len(table))]
    found = {member.name: rank for member, rank in ranking(members)}
    assert [found[str(n)] for n in range(len(table))] == pytest.approx(expected)
    assert [rank for _, rank in ranking(members)] == sorted(found.values())


def test_status_has_a_row_for_each_run(sweep: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(sweep)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    rows = done.output.splitlines()
    assert rows[0].split()[:2] == ["run", "state"]
    assert [row.split()[0] for row in rows[1:5]] == [m.name for m in read_sweep(sweep)]
    assert "finished" in rows[1]
    assert "60.0%" in rows[2]
    assert "not started" in rows[4]
    found = json.loads(CliRunner().invoke(app, ["status", str(sweep), "--json"]).stdout)
    assert not found["finished"]
    assert found["runs"]["lr=1e-3_batch=256"]["finished"]
    stopped = CliRunner().invoke(app, ["stop", str(sweep)])
    assert stopped.exit_code != 0
    assert stopped.output.count("no process of the run") == 4
