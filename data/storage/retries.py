"""Retries: which failures of a store are transient, and how long they are retried.

Why not tenacity, and not s3fs's retries (turned off for reading): neither restarts its count when bytes have arrived,
nor distinguishes a store that does not answer from one that refuses.

A failure is classified by its HTTP status if it has one, otherwise by its type names, so that no client library is
imported for it. A refusal (401, 403, 404, no credentials) fails at once. Waits double from try to try; their jitter
comes from a random stream of the process, so that processes that failed together do not retry together.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import DataError
from ..order import stable_hash, stream

T = TypeVar("T")


class RetriesExhausted(DataError):
    """A store's transient failure persisted until the retries were used up."""


TRIES = 20
SECONDS = 120.0  # a restarting store is back within 20
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0  # seconds
_WARN_AFTER = 5.0  # seconds after which a warning says what is being retried
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529))
_TRANSIENT_CODES = frozenset(
    ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError", "ConditionalRequestConflict")
)
_TRANSIENT_TYPES = frozenset((
    "TimeoutError", "ConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
    "ResponseParserError", "ClientConnectionError", "ClientPayloadError",
))  # fmt: skip
_PERMANENT_TYPES = frozenset(("SSLError", "ClientSSLError", "SSLCertVerificationError"))


def retry(
    name: str,
    attempt: Callable[[], T],
    progress: Callable[[], int] = lambda: 0,
    seconds: float | None = None,
    doing: str = "read",
) -> T:
    """The result of `attempt()`, retried after transient failures.

    It is tried at most TRIES times and for `seconds` (default: SECONDS), counted from the last try after which
    `progress()` had grown. Other failures are raised unchanged. Messages read "cannot `doing` `name`". Raises
    RetriesExhausted, with the number of tries and their duration.
    """
    limit = SECONDS if seconds is None else seconds
    tries, begun, reached, warned = 0, time.monotonic(), progress(), False
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            if progress() > reached:
                tries, begun, reached = 0, now, progress()
            tries, waited = tries + 1, now - begun
            wait = _wait(name, tries)
            if tries >= TRIES or waited + wait > limit:
                raise RetriesExhausted(
                    f"cannot {doing} {name}: {reason(error)}; tried {tries} times in {waited:.0f} seconds; "
                    f"check that the store is reachable and try again"
                ) from None
            if waited > _WARN_AFTER and not warned:
                warned = True
                logging.getLogger(__name__).warning(
                    "cannot %s %s: %s; trying again for up to %.0f seconds", doing, name, reason(error), limit
                )
        time.sleep(wait)


def _wait(name: str, tries: int) -> float:
    """Seconds before the next try: doubles each time, times a random factor from 0.5 to 1."""
    longest = min(_FIRST_WAIT * 2.0 ** (tries - 1), _LONGEST_WAIT)
    return longest * float(stream(os.getpid(), "retry", stable_hash(name), tries).uniform(0.5, 1.0))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = http_status(error)
    if status is not None and status in _TRANSIENT_STATUS:
        return True
    if any(_code(each) in _TRANSIENT_CODES for each in error_chain(error)):
        return True
    if status is not None and status >= 300:
        return False
    names = {kind.__name__ for each in error_chain(error) for kind in type(each).__mro__}
    return bool(names & _TRANSIENT_TYPES) and not names & _PERMANENT_TYPES


def http_status(error: BaseException) -> int | None:
    """The HTTP status of the response behind an error of s3fs, aiohttp or gcsfs; None without a response."""
    for each in error_chain(error):
        response = getattr(each, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # aiohttp reports a truncated body as code 400, which no server sent: only gcsfs's `code` counts
        code = getattr(each, "code", None) if type(each).__name__ == "HttpError" else None
        for status in (metadata.get("HTTPStatusCode"), getattr(each, "status", None), code):
            if isinstance(status, int) and status >= 100:
                return status
    return None


def reason(error: BaseException) -> str:
    """A short reason for an error: never the store's text, which may hold secrets."""
    status = http_status(error)
    if status is not None and status >= 300:
        return "the store is full (507)" if status == 507 else f"the store answers {status}"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return found if isinstance(found, str) else None


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes (`__cause__`), at most 8: clients of stores wrap the errors they meet."""
    each: BaseException | None = error
    for _ in range(8):
        if each is None:
            return
        yield each
        each = each.__cause__
