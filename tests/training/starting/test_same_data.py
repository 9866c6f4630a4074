"""A run goes on with the data it began with, wherever they are, or says which shard differs."""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from treering.data import DataError, Loader
from treering.data.evaluation_sets import Form, open_pictures
from treering.data.samples.tokenizer import open_tokenizer
from treering.launch.recipe.load import read_recipe
from treering.launch.run import check
from treering.tests.support.made_up_shards import shard
from treering.tests.support.tiny_runs import SIZES, dies, lines, same_end, train_until
from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.checkpoint.store import StoreError
from treering.training.evaluate.protocols import Bench
from treering.training.recipe import Recipe
from treering.training.starting.same_data import open_together


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))


def pairs(count: int, start: int = 0, word: str = "thing") -> list[tuple[str, bytes]]:
    found = []
    for n in range(start, start + count):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 24, 3), np.uint8)).save(file, "PNG")
        found += [(f"{n:04}.png", file.getvalue()), (f"{n:04}.txt", f"{word} number {n}".encode())]
        found.append((f"{n:04}.json", b'{"score": %d}' % (n % 10)))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 20 samples."""
    for n in range(3):
        shard(tmp_path / "d" / f"{n}.tar", pairs(20, 20 * n))
    return tmp_path / "d"


def recipe(*sources: str, **others: str) -> Recipe:
    settings = {"stages": "[{samples: 144}]", "checkpoint.every": "36"} | {
        k.replace("__", "."): v for k, v in others.items()
    }
    train = ", ".join(sources)
    words = [*SIZES, f"data.train=[{train}]", "eval.suites=[]", *(f"{key}={value}" for key, value in settings.items())]
    return read_recipe("emoji", ["model.captioner=null", "objectives={contrastive: {}}", *words]).recipe


def of(pattern: object, rest: str = "") -> str:
    return f"{{source: '{pattern}'{rest}}}"


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out, "step")]


def move(folder: Path) -> object:
    return os.rename(folder, folder.with_name("moved")) or folder.with_name("moved") / "*.tar"


def renamed(folder: Path) -> object:
    for path in sorted(folder.iterdir(), reverse=True):
        os.rename(path, folder / f"part-0{path.name}")
    return folder / "*.tar"


MOVED: dict[str, Callable[[Path], object]] = {
    "another pattern": lambda folder: folder / "{0..2}.tar",
    "moved": move,
    "copied": lambda folder: shutil.copytree(folder, folder.with_name("copy")) / "*.tar",
    "a link": lambda folder: folder.with_name("link").symlink_to(folder) or folder.with_name("link") / "*.tar",
    "a URL": lambda folder: f"file://{folder}/*.tar",
    "renamed in order": renamed,
}


@pytest.mark.parametrize("how", MOVED)
def test_the_same_data_elsewhere_go_on_bit_for_bit(folder: Path, tmp_path: Path, how: str) -> None:
    here = recipe(of(folder / "*.tar"))
    loop.train(here, tmp_path / "whole")
    train_until(7, here, tmp_path / "run")
    there = recipe(of(MOVED[how](folder)))
    check(there, tmp_path / "run", 1)
    loop.train(there, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    same_end(tmp_path / "run", tmp_path / "whole")
    (resumed,) = [e for e in find_commit(str(tmp_path / "run")).manifest.state.lineage if e.event == "resume"]
    if how != "renamed in order":
        assert any("data.train.0.source" in change for change in resumed.detail["changes"])


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "added": (lambda folder: shard(folder / "3.tar", pairs(20, 60)), "80 samples in 4 shards, .* 3.tar is new"),
    "removed": (lambda folder: (folder / "2.tar").unlink(), "40 samples in 2 shards, .* 2.tar is missing"),
    "replaced": (lambda folder: shard(folder / "1.tar", pairs(9, 100)), "49 samples .* 1.tar has other samples"),
    "re-captioned": (lambda folder: shard(folder / "1.tar", pairs(20, 20, "thong")), "1.tar has other samples"),
    "re-ordered": (lambda folder: os.rename(folder / "0.tar", folder / "9.tar"), "0.tar is missing|at another place"),
    "within": (lambda folder: shard(folder / "0.tar", pairs(10, 10) + pairs(10)), "0.tar has other samples"),
}


@pytest.mark.parametrize("how", CHANGED)
def test_other_data_are_refused_with_the_shard(folder: Path, tmp_path: Path, how: str) -> None:
    here, out = recipe(of(folder / "*.tar")), tmp_path / "run"
    shutil.copytree(folder, tmp_path / "kept")
    loop.train(here, tmp_path / "whole")
    train_until(7, here, out)
    change, words = CHANGED[how]
    change(folder)
    for begin in (lambda: check(here, out, 1), lambda: loop.train(here, out)):
        with pytest.raises(StoreError, match=rf"the data changed: .*{words}"):
            begin()
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)  # the remedy
    check(here, out, 1)
    loop.train(here, out)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_shard_damaged_later_is_not_just_left_out(folder: Path, tmp_path: Path) -> None:
    here, out = recipe(of(folder / "*.tar"), data__bad_shards="skip"), tmp_path / "run"
    train_until(7, here, out)
    os.truncate(folder / "1.tar", 9000)
    with pytest.raises(StoreError, match=r"40 samples in 2 shards, .* 1.tar is missing"):
        loop.train(here, out)


def test_another_set_of_accepted_samples_is_refused(folder: Path, tmp_path: Path) -> None:
    here, out = recipe(of(folder / "*.tar", ", filter: score > 2")), tmp_path / "run"
    train_until(7, here, out)
    data = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(data.replace(b'{"score": 9}', b'{"score": 0}'))
    with pytest.raises(StoreError, match=r"now has 40 samples .* has read 42 samples .* 1.tar has other samples"):
        loop.train(here, out)
    with pytest.raises(StoreError, match="another recipe"):
        check(recipe(of(folder / "*.tar", ", filter: score > 3")), out, 1)


def test_one_of_two_sources_changed(folder: Path, tmp_path: Path) -> None:
    shard(tmp_path / "e" / "0.tar", pairs(20, 200))
    here, out = recipe(of(folder / "*.tar"), of(tmp_path / "e" / "*.tar")), tmp_path / "run"
    train_until(7, here, out)
    shard(tmp_path / "e" / "1.tar", pairs(20, 220))
    with pytest.raises(StoreError, match=r"the data changed: \S+/e/\*.tar now has 40 samples .* 1.tar is new"):
        check(here, out, 1)


def later(folder: Path, tmp_path: Path) -> Recipe:
    """A run whose second stage reads a second source."""
    stages = "[{samples: 72, mixture: {a: 1}}, {samples: 72, mixture: {b: 1}}]"
    a, b = of(folder / "*.tar", ", name: a"), of(tmp_path / "e" / "*.tar", ", name: b, weight: 0")
    return recipe(a, b, stages=stages)


@pytest.mark.parametrize(("step", "refused"), [(4, False), (11, True)])
def test_a_source_may_change_until_it_is_read(folder: Path, tmp_path: Path, step: int, refused: bool) -> None:
    shard(tmp_path / "e" / "0.tar", pairs(20, 200))
    here, out = later(folder, tmp_path), tmp_path / "run"
    with dies("step", step, lambda run: run.uploads.finish()):  # the commit of step 9 is complete
        loop.train(here, out)
    shard(tmp_path / "e" / "1.tar", pairs(20, 220))
    if refused:
        with pytest.raises(StoreError, match=r"/e/\*.tar now has 40 .* 1.tar is new"):
            loop.train(here, out)
    else:
        loop.train(here, out)
        state = find_commit(str(out)).manifest.state
        assert [each.samples for each in state.data] == [60, 40]


def test_data_changed_between_two_stages_stop_the_run(folder: Path, tmp_path: Path) -> None:
    """The loader of a stage with other pictures opens the sources again."""
    here = recipe(of(folder / "*.tar"), stages="[{samples: 72, context: 8}, {samples: 72}]")
    real = loop.Run.enter

    def changing(run: loop.Run, stage: int) -> None:
        if stage == 1:
            shard(folder / "3.tar", pairs(20, 60))
        real(run, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "enter", changing)
        with pytest.raises(StoreError, match=r"3.tar is new"):
            loop.train(here, tmp_path / "run")


def test_commits_without_an_identity_go_on_as_before(folder: Path, tmp_path: Path) -> None:
    here, out = recipe(of(folder / "*.tar")), tmp_path / "run"
    loop.train(here, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_same_data", lambda *_: None)
        real = loop.Run._commit

        def without(run: loop.Run, reason: str) -> None:
            run.state = run.state.model_copy(update={"data": ()})
            real(run, reason)

        patch.setattr(loop.Run, "_commit", without)
        train_until(7, here, out)
    assert find_commit(str(out)).manifest.state.data == ()
    with pytest.raises(StoreError, match=r"data.train.0.source: .* there, .* here"):  # nothing to compare but the URL
        check(recipe(of(folder / "?.tar")), out, 1)
    loop.train(here, out)
    assert losses(out) == losses(tmp_path / "whole")
    assert [each.samples for each in find_commit(str(out)).manifest.state.data] == [60]


def test_a_branch_may_read_other_data(folder: Path, tmp_path: Path) -> None:
    loop.train(recipe(of(folder / "*.tar"), stages="[{samples: 72}]"), tmp_path / "trunk")
    shard(folder / "3.tar", pairs(20, 60))
    start = f"{{commit: '{tmp_path / 'trunk'}', load: all}}"
    loop.train(recipe(of(folder / "*.tar"), init_from=start), tmp_path / "branch")
    assert [each.samples for each in find_commit(str(tmp_path / "branch")).manifest.state.data] == [80]


def test_scores_on_other_samples_are_said_to_be(folder: Path, tmp_path: Path, capsys: Any) -> None:
    shard(tmp_path / "e" / "0.tar", pairs(20, 200))
    extra = {"eval__suites": "[retrieval]", "eval__data": str(tmp_path / "e" / "*.tar"), "eval__every": "36"}
    here, out = recipe(of(folder / "*.tar"), **extra, eval__examples="0"), tmp_path / "run"
    train_until(7, here, out)
    os.utime(tmp_path / "e" / "0.tar")
    train_until(11, here, out)
    assert "are of other" not in capsys.readouterr().err
    shard(tmp_path / "e" / "0.tar", pairs(30, 200))
    loop.train(here, out)
    said = " ".join(capsys.readouterr().err.split())
    assert "e/*.tar changed: its scores from step 12 on are of other samples than those before" in said


def words_of(path: Path, words: str) -> Path:
    """A tokenizer.json that knows these words."""
    tokens = ["<s>", "</s>", "<unk>", *words.split(), *map(str, range(60))]
    made = tokenizers.Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    made.save(str(path))
    open_tokenizer.cache_clear()  # as in another process
    return path


def test_a_tokenizer_may_move_and_not_change(folder: Path, tmp_path: Path) -> None:
    def with_words(path: Path) -> Recipe:
        return recipe(of(folder / "*.tar"), data__tokenizer=str(path), model__text__vocabulary="100")

    here, out = words_of(tmp_path / "t.json", "thing number"), tmp_path / "run"
    loop.train(with_words(here), tmp_path / "whole")
    train_until(7, with_words(here), out)
    words_of(here, "number thing")
    with pytest.raises(StoreError, match=r"the tokenizer changed: data.tokenizer = \S+/t.json is not what the run"):
        check(with_words(here), out, 1)
    there = words_of(tmp_path / "moved.json", "thing number")
    check(with_words(there), out, 1)
    loop.train(with_words(there), out)
    assert losses(out) == losses(tmp_path / "whole")


# The processes of a run


class Ranks:
    """Some ranks of a world, each a thread."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)

    def world(self, rank: int) -> Any:
        ranks = self

        class OneRank:
            size = ranks.size

            def objects(self, own: Any) -> list[Any]:
                ranks.slots[rank] = own
                ranks.barrier.wait(20)
                found = list(ranks.slots)
                ranks.barrier.wait(20)
                return found

        return OneRank()


