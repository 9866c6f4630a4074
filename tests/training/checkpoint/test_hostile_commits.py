"""Commits that a stranger made, with checksums that fit: refused with a sentence, and the commit before is taken."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.launch.commands.eval import open_model
from treering.launch.recipe.load import read_recipe
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.tests.support.tiny_runs import SIZES
from treering.training import loop
from treering.training.checkpoint.commits import Commits, _seal, find_commit
from treering.training.checkpoint.manifest import DamagedCommit, Manifest
from treering.training.checkpoint.serialize import SerializedPart
from treering.training.checkpoint.store import Store, StoreError
from treering.training.health.divergence import Health
from treering.training.recipe import Recipe
from treering.training.state import Decision, Event, RunState

MORE = ["data.workers=0", "eval.suites=[]", "eval.examples=0", "stages=[{samples: 120}]", "checkpoint.every=60"]


def recipe(*more: str) -> Recipe:
    return read_recipe("emoji", [*SIZES, *MORE, *more]).recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with commits at its steps 5 and 10."""
    out = tmp_path_factory.mktemp("run")
    loop.train(recipe(), out)
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def newest(out: Path) -> Path:
    return sorted((out / "commits").glob("step-*"))[-1]


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, and make its checksums fit again."""
    tree = json.loads((folder / "manifest.json").read_text())
    tree = change(tree) or tree
    data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "COMMIT").write_bytes(_seal(hashlib.sha256(data).hexdigest()))


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """What sets the field at a dotted path."""

    def change(tree: dict[str, Any]) -> None:
        *parents, key = path.split(".")
        for part in parents:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        tree[int(key) if isinstance(tree, list) else key] = value

    return change


def drop_kind(kind: str) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        tree["parts"] = [part for part in tree["parts"] if part["kind"] != kind]

    return change


def wide(tree: dict[str, Any]) -> None:
    """Spec and recipe agree on a model of 2^40 channels, which the weights are not."""
    for place in (tree["spec"], tree["recipe"]["model"]):
        place["image"]["width"] = 1 << 40


def deep(tree: dict[str, Any]) -> None:
    for place in (tree["spec"], tree["recipe"]["model"]):
        place["text"]["depth"] = 1_000_000


def event(name: str, **detail: Any) -> dict[str, Any]:
    return {"event": name, "step": 3, "samples": 36, "time": 1.0, "world": 1, "detail": detail}


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "step 5 at 96 samples": put("state.samples", 96),
    "a step that is not the name's": put("state.step", 9),
    "an attempt that is not the name's": put("state.attempt", 4),
    "more applied than steps": put("state.applied", 11),
    "negative skips": put("state.skipped", -1),
    "a stage that there is not": put("state.stage", 7),
    "a negative stage": put("state.stage", -1),
    "a decision on no stage": put("state.decisions", [{"stage": 9, "samples": 12, "grow": None}]),
    "infinite FLOPs": put("state.flops", math.inf),
    "healthy in the future": put("state.health.healthy_step", 10**9),
    "a multiplier of nothing": put("state.multipliers", {"image.nothing": 0.5}),
    "a multiplier of zero": put("state.multipliers", {"logit_scale": 0.0}),
    "a name with separators": put("state.multipliers", {"../../etc/passwd": 0.5}),
    "an unknown objective": put("state.objectives", {"nothing": {"a": 1}}),
    "a state of an objective without one": put("state.objectives", {"contrastive": {"a": 1}}),
    "a rollback of -5 batches": put("state.lineage.0", event("rollback", batches=-5, times=1)),
    "a rollback of text": put("state.lineage.0", event("rollback", batches="many", times=1)),
    "a rollback of nothing": put("state.lineage.0", event("rollback")),
    "micro-batches of none": put("state.lineage.0", event("micro_batches", stage=0, pieces=-1)),
    "an event to come": put("state.lineage.0.step", 10**6),
    "an unknown reason": put("reason", "because"),
    "parts of model missing": drop_kind("model"),
    "parts of moments missing": drop_kind("exp_avg"),
    "no parts": put("parts", []),
    "a part twice": lambda tree: tree["parts"].append(tree["parts"][0]),
    "fewer tensors": put("parts.0.tensors", 1),
    "more tensors": put("parts.0.tensors", 10**9),
    "a kind for another": put("parts.0.kind", "ema"),
    "an unknown kind": put("parts.0.kind", "secrets"),
    "negative bytes": put("parts.0.bytes", -1),
    "2^60 bytes": put("parts.0.bytes", 1 << 60),
    "ranges below zero": put("parts.0.ranges", {"logit_scale": [-1, 2]}),
    "ranges of another": put("parts.0.ranges", {"a/../b": [0, 1]}),
    "half a range": put("parts.0.ranges", {"image.position_embedding": [0, 3]}),
    "a shape of 2^40": put("shapes", {"logit_scale": [1 << 40]}),
    "a shape of no parameter": put("shapes", {"x" * 10_000: [1]}),
    "a file elsewhere": put("parts.0.file", "../../00000.safetensors"),
    "another model": put("spec.image.depth", 2),
    "a model of 2^40 channels": wide,
    "a model of a million blocks": deep,
    "a recipe of other sizes": put("recipe.model.embed_dim", 24),
    "a recipe of other batches": put("recipe.data.batch", 24),
    "text for a number": put("state.step", "10"),
    "a list": lambda tree: b"[]",
    "a number": lambda tree: b"7",
    "no object": lambda tree: b"null",
    "nested without end": lambda tree: b'{"format": 2, "spec": ' + b"[" * 200_000,
    "a recipe nested deeply": put("recipe.data", json.loads("[" * 900 + "]" * 900)),
    "an extra field": put("more", 1),
    "another format": put("format", True),
    "the run of another": put("run", "0123456789abcdef"),
    "no run": put("run", ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_commit_before_is_taken(kind: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By everything that reads a run's newest commit: evaluation, another run, and the run itself."""
    last = newest(copy)
    forge(last, HOSTILE[kind])
    if kind == "another format":
        with pytest.raises(StoreError, match="commit of format"):
            find_commit(str(copy))
        return
    assert find_commit(str(copy)).manifest.state.step == 5
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert last.name in said
    assert "Traceback" not in said
    assert open_model(str(copy)).step == 5
    with pytest.raises(StoreError):
        find_commit(str(last))


