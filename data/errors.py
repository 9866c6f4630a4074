"""Errors of the data package: each message names the place, the fault and the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be read or used; the message names the place, what is wrong with it and the remedy."""


class BadSample(Exception):
    """One sample cannot be used; the message is the reason recorded in the ledger."""


def shown(text: str, most: int = 120) -> str:
    """A name from data made safe for a terminal: quoted, escaped and cut to `most` characters."""
    return ascii(text if len(text) <= most else text[: most - 3] + "...")