def opened(recipes: list[Recipe]) -> list[Any]:
    """What `open_together` returns or raises on each of some ranks, whose sources are those of their own recipes."""
    ranks, found = Ranks(len(recipes)), [None] * len(recipes)

    def run(rank: int) -> None:
        own = recipes[rank]
        try:
            found[rank] = open_together(ranks.world(rank), recipes[0], lambda: Loader(own.data, 24, 16, 0))[1]  # type: ignore[call-overload]
        except DataError as error:
            found[rank] = str(error)  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_copies_of_the_data_are_the_same_on_every_node(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    one, two = recipe(of(folder / "*.tar")), recipe(of(tmp_path / "copy" / "*.tar"))
    found = opened([one, two, one])
    assert found[0][0].digest == found[1][0].digest == found[2][0].digest


@pytest.mark.parametrize("how", [*CHANGED, "nothing there", "cut short"])
def test_a_node_with_other_data_is_named_on_every_rank(folder: Path, tmp_path: Path, how: str) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "copy"))
    words = "not the same everywhere: 60 samples in 3 shards for process 0 .* for process 2 .* first difference: "
    if how == "nothing there":
        shutil.rmtree(other)
        words = r"no shards match \S+/copy/\*.tar: not found; check the path \(seen by process 2 on "
    elif how == "cut short":
        os.truncate(other / "1.tar", 9000)
        words = r"/copy/1.tar is cut short: .* \(seen by process 2 on "
    else:
        CHANGED[how][0](other)
        words += {
            "added": "3.tar is missing for process 0",
            "removed": "2.tar is missing for process 2",
            "re-ordered": "0.tar for process 0, 1.tar for process 2 in its place",
        }.get(how, r"\d.tar has other samples")
    one, two = recipe(of(folder / "*.tar")), recipe(of(other / "*.tar"))
    found = opened([one, one, two])
    assert found[0] == found[1] == found[2]
    assert re.search(words, found[0]), found[0]


def test_evaluation_sets_are_the_same_on_every_rank(tmp_path: Path) -> None:
    """Each rank embeds the samples of its numbers: two copies of a table, and one with a caption of its own."""
    for n, caption in enumerate(("a dog", "a dog", "a cat")):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "1.png").write_bytes(pairs(1)[0][1])
        (tmp_path / str(n) / "t.csv").write_text(f"path,caption\n1.png,{caption}\n")
    ranks, found = Ranks(3), ["", "", ""]

    def run(rank: int, folders: list[int]) -> None:
        data = open_pictures(str(tmp_path / str(folders[rank]) / "t.csv"), Form("captions"), 24, 16)
        bench = Bench(cast(Any, None), ranks.world(rank), 4)
        try:
            bench._check_ranks(data)
        except DataError as error:
            found[rank] = str(error)

    for folders, words in (([0, 1, 0], ""), ([0, 1, 2], "1 samples for process 0 on .* for process 2 on .*; copy the")):
        threads = [threading.Thread(target=run, args=(rank, folders)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(re.search(words, text) if words else text == "" for text in found), found
