"""What breaks while a commit is written: the writer, the server, requests, credentials, the space. Never a visible
broken commit, never a lost good one, and one sentence where it cannot go on.

The real server is behind each test. A writer is a forked process that kills itself before or after its n-th change to
the store, whatever n there is: changes are counted in `Store`'s three methods that make them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import s3fs
import torch

from treering.data.samples.sample import Batch
from treering.data.storage import retries
from treering.launch.recipe.load import read_recipe
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.tests.support.faulty_proxy import FaultyProxy
from treering.tests.support.s3_server import Server
from treering.training import loop, uploads
from treering.training.checkpoint import writer
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store, StoreError
from treering.training.loop import train
from treering.training.state import RunState
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)
KEEP = CheckpointConfig(keep=1)


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"{kind}/weight": torch.randn(100, generator=generator) for kind in ("model", "exp_avg")}


def write(url: str, step: int, attempt: int, size: int = 1) -> None:
    state = {path: t.repeat(size) for path, t in tensors(step).items()}
    snapshot = Snapshot(SPEC, RunState(step=step, attempt=attempt), {}, state)
    Commits(Store(url)).begin(snapshot, ALONE, KEEP).finish()


def assert_sound(url: str) -> list[int]:
    """Every commit that can be seen is whole and has the tensors of its step; the steps there are."""
    commits, steps = Commits(Store(url)), []
    for name in commits.names():
        commit = commits.open(name)
        steps.append(commit.manifest.state.step)
        found = commit.tensors()
        assert found.keys() == tensors(steps[-1]).keys()
        assert all(torch.equal(found[path][:100], t) for path, t in tensors(steps[-1]).items())
    return steps


class Changes:
    """Counts the boundaries of changes to a store, the moments before and after each, and kills at the n-th."""

    def __init__(self, kill_at: int) -> None:
        self.left, self.count = kill_at, 0
        for method in ("put", "put_new", "delete"):
            setattr(Store, method, self._counted(getattr(Store, method)))

    def _boundary(self) -> None:
        self.count += 1
        if self.count == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, change: Callable[..., object]) -> Callable[..., object]:
        def counted(store: Store, names: object, *data: object) -> object:
            if not data:  # delete: one after another
                for name in list(names):  # type: ignore[call-overload]
                    self._boundary()
                    change(store, [name])
                    self._boundary()
                return None
            self._boundary()
            result = change(store, names, *data)
            self._boundary()
            return result

        return counted


def _second_commit(url: str, kill_at: int, results: multiprocessing.Queue[int]) -> None:
    """What a resumed run does: claim an attempt, commit, and remove the commit before."""
    writer.CONNECTIONS = 1  # the same order each time
    changes = Changes(kill_at)
    commits = Commits(Store(url))
    write(url, 2, commits.claim_attempt("second"))
    results.put(changes.count)


def killed_at(url: str, boundary: int) -> int | None:
    """Run a second commit after a first; the number of its boundaries, or None if it was killed at `boundary`."""
    write(url, 1, Commits(Store(url)).claim_attempt("first"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_second_commit, args=(url, boundary, results))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return results.get() if process.exitcode == 0 else None


def all_boundaries(url: str, step: int = 1) -> None:
    """At every `step`-th boundary: what is seen is whole, a commit is there, and the next attempt clears up."""
    count = killed_at(f"{url}/whole", 0)
    # a claim, two parts, manifest, COMMIT, the four of the old commit, and the index
    assert count == 2 * (1 + 2 + 1 + 1 + 4 + 1)
    assert assert_sound(f"{url}/whole") == [2]
    for boundary in range(1, count + 1, step):
        place = f"{url}/{boundary}"
        assert killed_at(place, boundary) is None
        sealed = boundary >= 2 * 5
        removed = boundary > 2 * 5 + 1  # the old one's manifest is gone: it is not seen any more
        assert assert_sound(place) == ([2] if removed else [1, 2] if sealed else [1]), boundary
        attempt = Commits(Store(place)).claim_attempt("third")
        assert attempt == (2 if boundary == 1 else 3)
        write(place, 3, attempt)
        assert assert_sound(place) == [3]
        left = {path.split("/")[0] for path in Store(place).sizes() if not path.startswith("attempt-")}
        assert left == {f"step-000000000003-attempt-{attempt:04d}", "commits.json"}


def test_kill_at_every_boundary_on_a_disk(tmp_path: Path) -> None:
    all_boundaries(str(tmp_path))


def test_kill_at_some_boundaries_on_a_server(s3: str) -> None:
    all_boundaries(s3, step=4)


@pytest.mark.slow
def test_kill_at_every_boundary_on_a_server(s3: str) -> None:
    all_boundaries(s3)


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that may be killed."""
    server = Server(tmp_path_factory.mktemp("own"))
    server.start()
    server.wait()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    server.kill()


