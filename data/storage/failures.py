"""Classifies errors of stores and disks into kinds of failure; the reader or writer then words the remedy.

An error is classified by HTTP status, error number and type names, so that no client library is imported for it. A
store's error text is never shown: it may hold secrets.
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
    # A system error contains the file name, which may be any text; a client's error contains the store's code.
    from_system = isinstance(error, OSError) and error.filename is not None
    text = "" if from_system else " ".join(f"{type(each).__name__} {each}" for each in error_chain(error))
    status = http_status(error)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or status == 507:
        return "full"
    if any(code in text for code in ("NoSpace", "QuotaExceeded")):
        return "full"
    if any(code in text for code in ("ExpiredToken", "TokenRefreshRequired", "token has expired")):
        return "expired"
    if any(code in text for code in (*_NO_CREDENTIALS, "Unable to locate credentials", "InvalidAccessKeyId")):
        return "credentials"
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
        return "missing"
    denied = ("AccessDenied", "Forbidden", "SignatureDoesNotMatch")
    if isinstance(error, PermissionError) or status in (401, 403) or any(code in text for code in denied):
        return "denied"
    if isinstance(error, ImportError | ValueError):  # fsspec: unknown protocol, or its package is missing
        return "unsupported"
    kind = type(error).__name__
    if "Endpoint" in kind or "Connect" in kind or isinstance(error, TimeoutError | ConnectionError):
        return "unreachable"
    from_client = any(type(each).__module__.partition(".")[0] in _CLIENTS for each in error_chain(error))
    return "other" if isinstance(error, OSError) or from_client else None
