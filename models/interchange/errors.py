"""What goes wrong between their models and ours."""

from __future__ import annotations


class InterchangeError(ValueError):
    """A model that the other side cannot hold, or weights that do not fit; the message says what and why."""
