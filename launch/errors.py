"""Errors that a user can cause, and how they are shown: one or a few sentences, on one screen, without a traceback.

Whatever came from outside (values, keys, paths, messages) may hold control characters or a password; it is only ever
printed through `show` or `safe_text`.
"""

from __future__ import annotations

import errno

from ..data.storage.credentials import masked, without_user

_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_REMEDIES = {
    errno.ENOSPC: "free some space and repeat the command, or choose another place with --out",
    errno.EDQUOT: "free some of your quota and repeat the command, or choose another place with --out",
    errno.EACCES: "check the permissions, or choose another place with --out",
    errno.EPERM: "check the permissions, or choose another place with --out",
    errno.EISDIR: "a file is to be written there; move the folder away, or choose another place",
    errno.EROFS: "choose a writable place with --out",
}


class RecipeError(ValueError):
    """A recipe that cannot be read or run; the message names the field, the value, what is wrong and the remedy."""


def safe_text(text: str) -> str:
    """`text` safe to print: credentials in URLs masked, control characters and lone surrogates escaped."""
    text = masked(text)
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: object, width: int = 60) -> str:
    """`value` as one would write it in a recipe: one line, at most `width` characters, safe to print."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, str):
        text = repr(safe_text(without_user(value)))
    else:
        text = safe_text(str(value)).replace("\n", " ")
    return text if len(text) <= width else f"{text[: width - 1]}…"


def user_message(error: BaseException) -> str | None:
    """The message for the user if they can fix `error`; None if it is a bug of ours."""
    if isinstance(error, OSError):
        if error.errno not in _SYSTEM:
            return None
        place = f"{show(error.filename)}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno, "choose another place")
        return f"{place}{safe_text(error.strerror or str(error))}; {remedy}"
    from ..data.errors import DataError  # late import: these load torch, which a help page must not wait for
    from ..models.interchange.errors import InterchangeError
    from ..models.spec import SpecError
    from ..training.checkpoint.store import StoreError
    from ..training.state import TrainingError

    if isinstance(error, RecipeError | DataError | SpecError | InterchangeError | StoreError | TrainingError):
        return safe_text(str(error))
    return None


class RunError(Exception):
    """A run that ended early: message to print, exit code of the command, and class name of the error, if known."""

    def __init__(self, message: str, code: int, kind: str = "") -> None:
        super().__init__(message)
        self.code, self.kind = code, kind
