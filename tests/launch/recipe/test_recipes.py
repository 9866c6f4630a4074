"""Recipes: overrides, origins, suggestions, and every message; nothing starts a run here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.launch.errors import safe_text, show
from treering.launch.recipe.load import RecipeError, bundled_names, dump_recipe, read_recipe
from treering.launch.recipe.overrides import Override, apply_override, parse_override
from treering.launch.recipe.yaml_lines import read_yaml, write_scalar

KEYS = st.text("abcdefgh_", min_size=1, max_size=4)
PATHS = st.lists(KEYS, min_size=1, max_size=4)
VALUES = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-1, 1) | st.text("ab c:{}[],#'\"=", max_size=8)


def message(*overrides: str, recipe: str = "emoji") -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe, list(overrides))
    text = str(caught.value)
    assert text.count("\n") < 12
    return text


@given(PATHS, VALUES)
def test_an_override_is_the_key_and_the_value_it_says(path: list[str], value: Any) -> None:
    override = parse_override(f"{'.'.join(path)}={write_scalar(value)}")
    assert override == Override(".".join(path), value)
    assert type(override.value) is type(value)


@given(st.lists(st.tuples(PATHS, VALUES), max_size=6))
def test_overrides_act_like_nested_assignment(assignments: list[tuple[list[str], Any]]) -> None:
    """Against plain dictionaries of full paths; an override through a value is refused and changes nothing."""
    tree: dict[str, Any] = {}
    flat: dict[tuple[str, ...], Any] = {}
    for path, value in assignments:
        at = tuple(path)
        through_a_value = any(flat.get(at[:n]) is not None for n in range(1, len(at)))
        before = json.dumps(tree)
        if through_a_value:
            with pytest.raises(RecipeError):
                apply_override(tree, Override(".".join(path), value))
            assert json.dumps(tree) == before
            continue
        assert apply_override(tree, Override(".".join(path), value)) == at
        flat = {p: v for p, v in flat.items() if p[: len(at)] != at and p != at[: len(p)]} | {at: value}
    expected: dict[str, Any] = {}
    for leaf, value in flat.items():
        branch = expected
        for key in leaf[:-1]:
            branch = branch.setdefault(key, {})
        branch[leaf[-1]] = value
    assert tree == expected


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_recipes_are_read_and_begin_with_what_they_do(name: str) -> None:
    resolved = read_recipe(name)
    assert resolved.recipe.name == name
    assert resolved.file.read_text().startswith("# Trains ")


@pytest.mark.parametrize("name", bundled_names())
def test_a_dump_and_an_explanation_are_the_same_recipe(name: str, tmp_path: Path) -> None:
    resolved = read_recipe(
        name, ["eval.templates={role: ['1e-3', 'a: {}', 'no', \"two\\nlines\"]}", "optimizer.eps=1e-8"]
    )
    for number, text in enumerate(
        (dump_recipe(resolved.recipe), resolved.text, f"{resolved.headline()}\n{resolved.annotated()}")
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert read_recipe(str(path)).recipe == resolved.recipe


@given(
    st.builds(
        dict,
        seed=st.integers(0, 2**63 - 1),
        lr=st.floats(1e-300, 1e300),
        template=st.text(
            st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\x85\u2028\u2029\ufeff"), max_size=20
        ),
        samples=st.integers(256, 10**12),
        every=st.sampled_from(["30s", "1.5h", 10_000, ["2min", 500]]),
    )
)
def test_any_recipe_reads_back_equal(values: dict[str, Any]) -> None:
    recipe = read_recipe("emoji").recipe
    tree = recipe.model_dump(mode="json")
    tree |= {"seed": values["seed"], "stages": [{"samples": values["samples"]}]}
    tree["optimizer"]["lr"] = values["lr"]
    tree["schedule"]["warmup"] = 0
    tree["checkpoint"]["every"] = values["every"]
    tree["eval"]["templates"] = {"role": [values["template"]]}
    changed = type(recipe).model_validate(tree)
    assert type(recipe).model_validate(read_yaml(dump_recipe(changed))[0]) == changed


def test_every_value_has_an_origin(tiny: Path) -> None:
    resolved = read_recipe(str(tiny), ["seed=3", "model.text.depth=2", "stages=[{samples: 64}]", "checkpoint.every=1h"])
    origins = {path: str(origin) for path, origin in resolved.origins.items()}
    expected = {
        "line 1": ["name"],
        "line 3": ["data.train.0.source"],
        "line 4": ["data.batch"],
        "line 7": ["model.image.width"],
        "line 8": ["model.text.width"],
        "override": ["seed", "model.text.depth", "stages.0.samples", "checkpoint.every.0"],
        "default": [
            "data.train.0.weight",
            "model.image.mlp_ratio",
            "model.captioner",
            "optimizer.lr",
            "data.augment.flip",
        ],
    }
    assert {
        origin: [path for path in paths if origins[path] == origin] for origin, paths in expected.items()
    } == expected
    leaves = [line for line in resolved.annotated().splitlines() if "#" in line]
    assert len(leaves) == len(origins)


def test_an_override_may_reach_where_the_recipe_is_silent() -> None:
    recipe = read_recipe(
        "emoji",
        [
            "stages=[{samples: 512}, {samples: 512}]",
            "stages.1.grow.image.depth=5",
            "stages.1.grow.text.depth=4",
            "eval.templates.role=['{}']",
            "schedule.warmup=0",
        ],
    ).recipe
    assert recipe.stages[1].grow == {"image.depth": 5, "text.depth": 4}
    assert recipe.eval.templates["role"] == ("{}",)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.image.dpeth=3"], ["model.image.dpeth", "override", "did you mean depth"]),
        (["sed=3"], ["sed", "did you mean seed"]),
        (["batch=3"], ["batch belongs to data.batch or eval.batch"]),
        (["warmup=3"], ["belongs to schedule.warmup"]),
        (["model={image.depth: 3}"], ["nested", "image: {depth: ...}"]),
        (["quux=3"], ["quux", "known here", "optimizer"]),
        (["data.batch=many"], ["data.batch = 'many'", "override", "whole number", "pairs in a global batch"]),
        (["seed=1.0"], ["seed = 1.0", "whole number", "write 1"]),
        (["data.batch=true"], ["data.batch = true", "whole number"]),
        (["optimizer.lr='1e-3'"], ["optimizer.lr = '1e-3'", "number", "remove the quotes"]),
        (["optimizer.lr=.inf"], ["optimizer.lr", "number"]),
        (["optimizer.lr=0"], ["optimizer.lr = 0", "above 0"]),
        (["data.augment.flip=yes"], ["true or false", "write true"]),
        (["engine.compile=yes"], ["true or false or 'auto'; write true"]),
        (["engine.micro_batches=many"], ["a whole number or 'auto'"]),
        (["name=../../x"], ["name = '../../x'", "characters", "letters, digits"]),
        (["engine.kind=horovod"], ["engine.kind = 'horovod'", "ddp"]),
        (["eval.suites=[foo]"], ["eval.suites.0", "'foo'", "'retrieval'"]),
        (["checkpoint.every=1.5"], ["checkpoint.every", "1.5", "whole number or text"]),
        (["checkpoint.every=soon"], ["checkpoint.every", "'soon'", "2min"]),
        (["stages=[]"], ["stages", "1 or more"]),
        (["stages=3"], ["stages = 3", "a list"]),
        (["model=5"], ["model = 5", "block of keys"]),
        (["model.image={width: 8}"], ["model.image.depth is missing", "override", "number of blocks"]),
        (["model.image.heads=5"], ["model.image", "heads = 5", "override", "set heads: 4"]),
        (["stages.1.grow={image.depth: 2}"], ["stages.1.grow", "image.depth = 2", "smaller", "override"]),
        (["stages.1.grow={imag.depth: 9}"], ["imag.depth", "no such size", "image.depth"]),
        (["stages.1.grow={image.depth: x}"], ["image.depth = 'x'", "a number"]),
        (["schedule.warmup=100_000_000"], ["schedule.warmup = 100000000", "override", "smaller warmup"]),
        (["model.captioner=null"], ["objectives.caption", "captioner: {depth: 2}"]),
        (["stages.7.samples=1"], ["'stages.7.samples'", "0 to 1", "stages=[...]"]),
        (["stages.-1.samples=1"], ["0 to 1"]),
        (["seed.x=1"], ["seed is the value 0", "seed=..."]),
        (["data.augment.crop_scale.0=0.5"], ["data.augment.crop_scale=[...]"]),
        (["seed=[1"], ["'seed'", "YAML"]),
        (["seed"], ["'seed'", "key=value"]),
        (["=3"], ["key=value"]),
        (["a..b=3"], ["key=value"]),
        (["seed=1e999"], ["smaller"]),
        (["seed={a: 1, a: 2}"], ["duplicate key"]),
    ],
)  # fmt: skip
def test_every_message_has_place_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    text = message(*overrides)
    assert all(word in text for word in words), text
    assert "pydantic" not in text


def test_several_messages_have_a_line_each_and_fit_one_screen() -> None:
    text = message(*[f"unknown_{n}=1" for n in range(30)], "seed=x")
    assert "and 23 more" in text


def test_messages_name_the_line(tmp_path: Path, tiny: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        tiny.read_text().replace("heads: 2, patch: 16", "haeds: 2, patch: 16").replace("batch: 8", "batch: eight")
    )
    text = message(recipe=str(broken))
    assert "data.batch = 'eight' (line 4)" in text
    assert "model.image.haeds (line 7)" in text
    assert "did you mean heads" in text
    assert "model.image.heads is missing (line 7)" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty", "treering explain"]),
        (b"# only a comment\n", ["is empty"]),
        (b"- a\n- b\n", ["a recipe has the keys"]),
        (b"just text", ["a recipe has the keys"]),
        (b"name: x\nname: y\n", ["line 2", "duplicate key"]),
        (b"name: [\n", ["YAML"]),
        (b"name: \xff\xfe\n", ["line 1", "UTF-8"]),
        (b"name: a\x00b", ["remove"]),
        (b"x" * (1 << 21), ["1 MiB"]),
    ],
)  # fmt: skip
def test_files_that_are_not_recipes(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    text = message(recipe=str(path))
    assert "r.yaml" in text
    assert all(word in text for word in words), text


def test_names_and_paths_that_are_not_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (
        "emojy",
        "../../etc/nothing",
        "",
        "a\x00b",
        "x" * 5000,
        "\udcff",
        "\x1b[31mred",
        str(tmp_path),
        str(tmp_path / "pipe"),
    ):
        text = message(recipe=name)
        assert "bundled recipes: emoji" in text
        assert text.isprintable(), name
        assert len(text) < 400
    assert message(recipe="../recipes/emoji").count("does not exist")


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hunter2@bucket/runs",
        "https://h/x.tar?X-Amz-Signature=hunter2",
        "https://h/x?a=b&token=hunter2",
        "s3://key:a/hunter2@bucket",
    ],
)
def test_credentials_are_refused_and_never_echoed(tmp_path: Path, tiny: Path, url: str) -> None:
    text = message(f"checkpoint.to={url}")
    assert "AWS_ACCESS_KEY_ID" in text
    assert "hunter2" not in text
    assert "AWS_ACCESS_KEY_ID" in message(f"checkpoint.to=['{url}'")  # also where the value cannot be parsed
    path = tmp_path / "secret.yaml"
    path.write_text(tiny.read_text() + f"checkpoint: {{to: '{url}'}}\n")
    text = message(recipe=str(path))
    assert "checkpoint.to (line 13)" in text
    assert "hunter2" not in text
    path.write_text(tiny.read_text() + f"'{url}': 1\n")
    assert "hunter2" not in message(recipe=str(path))
    assert "hunter2" not in message(recipe=url)
    assert "hunter2" not in message(url)
    assert "hunter2" not in message(f"{url}={url}")


@given(st.text(max_size=200))
def test_what_is_shown_is_one_printable_line(text: str) -> None:
    assert show(text).isprintable()
    assert len(show(text)) <= 60
    assert safe_text(text).replace("\n", "").isprintable()
    safe_text(text).encode("utf-8")


def test_an_invalid_item_is_not_a_missing_one() -> None:
    """pydantic counts only the valid items of a list, and would also call this one empty."""
    with pytest.raises(RecipeError) as error:
        read_recipe("emoji", ["stages=[{samples: 64, patches: 0.5}]"])
    assert "did you mean patch_keep?" in str(error.value)
    assert "items" not in str(error.value)