def test_every_commit_is_hostile(copy: Path) -> None:
    for folder in (copy / "commits").glob("step-*"):
        forge(folder, put("state.samples", 1))
    with pytest.raises(DamagedCommit, match="has 1 sample at step 10, and batches of 12"):
        find_commit(str(copy))
    with pytest.raises(StoreError, match=r"every commit .* is damaged"):
        loop.train(recipe(), copy)


@pytest.mark.parametrize(
    "kind", ["step 5 at 96 samples", "parts of moments missing", "an unknown objective", "the run of another"]
)
def test_the_run_itself_goes_on_from_the_one_before(kind: str, copy: Path, run: Path) -> None:
    forge(newest(copy), HOSTILE[kind])
    assert loop.train(recipe(), copy).finished
    ours, theirs = find_commit(str(copy)), find_commit(str(run))
    assert ours.manifest.state.step == 10
    assert ours.name != theirs.name
    assert all(torch.equal(tensor, theirs.tensors()[path]) for path, tensor in ours.tensors().items())


def test_another_runs_commit_copied_in(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the very same recipe, and so indistinguishable but for the id of its run."""
    loop.train(recipe(), tmp_path / "other")
    last = newest(copy)
    shutil.rmtree(last)
    shutil.copytree(newest(tmp_path / "other"), last)
    assert find_commit(str(copy)).manifest.state.step == 5
    assert "was written by another run and copied here" in capsys.readouterr().err


def test_commits_that_moved_alone_are_still_a_run(copy: Path, tmp_path: Path) -> None:
    """Without the claims beside them; the next attempt goes on with their id."""
    (tmp_path / "moved" / "commits").mkdir(parents=True)
    for folder in (copy / "commits").glob("step-*"):
        shutil.copytree(folder, tmp_path / "moved" / "commits" / folder.name)
    before = find_commit(str(tmp_path / "moved"))
    assert before.manifest.state.step == 10
    again = recipe("stages=[{samples: 120}]")
    assert loop.train(again, tmp_path / "moved").finished
    claims = [json.loads(path.read_text()) for path in (tmp_path / "moved" / "commits").glob("attempt-*.json")]
    assert {claim["run"] for claim in claims} == {before.manifest.run}


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "NaN": lambda t: t["logit_scale"].fill_(math.nan),
    "infinity": lambda t: t["image.projection.weight"].view(-1)[3:4].fill_(math.inf),
    "another shape": lambda t: t.update({"logit_scale": torch.ones(2)}),
    "integers": lambda t: t.update({"logit_scale": torch.ones(1, dtype=torch.int32)}),
    "another name": lambda t: t.update({"logit_scales": t.pop("logit_scale")}),
    "one less": lambda t: t.pop("logit_scale"),
    "one more": lambda t: t.update({"more": torch.ones(1)}),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("of", ["model", "exp_avg_sq"])
def test_parts_that_hold_something_else(kind: str, of: str, copy: Path) -> None:
    """With the right checksum and size in the manifest: weights and moments that are not those of the model."""
    from safetensors.torch import load_file

    folder = newest(copy)
    number, part = next(
        (n, p)
        for n, p in enumerate(json.loads((folder / "manifest.json").read_text())["parts"])
        if p["kind"] == of and {"logit_scale", "image.projection.weight"} <= load_file(folder / p["file"]).keys()
    )
    tensors = load_file(folder / part["file"])
    TENSORS[kind](tensors)
    data = bytes(SerializedPart(tensors).data())
    (folder / part["file"]).write_bytes(data)
    forge(folder, lambda tree: tree["parts"][number].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))
    with pytest.raises(DamagedCommit, match=rf"{of}"):
        find_commit(str(folder)).tensors()
    assert loop.train(recipe(), copy).finished


floats = st.floats(allow_nan=True, allow_infinity=True)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | floats
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
states = st.builds(
    RunState,
    step=st.integers(0, 2**60),
    samples=st.integers(0, 2**60),
    flops=floats,
    seconds=floats,
    multipliers=st.dictionaries(texts, floats, max_size=3),
    objectives=st.dictionaries(texts, st.dictionaries(texts, plain, max_size=2), max_size=2),
    decisions=st.lists(st.builds(Decision, stage=st.integers(0, 9), grow=st.dictionaries(texts, floats))).map(tuple),
    window=st.lists(st.tuples(floats, floats), max_size=3).map(tuple),
    health=st.builds(Health, losses=st.lists(floats, max_size=3).map(tuple)),
    lineage=st.lists(
        st.builds(Event, event=texts, step=st.integers(0, 9), samples=st.integers(0, 9), time=floats,
                  detail=st.dictionaries(texts, plain, max_size=3)),
        max_size=2,
    ).map(tuple),
)  # fmt: skip
SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, and NaN equal to NaN."""
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


@settings(max_examples=150)
@given(states, st.dictionaries(texts, floats, max_size=4), st.dictionaries(texts, plain, max_size=3))
def test_what_is_written_is_read(state: RunState, scores: dict[str, float], more: dict[str, Any]) -> None:
    """Every float of state and manifest, NaN, infinities, denormals and minus zero too."""
    manifest = Manifest(spec=SPEC, state=state, recipe=more, scores=scores, parts=(), run="a")
    found = Manifest.decoded(manifest.encoded())
    assert same(found.model_dump(), manifest.model_dump())


def test_a_manifest_that_would_not_be_read_is_not_sealed(tmp_path: Path) -> None:
    commits = Commits(Store(str(tmp_path)))
    state = RunState(attempt=1, lineage=(Event(event="x", step=0, samples=0, detail={"host": "\udc80"}),))
    name = "step-000000000000-attempt-0001"
    with pytest.raises(StoreError, match="would not be read as it is written"):
        commits.seal(name, Manifest(spec=SPEC, state=state, recipe={}, parts=()))
    assert not (tmp_path / name / "COMMIT").exists()
