"""Suites, data and lists of classes that cannot be used are refused by name, before a model is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treering.data.errors import DataError
from treering.models.model import build
from treering.tests.support.small_suites import NAMES, SPEC, paint, result, suite
from treering.training.evaluate.config import EvalConfig, ZeroShot
from treering.training.evaluate.prompts import class_names
from treering.training.evaluate.protocols import check_suites
from treering.training.world import World


@pytest.mark.parametrize(
    ("data", "protocol", "words"),
    [
        ("nowhere", "zero_shot", "not found"),
        ("kinds", {"kind": "zero_shot", "classes": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ("kinds", {"kind": "zero_shot", "classes": "three.txt"}, "label 'elk', which is not among the 3 classes"),
        ("high.csv", {"kind": "zero_shot", "classes": "three.txt"}, r"label 5, and .* names 3 classes, 0 to 2"),
        ("high.csv", "zero_shot", "are numbers; give their class names"),
        ("odd.csv", {"kind": "zero_shot", "classes": "three.txt"}, "label 'gnu', which is not among the 3"),
        ("ragged.csv", "zero_shot", "line 2: 3 columns instead of 2"),
        ("gone.csv", "zero_shot", "line 2: the picture 'gone.png' is missing"),
        ("outside.csv", "zero_shot", "line 2: .* lies outside"),
        ("empty", "zero_shot", "not a folder of classes"),
        ("hollow", "zero_shot", "gnu is empty: a class must have pictures"),
        ("mixed", "zero_shot", "notes.txt is not .jpg"),
        ("kinds", {"kind": "zero_shot", "prompts": "some.json"}, "no list of prompts for the class 'dog'"),
        ("kinds", {"kind": "zero_shot", "broader": "circle.json"}, "broader than itself"),
        ("kinds", {"kind": "zero_shot", "templates": "flat.txt"}, "no place for the class"),
        ("kinds", {"kind": "zero_shot", "classes": "sets.json"}, "holds several data sets"),
        ("odd.csv", "pairs", "no swapped caption"),
        ({"source": "kinds", "train": "one"}, "knn_probe", "has one class, 'cat'"),
        ({"source": "kinds", "train": "two"}, "knn_probe", "class 'elk', which has no picture in"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named_before_a_model_is_there(
    data: Any, protocol: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "a.png", 0)
    for name, text in {
        "three.txt": "cat\ndog\nowl\n",
        "flat.txt": "a {}\na cat\n",
        "some.json": json.dumps({"cat": ["a cat"]}),
        "sets.json": json.dumps({"x": ["cat"]}),
        "circle.json": json.dumps(dict.fromkeys(NAMES, "cat")),
        "high.csv": "path,label\na.png,5\n",
        "odd.csv": "path,label\na.png,gnu\n",
        "ragged.csv": "path,label\na.png,1,2\n",
        "gone.csv": "path,label\ngone.png,1\n",
        "outside.csv": "path,label\n../../etc/passwd,1\n",
    }.items():
        (tmp_path / name).write_text(text)
    for name in ("empty", "hollow/gnu", "mixed/gnu"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mixed/gnu/notes.txt").write_text("x")
    for name in ("one/cat/a.png", "two/cat/a.png", "two/dog/b.png"):
        paint(tmp_path / name, 1)
    config = EvalConfig(suites=(suite(tmp_path, "bad", data, protocol),))
    with pytest.raises(DataError, match=words):
        check_suites(config)


def test_a_non_image_is_named_on_every_rank(folder: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    (folder / "fox" / "zebra.png").write_bytes(b"not a picture")
    path = suite(tmp_path, "kinds", "kinds", "zero_shot")

    def one_rank(group: World) -> str:
        with pytest.raises(DataError) as raised:
            result(build(SPEC, 1), path, world=group)
        return str(raised.value)

    for message in on_ranks(2, one_rank):
        assert "1 of the 30 samples" in message
        assert "zebra.png" in message
        assert "does not decode" in message


def test_suites_are_refused_by_name_and_field(tmp_path: Path) -> None:
    for content, words in {
        "name: pets\ndata: x\nprotocol: {kind: foo}": "'foo' is not known",
        "name: pets\ndata: x\nprotocol: knn_probe": "data.train is missing",
        "name: pets\ndata: {source: x, train: y}\nprotocol: retrieval": "data.train is only for probes",
        "name: pets\ndata: x\nprotocol: {kind: captioning, metrics: [spice]}": "Java",
        "name: pets\nprotocol: retrieval": "data: is missing",
        "name: pets\ndata: x\nprotocol: {kind: retrieval, z: 1}": "protocol.z: is not a known key",
        "name: retrieval\ndata: x\nprotocol: retrieval": "built-in",
        "- 1": "must be a mapping",
        "[": "not valid YAML",
    }.items():
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(ValueError, match=words):
            EvalConfig(suites=(str(tmp_path / "a.yaml"),))
    with pytest.raises(ValueError, match="cannot be read"):
        EvalConfig(suites=(str(tmp_path / "none.yaml"),))
    (tmp_path / "a.yaml").write_text("name: pets\ndata: x\nprotocol: retrieval")
    with pytest.raises(ValueError, match="two suites are called 'pets'"):
        EvalConfig(suites=(str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml")))
    config = EvalConfig(suites=("retrieval", str(tmp_path / "a.yaml")))
    assert EvalConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.own[0].data.source == str(tmp_path / "x")


@pytest.mark.parametrize("text", ["cat\n\ndog\n", "\ncat\ndog", "cat\n \ndog"])
def test_an_empty_line_in_a_list_of_classes_is_refused(tmp_path: Path, text: str) -> None:
    """It would be unclear whether the class behind it is number 1 or number 2."""
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"text \d is empty, so the classes' numbers are not clear"):
        class_names(ZeroShot(kind="zero_shot", classes=str(tmp_path / "classes.txt")))


def test_lists_of_classes_are_lines_alone(tmp_path: Path) -> None:
    """Not what Python's splitlines takes for line ends too; empty lines at the end move no numbers."""
    (tmp_path / "classes.txt").write_bytes("\ufeffa\u2028b\x0bc\r\nd\x85e\n\n\n".encode())
    found = class_names(ZeroShot(kind="zero_shot", classes=str(tmp_path / "classes.txt")))
    assert found == ["a\u2028b\x0bc", "d\x85e"]
