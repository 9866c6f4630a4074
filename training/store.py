"""The store: a folder of named byte objects behind any fsspec URL, local disk and object storage alike.

It promises little, so that every backend can keep it: an object appears whole or not at all, and `put_new` lets exactly
one writer win. What a commit is, is built on that in `commits.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem


class StoreError(RuntimeError):
    """A store that cannot be used; the message names the place, what is wrong and the remedy."""


class Store:
    """Objects by name below one URL. Names are our own, never a user's."""

    def __init__(self, url: str) -> None:
        if "@" in urlsplit(url).netloc:
            raise StoreError(
                "the store's URL holds a user or password; give credentials by environment or credentials file"
            )
        self.url = url.rstrip("/")
        try:
            options = {"use_listings_cache": False} if url.startswith("s3://") else {}
            self._fs, root = fsspec.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise StoreError(
                f"store {self.url}: {error}; use a local path, s3://BUCKET/PREFIX or another fsspec URL"
            ) from None
        self._root = str(root)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing an older one."""
        try:
            if isinstance(self._fs, LocalFileSystem):
                self._put_local(name, data, exclusive=False)
            else:
                self._fs.pipe_file(self._path(name), data)
        except Exception as error:
            raise self._explained(error, f"writing {name}") from error

    def put_new(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of this name; whether this writer won."""
        try:
            if isinstance(self._fs, LocalFileSystem):
                self._put_local(name, data, exclusive=True)
            else:
                self._fs.pipe_file(self._path(name), data, mode="create")
            return True
        except FileExistsError:
            pass
        except OSError as error:
            # S3 servers answer 412, which s3fs gives as EINVAL or as text, depending on the server.
            if error.errno != errno.EINVAL and "PreconditionFailed" not in str(error):
                raise self._explained(error, f"writing {name}") from error
        except Exception as error:
            raise self._explained(error, f"writing {name}") from error
        # A retry after a lost answer meets its own object: that is a win too.
        return self.get(name) == data

    def _put_local(self, name: str, data: bytes, exclusive: bool) -> None:
        path = self._path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        passing = f"{path}.{secrets.token_hex(4)}.partial"
        try:
            with open(passing, "xb") as file:
                file.write(data)
            if exclusive:
                os.link(passing, path)  # unlike a rename, refuses an existing name
                os.unlink(passing)
            else:
                os.replace(passing, path)
        except BaseException:
            if os.path.exists(passing):
                os.unlink(passing)
            raise

    def get(self, name: str) -> bytes:
        """An object's bytes. Raises FileNotFoundError if there is none, StoreError if it cannot be read."""
        try:
            data: bytes = self._fs.cat_file(self._path(name))
            return data
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._explained(error, f"reading {name}") from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every object below `prefix`: its name and its size in bytes; empty if there is none."""
        try:
            found = self._fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._explained(error, "listing") from error
        start = len(self._root) + 1
        # Servers may list an emptied folder as an object of its own: only files with a name count.
        return {p[start:]: info["size"] for p, info in found.items() if info["type"] == "file" and len(p) > start}

    def modified(self, name: str) -> float | None:
        """Unix time at which an object was written, if the store tells."""
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
        """Remove objects; one that is already gone is no error."""
        for name in names:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise self._explained(error, f"deleting {name}") from error

    def prune(self, prefix: str) -> None:
        """Remove the empty folder that deleted objects leave on a local disk."""
        if isinstance(self._fs, LocalFileSystem) and os.path.isdir(self._path(prefix)):
            with contextlib.suppress(OSError):  # not empty: somebody else's file, not ours to remove
                os.rmdir(self._path(prefix))

    def check(self) -> None:
        """Raise StoreError unless an object can be written, read back and removed here."""
        name, data = f"check-{secrets.token_hex(8)}", secrets.token_bytes(64)
        self.put(name, data)
        try:
            if self.get(name) != data:
                raise StoreError(
                    f"store {self.url}: an object read back differs from what was written; check the server"
                )
        finally:
            self.delete([name])

    def _explained(self, error: Exception, doing: str) -> StoreError:
        """The sentence for a failure, without anything the credentials could be in."""
        kind, said = type(error).__name__, str(error)
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "NoSpace" in said or "QuotaExceeded" in said:
            remedy = "it is full; free some space, keep fewer commits (checkpoint.keep), or set checkpoint.to elsewhere"
        elif "Credential" in kind or "Unable to locate credentials" in said or "InvalidAccessKeyId" in said:
            remedy = "no valid credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use ~/.aws/credentials"
        elif (
            isinstance(error, PermissionError)
            or "AccessDenied" in said
            or "Forbidden" in said
            or "SignatureDoesNotMatch" in said
        ):
            remedy = "access is denied; check the credentials and that they may read, write, list and delete here"
        elif "NoSuchBucket" in said or isinstance(error, FileNotFoundError):
            remedy = "there is no such place; create the bucket or folder, or correct checkpoint.to"
        elif "Endpoint" in kind or "Connect" in kind or isinstance(error, TimeoutError | ConnectionError):
            remedy = "the server does not answer; check AWS_ENDPOINT_URL_S3 and the network"
        else:
            remedy = f"{kind}: {said[:200]}"
        return StoreError(f"store {self.url}: {doing} failed: {remedy}")
