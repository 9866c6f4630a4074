"""Commits on their way: in ranges from many ranks, in the background, and when the store fails somebody."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from treering.data.order import stable_hash
from treering.tests.support.small_commits import ALONE, SHAPES, SPEC, begin, truth
from treering.training.checkpoint import writer
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.manifest import DamagedCommit
from treering.training.checkpoint.serialize import SerializedPart
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store, StoreError
from treering.training.engines.layout import FlatRange, gathered, shard_rows
from treering.training.state import RunState
from treering.training.world import World


def row_layout(world: World) -> dict[str, FlatRange]:
    return {name: shard_rows(shape, world.rank, world.size) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_stretches_of_many_ranks_are_read_whole_and_in_any_other_ranges(
    ranks: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    commits = Commits(Store(str(tmp_path)))

    def one_rank(world: World) -> None:
        layout = row_layout(world)
        mine = {f"{k}/{name}": layout[name].cut(t) for k in ("model", "exp_avg") for name, t in truth(k).items()}
        begin(commits, mine, world, layout=layout).finish()
        for name, whole in truth().items():
            assert torch.equal(gathered(mine[f"model/{name}"], layout[name], world), whole)

    on_ranks(ranks, one_rank)
    commit = commits.open(commits.names()[-1])
    assert {part.file.split("-")[1] for part in commit.manifest.parts} == {f"{r:05d}" for r in range(ranks)}
    for kind in ("model", "exp_avg"):
        assert all(torch.equal(commit.tensors(kind)[f"{kind}/{name}"], t) for name, t in truth(kind).items())

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def any_stretch(data: st.DataObject) -> None:
        layout = {}
        for name, shape in SHAPES.items():
            total = torch.Size(shape).numel()
            start = data.draw(st.integers(0, total))
            layout[name] = FlatRange(shape, start, data.draw(st.integers(0, total - start)))
        read = commit.tensors(layout=layout)
        for kind in ("model", "exp_avg"):
            for name, flat in layout.items():
                assert torch.equal(read[f"{kind}/{name}"], flat.cut(truth(kind)[name]))

    any_stretch()


def test_a_rank_reads_only_the_parts_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves in two parts, as two ranks leave them; who wants the second half of everything opens one file."""
    monkeypatch.setattr(writer, "PART_BYTES", 1)
    commits = Commits(Store(str(tmp_path)))
    layout = {"a.weight": FlatRange((5, 3), 0, 15), "c.bias": FlatRange((7,), 0, 7)}
    begin(commits, {f"model/{name}": truth()[name] for name in layout}, layout=layout).finish()
    opened, get = [], Store.get
    monkeypatch.setattr(Store, "get", lambda self, name: opened.append(name) or get(self, name))
    commit = commits.open(commits.names()[-1])
    commit.tensors(layout={"a.weight": FlatRange((5, 3), 3, 6), "c.bias": FlatRange((7,), 0, 0)})
    assert [name for name in opened if "safetensors" in name] == [f"{commit.name}/model-00000-00000.safetensors"]


def test_a_missing_stretch_and_one_out_of_bounds_are_damage(tmp_path: Path) -> None:
    commits = Commits(Store(str(tmp_path)))
    begin(commits, {"model/c.bias": torch.zeros(3)}, layout={"c.bias": FlatRange((7,), 0, 3)}).finish()
    with pytest.raises(DamagedCommit, match=r"do not hold all of model/c.bias"):
        commits.open(commits.names()[-1]).tensors()
    with pytest.raises(DamagedCommit, match=r"do not hold all of model/c.bias"):
        commits.open(commits.names()[-1]).tensors(layout={"c.bias": FlatRange((7,), 4, 2)})
    begin(commits, {"model/c.bias": torch.zeros(3)}, layout={"c.bias": FlatRange((7,), 5, 3)}, step=2).finish()
    with pytest.raises(DamagedCommit, match="beyond its shape"):
        commits.open(commits.names()[-1]).tensors()


