"""Classifies errors of stores and disks into kinds of failure; the reader or writer then words the remedy.

An error is classified by HTTP status, error number and type names, so that no client library is imported for it. A
store's error text is never shown: it may hold secrets.
"""

from __future__ import annotations

import errno
import os
from typing import Literal

from .retries import error_chain, http_status

Failure = Literal[
    "full",
    "expired",
    "clock",
    "profile",
    "endpoint",
    "tls",
    "credentials",
    "denied",
    "missing",
    "unreachable",
    "unsupported",
    "other",
]

_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "token has expired", "UnauthorizedSSOToken", "SSOTokenLoadError")
_CLOCK = ("RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired", "Signature not yet current", "too skewed")
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "Unable to locate credentials",
    "InvalidAccessKeyId",
    "InvalidToken",
)
_CLIENTS = ("botocore", "aiohttp", "aiobotocore", "gcsfs", "google")


def settings_remedy(failure: Failure) -> str | None:
    """What is wrong with the settings of this machine, and the remedy; None for failures of another kind."""
    return {
        "expired": "the credentials have expired; renew them, then the same command continues",
        "clock": "the clock of this machine is wrong: the server's differs by too much; set it (timedatectl), then the "
        "same command continues",
        "profile": f"the profile {os.environ.get('AWS_PROFILE', 'default')!r} does not exist; correct AWS_PROFILE, or "
        "add it to ~/.aws/config",
        "endpoint": "the endpoint is not a URL; set AWS_ENDPOINT_URL with http:// or https:// before the host",
        "tls": "the server's certificate is refused; if it speaks plain HTTP, set AWS_ENDPOINT_URL with http://; "
        "else set AWS_CA_BUNDLE to the certificate of its authority",
    }.get(failure)


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
    by_text: dict[Failure, tuple[str, ...]] = {
        "expired": _EXPIRED,
        "clock": _CLOCK,
        "profile": ("ProfileNotFound",),
        "endpoint": ("Invalid endpoint",),
        "tls": ("SSLError", "SSLCertVerificationError"),
        "credentials": _NO_CREDENTIALS,
    }
    for kind, codes in by_text.items():
        if any(code in text for code in codes):
            return kind
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
        return "missing"
    denied = ("AccessDenied", "Forbidden", "SignatureDoesNotMatch")
    if isinstance(error, PermissionError) or status in (401, 403) or any(code in text for code in denied):
        return "denied"
    if isinstance(error, ImportError | ValueError):  # fsspec: unknown protocol, or its package is missing
        return "unsupported"
    name = type(error).__name__
    if "Endpoint" in name or "Connect" in name or isinstance(error, TimeoutError | ConnectionError):
        return "unreachable"
    from_client = any(type(each).__module__.partition(".")[0] in _CLIENTS for each in error_chain(error))
    return "other" if isinstance(error, OSError) or from_client else None
