"""Names, versions, settings and public buckets on a real S3 server, and on one that hands things out to anybody."""

from __future__ import annotations

import io
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch

from treering.data import open_source
from treering.data.errors import DataError
from treering.data.shards.listing import list_shards
from treering.launch.recipe.load import read_recipe
from treering.tests.support.s3_server import BUCKET
from treering.tests.support.tiny_runs import SIZES
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.manifest import Commit
from treering.training.checkpoint.store import Store, StoreError
from treering.training.loop import train


def tar_of(caption: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("a.jpg", b"1"), ("a.txt", caption.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def written(url: str, data: bytes = b"x") -> None:
    import s3fs

    s3fs.S3FileSystem().pipe_file(url, data)


def caption(url: str) -> str:
    return open_source(url).record(0).fields["txt"].decode()


def test_what_exists_under_exactly_this_name_is_that_name(s3: str) -> None:
    names = ["[2024] photos/0.tar", "a[1].tar", "a1.tar", "b/why?.tar", "b/whyx.tar"]
    for name in names:
        written(f"{s3}/{name}", tar_of(name))
    for name in names:
        assert caption(f"{s3}/{name}") == name
    assert caption(f"{s3}/[2024] photos/*.tar") == names[0]
    assert caption(f"{s3}/*/0.tar") == names[0]
    assert [shard.url for shard in list_shards(f"{s3}/b/why?.ta[r]")] == [f"{s3}/{name}" for name in names[3:]]


def test_one_version_of_an_object(s3: str) -> None:
    import s3fs

    system = s3fs.S3FileSystem(version_aware=True)
    url = f"{s3}/a.tar"
    system.call_s3("put_bucket_versioning", Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    try:
        for text in ("old", "newer"):
            written(url, tar_of(text))
        versions = system.object_version_info(url.removeprefix("s3://"))
        old = next(each["VersionId"] for each in versions if not each["IsLatest"])
        assert caption(url) == "newer"
        assert caption(f"{url}?versionId={old}") == "old"
        assert [shard.url for shard in list_shards(f"{url}?versionId={old}")] == [f"{url}?versionId={old}"]
    finally:
        system.call_s3("put_bucket_versioning", Bucket=BUCKET, VersioningConfiguration={"Status": "Suspended"})


def test_a_double_slash_that_the_server_drops(s3: str) -> None:
    """Before anything is written that a run would miss; and a source says what it may be."""
    store = Store(f"{s3}//runs")
    with pytest.raises(StoreError, match="this server folds double slashes: write the URL with single ones"):
        store.check()
    assert Store(f"{s3}/runs").sizes() == {}
    written(f"{s3}/x/0.tar")
    with pytest.raises(DataError, match="a double slash is a folder without a name, which some servers drop"):
        list_shards(f"{s3}//x/*.tar")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_PROFILE", "nobody", "the profile 'nobody' does not exist; correct AWS_PROFILE"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:8333", "the endpoint is not a URL; set AWS_ENDPOINT_URL with http://"),
        ("AWS_ENDPOINT_URL_S3", "localhost", "the endpoint is not a URL"),
    ],
)
def test_settings_that_cannot_be_right(
    name: str, value: str, said: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    if name == "AWS_PROFILE":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=re.escape(said)):
        list_shards(f"{s3}/a.tar")
    with pytest.raises(StoreError, match=re.escape(said)):
        Store(s3).check()


def test_strangers_objects_cost_nothing(s3: str) -> None:
    """1,200 of them: more than a page of a listing."""
    import s3fs

    system = s3fs.S3FileSystem()
    system.pipe({f"{s3}/foreign-{number:04d}/x": b"x" for number in range(1200)})
    store = Store(s3)
    listed: list[dict[str, Any]] = []
    real = store._fs._lsdir

    async def lsdir(*arguments: Any, **options: Any) -> Any:
        found = await real(*arguments, **options)
        listed.extend(found)
        return found

    store._fs._lsdir = lsdir
    commits = Commits(store)
    assert commits.claim_attempt("me") == 1
    store.check()
    assert commits.names() == []
    commits.sweep_uploads(1)
    assert len(listed) < 10


class _Public(BaseHTTPRequestHandler):
    """A bucket with one object: for those who do not sign their requests, as a wrong signature would be refused."""

    content = tar_of("public")

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        data, status = self.content, 200
        if "Authorization" in self.headers or not self.path.startswith("/public/0.tar"):
            data, status = b"<Error><Code>AccessDenied</Code></Error>", 403
        elif span := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(span[1]) : int(span[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        if status == 206 and span:
            self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(self.content)}")
        self.end_headers()
        if body:
            self.wfile.write(data)


class _PublicFolder(_Public):
    """A bucket with what lies in a folder, and its listings, for those who do not sign their requests."""

    folder = Path()

    def _answer(self, body: bool) -> None:
        asked = urlsplit(self.path)
        query, key = parse_qs(asked.query), unquote(asked.path).strip("/").partition("/")[2]
        if not key and "list-type" in query:
            self.content = self._listing(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif (self.folder / key).is_file():
            self.content = (self.folder / key).read_bytes()
        else:
            self.send_error(404)
            return
        self.path = "/public/0.tar"
        super()._answer(body)

    def _listing(self, prefix: str, delimiter: str) -> bytes:
        keys = [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        found = [key for key in keys if key.startswith(prefix)]
        cut = {key: key[: key.find(delimiter, len(prefix)) + 1] if delimiter else "" for key in found}
        rows = [
            f"<CommonPrefixes><Prefix>{each}</Prefix></CommonPrefixes>" for each in dict.fromkeys(cut.values()) if each
        ]
        rows += [
            f"<Contents><Key>{key}</Key><Size>{(self.folder / key).stat().st_size}</Size><ETag>1</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in found
            if not cut[key]
        ]
        return f"<ListBucketResult><Name>public</Name>{''.join(rows)}</ListBucketResult>".encode()


def test_a_run_begins_with_a_commit_of_a_public_bucket(
    public: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read by everybody, evaluated on shards and with a tokenizer that lie there too, and never written."""
    weights = _tiny_run(tmp_path / "bucket" / "run")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Folder", (_PublicFolder,), {"folder": tmp_path / "bucket"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        commit = find_commit("s3://public/run")
        assert commit.manifest.state.samples == weights.manifest.state.samples
        assert all(
            torch.equal(tensor, weights.tensors("model")[name]) for name, tensor in commit.tensors("model").items()
        )
        (tmp_path / "bucket" / "0.tar").write_bytes(tar_of("public"))
        assert caption("s3://public/0.tar") == "public"
        with pytest.raises(StoreError, match="no valid credentials"):
            Store("s3://public/run").check()
    finally:
        server.shutdown()
        server.server_close()


def _tiny_run(out: Path) -> Commit:
    train(read_recipe("emoji", [*SIZES, "stages=[{samples: 36}]", "eval.suites=[]"]).recipe, out)
    return find_commit(str(out))


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A public bucket, and a user without credentials."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Public)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield "s3://public/0.tar"
    server.shutdown()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_public_bucket_needs_no_credentials(public: str) -> None:
    assert caption(public) == "public"
    with pytest.raises(DataError, match="no credentials found"):
        list_shards("s3://private/0.tar")
    with pytest.raises(StoreError, match="no valid credentials"):
        Store("s3://public/run").check()
