"""Kinds of failure, against errors as the system, s3fs and gcsfs raise them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from treering.data.errors import DataError
from treering.data.storage.failures import Failure, failure_of
from treering.data.storage.files import readable_errors


def answered(code: str, status: int, kind: type[Exception] = OSError) -> Exception:
    """As s3fs raises it: a translated error whose cause is botocore's."""
    from botocore.exceptions import ClientError

    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = kind(code)
    error.__cause__ = ClientError(response, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "full"),
        (answered("QuotaExceeded", 403, PermissionError), "full"),
        (answered("ExpiredToken", 400, PermissionError), "expired"),
        (answered("InvalidAccessKeyId", 403, PermissionError), "credentials"),
        (answered("ExpiredTokenException", 400), "expired"),
        (answered("RequestTimeTooSkewed", 403, PermissionError), "clock"),
        (answered("RequestExpired", 400), "clock"),
        (answered("InvalidToken", 403, PermissionError), "credentials"),
        (ValueError("Invalid endpoint: 127.0.0.1:8333"), "endpoint"),
        (answered("SignatureDoesNotMatch", 403, PermissionError), "denied"),
        (answered("NoSuchBucket", 404, FileNotFoundError), "missing"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "missing"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "unreachable"),
        (ValueError("Protocol not known: s4"), "unsupported"),
        (OSError(errno.EIO, "Input/output error"), "other"),
        (ZeroDivisionError(), None),
    ],
)
def test_kinds(error: Exception, kind: Failure | None) -> None:
    assert failure_of(error) == kind


@pytest.mark.parametrize("name", ["AccessDenied.tar", "ExpiredToken", "NoSpace left"])
def test_a_file_name_is_not_taken_for_an_error_code(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"), readable_errors(str(tmp_path / name)):
        open(tmp_path / name)  # noqa: SIM115  it raises
