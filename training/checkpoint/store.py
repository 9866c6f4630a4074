"""The store: a folder of named byte objects behind any fsspec URL, local disk and object storage alike.

It promises little, so that every backend can keep the promise: an object appears whole or not at all, exactly one
writer wins `put_new`, and what was written survives a power cut, in the order in which it was written. Commits are
built on that in `commits.py`. Transient failures are retried for a minute or two; others raise StoreError with one
sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from ...data.errors import DataError
from ...data.storage.atomic_write import atomic_write, durable_folder, sync_folder
from ...data.storage.credentials import holds_secret, without_user
from ...data.storage.failures import Failure, settings_remedy
from ...data.storage.filesystems import failure_at, single_try_filesystem, with_code
from ...data.storage.find import lists_by_prefix
from ...data.storage.names import refuse_other_syntax
from ...data.storage.retries import RetriesExhausted, retry

T = TypeVar("T")
_GOOGLE = ("gs://", "gcs://")


class StoreError(RuntimeError):
    """A store that cannot be used; the message names the place, what is wrong and the remedy."""


class CommitRefused(StoreError):
    """A store in which this run may commit no more, however often it tries: another run took it over."""


class Store:
    """Objects by name below one URL. Names are our own, never a user's."""

    def __init__(self, url: str, public: bool = False) -> None:
        """`public`: it is only read, so a bucket that anyone may read needs no credentials. Raises StoreError."""
        if holds_secret(url):
            raise StoreError(
                f"store {without_user(url)}: its URL holds a user or a secret; give credentials by environment or "
                "credentials file"
            )
        try:
            refuse_other_syntax(url)
        except DataError as error:
            raise StoreError(f"the store {error}") from None
        self.url = url.rstrip("/")
        try:
            self._fs, root = single_try_filesystem(self.url, public)
        except ImportError as error:
            package = "'treering[gcs]'" if url.startswith(_GOOGLE) else "what is missing"
            raise StoreError(f"store {self.url}: {error}; pip install {package}") from None
        except ValueError as error:
            raise StoreError(
                f"store {self.url}: {error}; use a local path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or another "
                "fsspec URL"
            ) from None
        self._root = str(root)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _tried(self, doing: str, attempt: Callable[[], T]) -> T:
        """Call `attempt`, retried while the store fails transiently; returns its result. Raises StoreError."""
        try:
            return retry(f"the store {self.url}", attempt, doing="reach")
        except RetriesExhausted as error:
            raise StoreError(f"{error} ({doing})") from None
        except Exception as error:
            raise self._explained(error, doing) from error

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Write an object, replacing an older one."""

        def attempt() -> None:
            if isinstance(self._fs, LocalFileSystem):
                self._put_local(name, data, exclusive=False)
            else:
                self._fs.pipe_file(self._path(name), data)

        self._tried(f"writing {name}", attempt)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write an object unless one of this name exists; returns whether this writer won."""

        def attempt() -> bool:
            try:
                if isinstance(self._fs, LocalFileSystem):
                    self._put_local(name, data, exclusive=True)
                else:
                    self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # S3 servers answer 412, which s3fs gives as EINVAL or as text, depending on the server.
                if error.errno != errno.EINVAL and "PreconditionFailed" not in str(error):
                    raise
                return False
            return True

        # A retry after a lost answer finds its own object: that is a win too.
        return self._tried(f"writing {name}", attempt) or self.get(name) == data

    def _put_local(self, name: str, data: bytes | bytearray, exclusive: bool) -> None:
        path, root = Path(self._path(name)), Path(self._root)
        durable_folder(path.parent)
        if exclusive and path.parent != root:  # whatever this object completes is on the disk before it
            sync_folder(root)
        atomic_write(path, data, durable=True, exclusive=exclusive)

    def get(self, name: str) -> bytes:
        """An object's bytes. Raises FileNotFoundError if there is none, StoreError if it cannot be read."""

        def attempt() -> bytes | None:
            try:
                data: bytes = self._fs.cat_file(self._path(name))
                return data
            except FileNotFoundError:
                return None

        data = self._tried(f"reading {name}", attempt)
        if data is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        return data

    def size(self, name: str) -> int | None:
        """The size of an object in bytes; None if there is none."""

        def attempt() -> int | None:
            try:
                found: int = self._fs.size(self._path(name))
                return found
            except FileNotFoundError:
                return None

        return self._tried(f"looking at {name}", attempt)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every object below `prefix`: its name and its size in bytes; empty if there is none."""

        def attempt() -> dict[str, dict[str, Any]]:
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._path(prefix), detail=True)
                return found
            except FileNotFoundError:
                return {}

        return self._named(self._tried("listing", attempt))

    def beginning(self, start: str) -> dict[str, int]:
        """Every object whose name begins with `start`, with its size in bytes.

        What else lies here is not listed: on stores that list by prefix it costs nothing, in a folder a line each.
        """

        def attempt() -> dict[str, dict[str, Any]]:
            try:
                if lists_by_prefix(self.url):
                    found: dict[str, dict[str, Any]] = self._fs.find(self._root, prefix=start, detail=True)
                    return found
                each = self._fs.ls(self._root, detail=False)
                ours = (path for path in each if path.rpartition("/")[2].startswith(start))
                return {path: info for one in ours for path, info in self._fs.find(one, detail=True).items()}
            except FileNotFoundError:
                return {}

        return self._named(self._tried("listing", attempt))

    def _named(self, found: dict[str, dict[str, Any]]) -> dict[str, int]:
        """Sizes by name; servers may list an emptied folder as an object of its own: only files with a name count."""
        start = len(self._root) + 1
        return {p[start:]: info["size"] for p, info in found.items() if info["type"] == "file" and len(p) > start}

    def modified(self, name: str) -> float | None:
        """Unix time at which an object was written; None if the store does not record it."""
        try:
            moment = self._fs.modified(self._path(name))
        except FileNotFoundError:
            raise
        except NotImplementedError:
            return None
        except Exception as error:
            raise self._explained(error, f"looking at {name}") from error
        return float(moment.timestamp())

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects in this order; objects that do not exist are ignored."""
        folders = set()
        for name in names:

            def attempt(path: str = self._path(name)) -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

            self._tried(f"deleting {name}", attempt)
            folders.add(os.path.dirname(self._path(name)))
        if isinstance(self._fs, LocalFileSystem):
            for folder in folders:
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(Path(folder))

    def uploads(self, start: str = "") -> dict[tuple[str, str], datetime]:
        """Unfinished multipart uploads of objects whose names begin with `start` (S3 only): the time each was begun, by
        object name and upload id."""
        if "s3" not in self._fs.protocol:
            return {}
        bucket, _, prefix = self._root.partition("/")
        below = f"{prefix}/" if prefix else ""
        place = {"Bucket": bucket, "Prefix": below + start}
        found = self._tried("listing", lambda: self._fs.call_s3("list_multipart_uploads", **place)).get("Uploads") or []
        return {(each["Key"][len(below) :], each["UploadId"]): each["Initiated"] for each in found}

    def abort(self, name: str, upload: str) -> None:
        """Abort a multipart upload of the object `name`, which frees its parts; a missing upload is ignored."""
        bucket, _, key = self._path(name).partition("/")

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)

        self._tried(f"deleting {name}", attempt)

    def prune(self, prefix: str) -> None:
        """Remove the empty folder that deleted objects leave on a local disk."""
        if isinstance(self._fs, LocalFileSystem) and os.path.isdir(self._path(prefix)):
            with contextlib.suppress(OSError):  # not empty: the rest is not ours to remove
                os.rmdir(self._path(prefix))

    def check(self) -> None:
        """Raise StoreError unless an object can be written, read back, listed and removed here."""
        folder, data = f"check-{secrets.token_hex(8)}", secrets.token_bytes(64)
        name = f"{folder}/object"
        self.put(name, data)
        try:
            if self.get(name) != data:
                raise StoreError(
                    f"store {self.url}: an object read back differs from what was written; check the server"
                )
            if name not in self.beginning(folder):
                folds = "//" in self._root
                raise StoreError(
                    f"store {self.url}: an object is not listed under the name it was written to"
                    + ("; this server folds double slashes: write the URL with single ones" if folds else "")
                )
        finally:
            self.delete([name])
            self.prune(folder)

    def _explained(self, error: Exception, doing: str) -> StoreError:
        """The sentence for a failure, without anything the credentials could be in."""
        google = self.url.startswith(_GOOGLE)
        remedies: dict[Failure, str] = {
            "full": "it is full; free some space, keep fewer commits (checkpoint.keep), or set checkpoint.to elsewhere",
            "credentials": "no valid credentials; "
            + (
                "set GOOGLE_APPLICATION_CREDENTIALS, or use `gcloud auth application-default login`"
                if google
                else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use ~/.aws/credentials"
            ),
            "denied": "access is denied; check the credentials and that they may read, write, list and delete here",
            "missing": "there is no such place; create the bucket or folder, or correct checkpoint.to",
            "unreachable": "the server does not answer; check AWS_ENDPOINT_URL_S3 and the network",
        }
        kind = failure_at(self.url, with_code(self._fs, self._root, error))
        remedy = (settings_remedy(kind) or remedies.get(kind)) if kind else None
        return StoreError(
            f"store {self.url}: {doing} failed: {remedy or f'{type(error).__name__}: {str(error)[:200]}'}"
        )