def test_the_server_is_killed_and_restarted_in_mid_commit(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url, put = f"{own_server.url}/run", Store.put
    write(url, 1, Commits(Store(url)).claim_attempt("test"))
    downs: list[threading.Timer] = []

    def dying(store: Store, name: str, data: bytes) -> None:
        if not downs:
            own_server.kill()
            downs.append(threading.Timer(2, own_server.start))
            downs[0].start()
        put(store, name, data)

    monkeypatch.setattr(writer, "CONNECTIONS", 1)
    monkeypatch.setattr(Store, "put", dying)
    write(url, 2, 1, size=100)
    downs[0].join()
    assert assert_sound(url) == [2]


def test_a_server_that_stays_away_is_one_sentence(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "SECONDS", 2.0)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url = f"{own_server.url}/run"
    write(url, 1, 1)
    own_server.kill()
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"^cannot reach the store s3://.*tried \d+ times in .*check that the store"):
        write(url, 2, 1)
    own_server.start()
    own_server.wait()
    assert assert_sound(url) == [1]


@contextlib.contextmanager
def through(server: Server, plan: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The store behind a proxy that follows a plan."""
    with FaultyProxy(server.port, plan, stall=0.5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()


def test_one_request_in_twenty_fails(s3: str, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the server did what was asked: the answer is cut short, or never comes."""
    faults = ("500", "short", "503", "reset", "429", "cut")

    def plan(request: int) -> str:
        return faults[request // 20 % len(faults)] if request % 20 == 7 else ""

    with through(s3_server, plan, monkeypatch) as proxy:
        attempt = Commits(Store(s3)).claim_attempt("test")
        for step in range(1, 12):
            write(s3, step, attempt)
            assert assert_sound(s3) == [step]
        assert set(proxy.faults) == set(faults)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("ExpiredToken", "400", "the credentials have expired; renew them"),
        ("InvalidAccessKeyId", "403", "no valid credentials"),
        ("QuotaExceeded", "403", "it is full; free some space, keep fewer commits"),
        ("XMinioStorageFull", "507", "the store is full"),
    ],
)
def test_a_store_that_begins_to_refuse(
    code: str, status: str, said: str, s3: str, s3_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a commit: what was committed stays, and nothing of the other is ever seen."""
    monkeypatch.setattr(retries, "SECONDS", 1.0)
    write(s3, 1, 1)
    refusing, put = threading.Event(), Store.put

    def later(store: Store, name: str, data: bytes) -> None:
        if "manifest" in name:
            refusing.set()
        put(store, name, data)

    monkeypatch.setattr(Store, "put", later)

    def plan(_: int) -> str:
        return f"{status} {code}" if refusing.is_set() else ""

    with through(s3_server, plan, monkeypatch), pytest.raises(StoreError) as refused:
        write(s3, 2, 1)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert assert_sound(s3) == [1]
    refusing.clear()
    write(s3, 3, 2)
    assert assert_sound(s3) == [3]
    assert not any("step-000000000002" in path for path in Store(s3).sizes())


def test_multipart_uploads_left_by_a_kill_are_aborted(s3: str) -> None:
    """Of an attempt before: at once; of this one: they may be under way. Others' objects are nobody's business."""
    store = Store(s3)
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    names = [f"step-000000000002-attempt-000{attempt}/model-00000-00000.safetensors" for attempt in (1, 2)]
    for name in (*names, "notes.txt"):
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{name}")
    assert {name for name, _ in store.uploads()} == {*names, "notes.txt"}
    write(s3, 3, 2)
    assert {name for name, _ in store.uploads()} == {names[1], "notes.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treering.training.checkpoint.commits._STALE", timedelta(0))
        write(s3, 4, 2)
    assert {name for name, _ in store.uploads()} == {"notes.txt"}


TINY = [
    "data.batch=4",
    "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 12}, "
    "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
    "stages=[{samples: 40}]",
    "schedule.warmup=4",
    "checkpoint.every=8",
    "eval.suites=[]",
    "log.every=1",
]


def trained(out: Path, to: str | None, monkeypatch: pytest.MonkeyPatch, at_step: Callable[[int], None]) -> list[float]:
    """The losses of a small run with its commits at `to`; `at_step` is called before each step."""
    step = loop.Run.step

    def watched(run: loop.Run, batch: Batch) -> None:
        at_step(run.state.step)
        step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", watched)
        train(read_recipe("emoji", [*TINY, f"checkpoint={{every: 8, to: {to}}}"] if to else TINY).recipe, out)
    return losses(out)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_training_outlives_its_server(own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes away for some seconds in the middle of the run, which neither stops nor changes."""
    torch.set_num_threads(1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    whole = trained(tmp_path / "whole", None, monkeypatch, lambda _: None)
    reached: list[int] = []
    back = threading.Timer(2, own_server.start)

    def at_step(step: int) -> None:
        reached.append(step)
        if step == 3:
            own_server.kill()
            back.start()

    url = f"{own_server.url}/training"
    assert trained(tmp_path / "run", url, monkeypatch, at_step) == whole
    back.join()
    assert reached == list(range(10))
    assert Commits(Store(url)).names()[-1] == "step-000000000010-attempt-0001"


def test_credentials_that_expire_in_mid_run(
    s3: str, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training goes on to the end, whose commit is needed. Not renewed in time: one sentence, and the same command
    continues from the last good commit, to the same end."""
    torch.set_num_threads(1)
    whole = trained(tmp_path / "whole", None, monkeypatch, lambda _: None)
    expired, reached = threading.Event(), [0]

    def at_step(step: int) -> None:
        reached.append(step)
        if step == 5:
            expired.set()

    said = "the credentials have expired; renew them, then the same command continues"
    place = f"{s3}/training, wait_for_store: 0s"
    with (
        through(s3_server, lambda _: "400 ExpiredToken" if expired.is_set() else "", monkeypatch),
        pytest.raises(StoreError, match=said),
    ):
        trained(tmp_path / "run", place, monkeypatch, at_step)
    assert max(reached) == 9
    assert f"{said}; training goes on" in capfd.readouterr().err
    steps = [int(name[5:17]) for name in Commits(Store(f"{s3}/training")).names()]
    assert steps
    assert max(steps) <= 6
    trained(tmp_path / "run", place, monkeypatch, lambda _: None)
    assert losses(tmp_path / "run") == whole


def test_the_end_waits_for_a_server_that_was_away_for_long(
    own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request of the run's second half is given up; the server comes back after the last step."""
    torch.set_num_threads(1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(retries, "SECONDS", 0.5)
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 0.5)
    s3fs.S3FileSystem.clear_instance_cache()
    whole = trained(tmp_path / "whole", None, monkeypatch, lambda _: None)
    back = threading.Timer(4, own_server.start)

    def at_step(step: int) -> None:
        if step == 5:
            own_server.kill()
        if step == 9:
            back.start()

    url = f"{own_server.url}/training"
    assert trained(tmp_path / "run", url, monkeypatch, at_step) == whole
    back.join()
    assert Commits(Store(url)).names()[-1].startswith("step-000000000010-attempt-")


def test_two_runs_in_one_place(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other starts while the first is at step 5: the first is refused at its next commit and has lost nothing."""
    torch.set_num_threads(1)

    def at_step(step: int) -> None:
        if step == 5:
            Commits(Store(f"{s3}/training")).claim_attempt("CPU x 2")

    with pytest.raises(StoreError, match=r"another run \('CPU x 2'\) took over .*, and this one is refused"):
        trained(tmp_path / "run", f"{s3}/training", monkeypatch, at_step)
    commits = Commits(Store(f"{s3}/training"))
    assert commits.names()[-1] in ("step-000000000002-attempt-0001", "step-000000000004-attempt-0001")
    assert commits.open(commits.names()[-1]).tensors()
