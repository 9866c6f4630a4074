"""Data sets by name, `samples://NAME`: those that come with the package, and those of other packages.

A package offers a set through the entry point group `treering.samples`, name = module:object, the object a `SampleSet`.
The sets that come with the package are entries of the same form. An entry is loaded when its name is used.
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
    """Shards that are there, or are made when they are first asked for."""

    train: Callable[[], str]
    """gives the glob or brace URL of the shards to train on"""
    held_out: Callable[[], str] | None = None
    """of those kept apart for evaluation, `samples://NAME/held_out`; None: there are none"""
    attribution: str | None = None
    """the credit to show beside its pictures, where their licence asks for one"""


_BUILT_IN = (EntryPoint("emoji", f"{__package__}.emoji:SAMPLES", GROUP),)


def sample_set(url: str) -> SampleSet | None:
    """The set that `samples://NAME` or `samples://NAME/held_out` is of; None for any other URL.

    Raises DataError for a name that nobody offers, or a set that cannot be loaded.
    """
    if not url.startswith(PREFIX):
        return None
    name = url.removeprefix(PREFIX).removesuffix(HELD_OUT)
    entries = [*_BUILT_IN, *entry_points(group=GROUP)]
    found = [entry for entry in entries if entry.name == name]
    if not found:
        names = ", ".join(PREFIX + known for known in sorted({entry.name for entry in entries}))
        raise DataError(
            f"{shown(url)[1:-1]} is unknown; there are {names}; a package offers one by the entry point group {GROUP}"
        )
    if len({entry.value for entry in found}) > 1:
        raise DataError(
            f"{PREFIX}{name} is offered by {' and by '.join(entry.value for entry in found)}; uninstall all but one"
        )
    try:
        made = found[0].load()
    except (ImportError, AttributeError) as error:
        raise DataError(f"{PREFIX}{name} cannot be loaded from {found[0].value}: {error}; mend that package") from None
    if not isinstance(made, SampleSet):
        raise DataError(
            f"{PREFIX}{name}: {found[0].value} is {type(made).__name__}, not a SampleSet of treering.data.builtin; "
            f"mend that package"
        )
    return made
