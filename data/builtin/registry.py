"""Data sets by name, `samples://NAME`: the built-in ones and those of other packages.

A package registers a set in the entry point group `treering.samples` as name = module:object, where the object is a
`SampleSet`. The built-in sets are entries of the same form. An entry is loaded when its name is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from ..errors import DataError, shown

GROUP = "treering.samples"
PREFIX, HELD_OUT = "samples://", "/held_out"


@dataclass(frozen=True)
class SampleSet:
    """The shards of a data set, which may be created on first use."""

    train: Callable[[], str]
    """returns the glob or brace URL of the training shards"""
    held_out: Callable[[], str] | None = None
    """returns that of the evaluation split, `samples://NAME/held_out`; None: no such split"""
    attribution: str | None = None
    """the credit to show with its pictures, if their licence requires one"""


_BUILT_IN = (EntryPoint("emoji", f"{__package__}.emoji:SAMPLES", GROUP),)


def sample_set(url: str) -> SampleSet | None:
    """The set behind `samples://NAME` or `samples://NAME/held_out`; None for any other URL.

    Raises DataError for a name that is not registered, or a set that cannot be loaded.
    """
    if not url.startswith(PREFIX):
        return None
    name = url.removeprefix(PREFIX).removesuffix(HELD_OUT)
    entries = [*_BUILT_IN, *entry_points(group=GROUP)]
    found = [entry for entry in entries if entry.name == name]
    if not found:
        names = ", ".join(PREFIX + known for known in sorted({entry.name for entry in entries}))
        raise DataError(
            f"{shown(url)[1:-1]} is unknown; available are {names}; "
            f"a package adds one through the entry point group {GROUP}"
        )
    if len({entry.value for entry in found}) > 1:
        raise DataError(
            f"{PREFIX}{name} is registered by {' and by '.join(entry.value for entry in found)}; uninstall all but one"
        )
    try:
        loaded = found[0].load()
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{PREFIX}{name} cannot be loaded from {found[0].value}: {error}; repair that package"
        ) from None
    if not isinstance(loaded, SampleSet):
        raise DataError(
            f"{PREFIX}{name}: {found[0].value} is {type(loaded).__name__}, not a SampleSet of treering.data.builtin; "
            f"repair that package"
        )
    return loaded