def test_the_snapshot_is_of_the_moment_and_the_upload_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer: training goes on and changes the weights, the commit has the old ones."""
    store, open_door = Store(str(tmp_path)), threading.Event()
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, name, data: open_door.wait(30) and put(self, name, data))
    commits, weights = Commits(store), truth()
    going = begin(commits, {f"model/{name}": t for name, t in weights.items()}, policy=CheckpointConfig(keep=1))
    for tensor in weights.values():
        tensor.fill_(-1.0)
    assert going.busy
    assert not going.done
    assert commits.names() == []
    open_door.set()
    going.finish()
    assert going.done
    read = commits.open(commits.names()[-1]).tensors()
    assert all(torch.equal(read[f"model/{name}"], t) for name, t in truth().items())


def test_what_one_rank_sends_is_a_sign_of_life_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ranks: Callable[..., list[Any]]
) -> None:
    """Rank 1 has a slow way to the store; the other one waits for it, and neither hangs."""
    monkeypatch.setattr(writer, "PART_BYTES", 1)
    monkeypatch.setattr(writer, "CONNECTIONS", 1)
    commits, put = Commits(Store(str(tmp_path))), Store.put

    def one_rank(world: World) -> int:
        def slow(self: Store, name: str, data: bytes) -> None:
            if "model-00001" in name:
                time.sleep(0.3)
            put(self, name, data)

        Store.put = slow  # type: ignore[method-assign]
        layout, signs = row_layout(world), []
        mine = {f"model/{n}": layout[n].cut(t) for n, t in truth().items()}
        begin(commits, mine, world, layout=layout).finish(lambda: signs.append(1))
        return len(signs)

    one, other = on_ranks(2, one_rank)
    assert one == other >= 2
    assert len(commits.names()) == 1


def test_a_failure_in_one_thread_is_everybodys_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ranks: Callable[..., list[Any]]
) -> None:
    """Rank 1's store fails in the background, or the first rank's as it completes the commit: each rank says so."""
    commits, put = Commits(Store(str(tmp_path))), Store.put

    def one_rank(world: World, failing: str) -> str:
        def broken(self: Store, name: str, data: bytes) -> None:
            if failing in name:
                raise StoreError(f"the disk under {failing} is gone")
            put(self, name, data)

        Store.put = broken  # type: ignore[method-assign]
        layout = row_layout(world)
        going = begin(
            commits, {f"model/{n}": layout[n].cut(t) for n, t in truth().items()}, world, layout=layout, step=2
        )
        with pytest.raises(StoreError, match="is gone") as failure:
            going.finish()
        return str(failure.value)

    begin(commits, {f"model/{name}": t for name, t in truth().items()}).finish()
    good = commits.names()
    for failing in ("model-00001", "manifest.json"):
        assert on_ranks(2, one_rank, failing) == [f"the disk under {failing} is gone"] * 2
        assert commits.names() == good
        assert not [path for path in commits.store.sizes() if "000000000002" in path]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_packed_bytes_are_what_safetensors_reads(dtype: torch.dtype) -> None:
    """Beside a tensor of an odd number of bytes, an empty one, one that is not contiguous and one of no dimension."""
    from safetensors.torch import load

    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "é": torch.arange(12).reshape(3, 4).to(dtype).T,
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "none": torch.zeros(0, 4, dtype=dtype),
        "one": torch.tensor(7).to(dtype),
    }
    read = load(bytes(SerializedPart(tensors).data()))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_run_that_was_taken_over_is_refused(tmp_path: Path) -> None:
    """The later of two runs in one place goes on; the earlier one's commit is never complete, whenever it noticed."""
    early, late = Commits(Store(str(tmp_path))), Commits(Store(str(tmp_path)))
    tensors = {f"model/{name}": t for name, t in truth().items()}
    assert early.claim_attempt("early") == 1
    begin(early, tensors, step=1).finish()
    assert late.claim_attempt("late") == 2
    with pytest.raises(StoreError, match=r"another run \('late'\) took over .* this one is refused"):
        begin(early, tensors, step=2).finish()
    late.write(Snapshot(SPEC, RunState(step=2, attempt=2), {}, tensors), ALONE)
    assert late.names() == ["step-000000000001-attempt-0001", "step-000000000002-attempt-0002"]


