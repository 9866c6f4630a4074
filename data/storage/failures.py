"""What went wrong in a store or on a disk, as one kind of failure; who reads and who writes then word the remedy.

An error is judged by its HTTP status, its error number and the names of its types, so that no client library is
imported for it. A store's own words are never shown: they may hold secrets.
"""

from __future__ import annotations

import errno
from typing import Literal

from .retries import error_chain, http_status

Failure = Literal["full", "expired", "credentials", "denied", "missing", "unreachable", "unsupported", "other"]

_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_CLIENTS = ("botocore", "aiohttp", "aiobotocore", "gcsfs", "google")


def failure_of(error: Exception) -> Failure | None:
    """The kind of failure behind an error of a file system; None if it is not one."""
    # An error of the system names the file, whose name may say anything; a client's errors carry the store's code.
    from_system = isinstance(error, OSError) and error.filename is not None
    said = "" if from_system else " ".join(f"{type(each).__name__} {each}" for each in error_chain(error))
    status = http_status(error)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or status == 507:
        return "full"
    if any(code in said for code in ("NoSpace", "QuotaExceeded")):
        return "full"
    if any(code in said for code in ("ExpiredToken", "TokenRefreshRequired", "token has expired")):
        return "expired"
    if any(code in said for code in (*_NO_CREDENTIALS, "Unable to locate credentials", "InvalidAccessKeyId")):
        return "credentials"
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in said:
        return "missing"
    denied = ("AccessDenied", "Forbidden", "SignatureDoesNotMatch")
    if isinstance(error, PermissionError) or status in (401, 403) or any(code in said for code in denied):
        return "denied"
    if isinstance(error, ImportError | ValueError):  # fsspec: unknown protocol, or its package is missing
        return "unsupported"
    kind = type(error).__name__
    if "Endpoint" in kind or "Connect" in kind or isinstance(error, TimeoutError | ConnectionError):
        return "unreachable"
    from_client = any(type(each).__module__.partition(".")[0] in _CLIENTS for each in error_chain(error))
    return "other" if isinstance(error, OSError) or from_client else None
