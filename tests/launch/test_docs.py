"""Every command that the README and the pages of docs/ show, in their order: typed into a folder where what they name
is there, in small. Those of docs/slurm.md need a cluster (tests/cluster), those of docs/checkpoints.md and of
docs/interchange.md are looked at more closely in test_checkpoints.py and test_interchange_page.py, those of
docs/howto.md in test_howto.py, those of docs/own_photos.md in test_own_photos.py."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from treering.launch.cli import app
from treering.tests.support.open_clip_models import published
from treering.training.checkpoint.commits import find_commit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"slurm.md", "checkpoints.md", "interchange.md", "howto.md", "own_photos.md"}
SMALL = [
    "data.batch=8",
    "data.workers=0",
    "model.embed_dim=16",
    "model.image={width: 16, depth: 1, heads: 2, patch: 16, resolution: 32}",
    "model.text={width: 16, depth: 1, heads: 2, context: 16}",
    "model.captioner=null",
    "objectives={contrastive: {}}",
    "engine.precision=fp32",
    "stages=[{samples: 32}]",
    "schedule.warmup=8",
    "eval.every=null",
    "eval.suites=[]",
    "log.every=1",
]
"""behind the words of every command that trains: the model of a page is too large for a test"""
RUN = Callable[..., object]


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that call us; comments go."""
    lines = re.findall(r"^(?:    |\$ )(treering .*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.fixture
def furnished(here: Path, treering: RUN, s3: str) -> Path:
    """A folder with pictures, shards of them here and in a bucket, and runs."""
    (here / "photos").mkdir()
    chance = np.random.default_rng(0)
    lines = ["path\tcaption\tsimilarity\tnsfw"]
    for number in range(24):
        picture = Image.fromarray(chance.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        picture.save(here / "photos" / f"{number}.jpg")
        lines.append(f"{number}.jpg\ta picture of number {number}\t{number / 24:.3f}\t0")
    (here / "captions.tsv").write_text("\n".join(lines))
    for number in range(4):
        (here / "pets" / ["cat", "dog"][number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(here / "pets" / ["cat", "dog"][number % 2] / f"{number}.jpg")
    (here / "pets.yaml").write_text("name: pets\ndata: pets\nprotocol: zero_shot\n")
    (here / "flickr.yaml").write_text(
        "{name: flickr, data: {source: captions.tsv, images: photos}, protocol: retrieval}"
    )
    for words in ("photos", "val", "laion --shard-size 12"):
        _typed(treering, f"treering data pack captions.tsv shards/{words} --images photos/")
    for folder in ("photos", "laion"):
        for number, shard in enumerate(sorted((here / "shards" / folder).glob("*.tar"))):
            with fsspec.open(f"{s3}/{folder}/{number:05d}.tar", "wb") as file:
                file.write(shard.read_bytes())
    for name, data in (("emoji", ""), ("photos", "data.train=[{source: shards/photos/*.tar}]")):
        typed = ["train", name, "--out", f"runs/{name}", *SMALL, *([data] if data else [])]
        _typed(treering, shlex.join(["treering", *typed]))
    return here


def _typed(treering: RUN, line: str) -> None:
    line, file = re.fullmatch(r"(.*?)(?: > (\S+\.yaml))?", line).groups()  # type: ignore[union-attr]
    done: Any = treering(*shlex.split(line)[1:])
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    if file:
        Path(file).write_text(done.stdout)


def _in_small(line: str, here: Path, bucket: str) -> str:
    """The line with its placeholders filled in and its sizes small."""
    line = line.replace("s3://BUCKET", bucket).replace("{00000..41407}", "{00000..00001}")
    for word, meaning in (("INPUT", "captions.tsv --images photos/"), ("OUTPUT", "shards/packed")):
        line = line.replace(word, meaning)
    line = re.sub(r"\bURL\b", "'shards/photos/*.tar'", line)
    line = re.sub(r"step-\d{12}-attempt-\d{4}", lambda _: find_commit(str(here / "runs/photos")).name, line)
    line = line.replace(" --watch", "")
    if line.startswith("treering data batch photos"):
        line += " 'data.train=[{source: shards/photos/*.tar}]' data.batch=64"
    if line.startswith("treering data batch runs/"):
        line = re.sub(r"--step \d+", "--step 3", line)  # of four
    if line.startswith("treering train"):
        line += " " + shlex.join(SMALL)
    return line


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.stem)
def test_every_command_of_the_page_works(page: Path, furnished: Path, treering: RUN, s3: str) -> None:
    for line in commands(page):
        if "dpeth" in line:
            done = treering(*shlex.split(line)[1:])
            assert (done.returncode, done.stderr.strip()) == (2, _shown_after(page, line))  # type: ignore[attr-defined]
        elif not line.startswith("treering submit"):  # needs a cluster
            _typed(treering, _in_small(line, furnished, s3))


def examples(command: Any = None, name: str = "treering") -> list[str]:
    """The commands that the help pages show, those of `import` first, as others use what it writes."""
    inside = getattr(command or get_command(app), "commands", {})
    found = [line for key, each in inside.items() for line in examples(each, key)]
    text = inspect.getdoc(command.callback) or "" if command and not inside else ""
    found += [line.strip() for line in text.splitlines() if line.startswith("    treering ")]
    return sorted(found, key=lambda line: not line.startswith("treering import"))


def test_every_example_of_the_help_pages_works(furnished: Path, treering: RUN, s3: str, open_clip: ModuleType) -> None:
    published(open_clip, furnished / "published", "ViT-B-32")
    for line in ("--out runs/other seed=2", "--out runs/far checkpoint.to=s3://BUCKET/emoji"):
        _typed(treering, _in_small(f"treering train emoji {line}", furnished, s3))
    system, shards = fsspec.core.url_to_fs(f"{s3}/photos")
    system.copy(shards, f"{shards.rpartition('/')[0]}/raw", recursive=True)
    lines = examples()
    assert len(lines) > 20
    for line in lines:
        typed = re.sub(r"open_clip:ViT\S+", "open_clip:local-dir:published", line).replace("{00000..01023}", "00000")
        typed = typed.replace("s3://BUCKET/emoji/step-000000000562-attempt-0001", "s3://BUCKET/emoji")
        typed = typed.replace("BUCKET/photos --shard", "BUCKET/again --shard")
        typed += " --suite retrieval" * (line == "treering compare runs/emoji runs/other")  # of SMALL's recipe
        if not line.startswith("treering submit"):  # needs a cluster
            _typed(treering, _in_small(typed, furnished, s3))


def _shown_after(page: Path, line: str) -> str:
    """What the page says that a command answers."""
    return page.read_text().split(line)[1].lstrip("\n").split("\n")[0].strip()


def test_every_command_there_is_stands_in_a_page() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    written = {word for page in PAGES for word in re.findall(r"treering ([a-z]+)", page.read_text())}
    assert known <= written, f"no page says what {sorted(known - written)} are for"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_the_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"(?<![\w/])(?:launch|training|models|data|slurm|tests|docs)/[\w/]+\.\w+", text))
    named |= {f"docs/{link}" if page.parent.name == "docs" else link for link in re.findall(r"\]\(([^)#:]+)\)", text)}
    lost = {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    assert not lost