def test_a_late_mark_on_what_was_swept_completes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier run stands still between its last look and its COMMIT, while the later one sweeps."""
    early, late, put_new = Commits(Store(str(tmp_path))), Commits(Store(str(tmp_path))), Store.put_new
    tensors = {f"model/{name}": t for name, t in truth().items()}
    assert early.claim_attempt("early") == 1

    def slow(self: Store, name: str, data: bytes) -> bool:
        if name.endswith("COMMIT") and "attempt-0001" in name:
            assert late.claim_attempt("late") == 2
            late.write(Snapshot(SPEC, RunState(step=1, attempt=2), {}, tensors), ALONE)
            late.retain(CheckpointConfig(), attempt=2)
        return put_new(self, name, data)

    monkeypatch.setattr(Store, "put_new", slow)
    begin(early, tensors, step=2).finish()
    assert late.names() == ["step-000000000001-attempt-0002"]


def test_a_flipped_byte_anywhere_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", 40)
    commits = Commits(Store(str(tmp_path)))
    begin(commits, {f"{kind}/{name}": t for kind in ("model", "exp_avg") for name, t in truth(kind).items()}).finish()
    name = commits.names()[0]
    files = sorted((tmp_path / name).iterdir())
    assert len(files) == 6

    @settings(max_examples=300)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def flipped(file: Path, place: float, bits: int) -> None:
        whole = file.read_bytes()
        data = bytearray(whole)
        data[int(place * len(data))] ^= bits
        file.write_bytes(data)
        try:
            with pytest.raises(DamagedCommit, match=f"{name}/{file.name}"):
                commits.open(name).tensors()
        finally:
            file.write_bytes(whole)

    flipped()
    assert len(commits.open(name).tensors()) == 6
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(DamagedCommit, match=f"{name}/{file.name}"):
            commits.open(name).tensors()
        file.write_bytes(whole)


@given(
    st.one_of(
        st.text(), st.from_regex(r"[a-z./\\%]*(\.safetensors)?\n?"), st.sampled_from(["../x-00000-00000.safetensors"])
    )
)
def test_a_part_has_no_name_outside_its_commit(file: str) -> None:
    try:
        part = writer.CommitPart(file=file, kind="model", bytes=1, sha256="", tensors=1)
    except ValidationError:
        return
    assert re.fullmatch(r"[a-z_]+-[0-9]{5,}-[0-9]{5,}\.safetensors", part.file)


def test_giving_up_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", 1)
    monkeypatch.setattr(writer, "CONNECTIONS", 1)
    commits, put, door = Commits(Store(str(tmp_path))), Store.put, threading.Event()
    written: list[str] = []

    def slow(self: Store, name: str, data: bytes) -> None:
        written.append(name)
        door.wait(30)
        put(self, name, data)

    monkeypatch.setattr(Store, "put", slow)
    going = begin(commits, {f"model/{name}": t for name, t in truth().items()})
    while not written:
        pass
    threading.Timer(0.05, door.set).start()
    going.give_up()
    assert len(written) == 1  # of three parts
    assert commits.names() == []


def test_a_staged_snapshot_waits_on_disk_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, staging, open_door = Store(str(tmp_path / "store")), tmp_path / "staging", threading.Event()
    put, waiting = Store.put, threading.Event()

    def held(self: Store, name: str, data: bytes) -> None:
        waiting.set()
        assert open_door.wait(30)
        put(self, name, data)

    monkeypatch.setattr(Store, "put", held)
    monkeypatch.setattr(writer, "PART_BYTES", 30)  # several files
    left = staging / f"treering-{stable_hash('staging', store.url):016x}-00000-step-000000000000-attempt-0000"
    left.mkdir(parents=True)  # of a killed attempt
    other = staging / "treering-0000000000000000-00000-step-000000000000-attempt-0000"
    other.mkdir()  # of another run
    policy = CheckpointConfig(staging=str(staging))
    going = begin(Commits(store), {f"model/{name}": t for name, t in truth().items()}, policy=policy)
    assert waiting.wait(30)
    mine = [path for path in staging.iterdir() if path != other]
    assert [path.name for path in mine] == [left.name.replace("000-attempt-0000", "001-attempt-0001")]
    open_door.set()
    going.finish()
    assert list(staging.iterdir()) == [other]
    read = Commits(store).open(going.name).tensors()
    assert all(torch.equal(read[f"model/{name}"], t) for name, t in truth().items())


def test_what_cannot_be_staged_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("a file where the folder should be")
    commits = Commits(Store(str(tmp_path / "store")))
    policy = CheckpointConfig(staging=str(tmp_path / "staging"))
    begin(commits, {f"model/{name}": t for name, t in truth().items()}, policy=policy).finish()
    read = commits.open(commits.names()[-1]).tensors()
    assert all(torch.equal(read[f"model/{name}"], t) for name, t in truth().items())


def test_sends_are_spread_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: whatever is asked when, no flat of time gets more than the rate allows beside one
    send."""
    now, sent = [100.0], []
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writer.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    pace = writer.Pace(10.0)
    for size, later in [(20, 0.0), (5, 0.0), (30, 9.0), (1, 0.0), (40, 0.1)]:
        now[0] += later
        pace.wait(size)
        sent.append((now[0], size))
    assert [at for at, _ in sent] == pytest.approx([100.0, 102.0, 111.0, 114.0, 114.1])
