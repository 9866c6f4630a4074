"""Every command of docs/howto.md, in the order of the page, and what it is said to do."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import treering as package
from treering.launch.recipe.load import read_recipe
from treering.tests.launch.conftest import TINY
from treering.tests.support.made_up_shards import shard
from treering.tests.support.tiny_runs import lines
from treering.training.checkpoint.commits import find_commit

PAGE = Path(__file__).parents[2] / "docs/howto.md"
Run = Callable[..., object]


def png(number: int) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (32, 40), (12 * number, 100, 200)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def page(treering: Run, here: Path, s3: str) -> Path:
    """The folder in which every command of the page has been given."""
    recipe = TINY.replace("{source: samples://emoji}", '{source: "shards/photos/*.tar", name: photos}')
    (here / "recipe.yaml").write_text(recipe + "eval: {suites: []}\n")
    for name in ("photos", "new"):
        members = [
            (f"{n}.{kind}", data) for n in range(20) for kind, data in (("png", png(n)), ("txt", b"number %d" % n))
        ]
        shard(here / "shards" / name / "0.tar", members)
    commands = re.findall(r"^    (?:AWS_ENDPOINT_URL=\S+ )?treering (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        done = treering(*shlex.split(command.replace("s3://BUCKET", s3)))
        assert done.returncode == 0, (command, done.stderr)  # type: ignore[attr-defined]
    return here


def test_the_commands_of_the_page(page: Path) -> None:
    runs = page / "runs"
    rates = {name: [row["lr"] for row in lines(runs / name, "step")] for name in ("cooled", "slower", "trunk")}
    peak = read_recipe(str(page / "recipe.yaml"), []).recipe.optimizer.lr
    assert rates["cooled"] == [peak]  # one step: the whole of the cool-down
    assert rates["slower"] == pytest.approx([3e-4] * 3 + [3e-4 * 8 / 12.8])  # the last fifth of 64 samples falls
    assert rates["trunk"][-1] == peak
    for name, samples in (("cooled", 40), ("slower", 64), ("trunk", 64), ("more", 32), ("averaged", 32)):
        assert find_commit(str(runs / name)).manifest.state.samples == samples, name
    assert [event.event for event in find_commit(str(runs / "trunk")).manifest.state.lineage] == ["start", "resume"]
    assert any(part.kind == "ema" for part in find_commit(str(runs / "averaged")).manifest.parts)

    model = package.load(runs / "trunk")
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (50, 40), (0, 200 if name == "a.jpg" else 0, 90)).save(page / name)
    given = torch.stack([model.preprocess(page / "a.jpg"), model.preprocess(page / "b.jpg")])
    assert torch.equal(
        model.encode_image([page / "a.jpg", str(page / "b.jpg")], normalize=True),
        model.encode_image(given, normalize=True),
    )
