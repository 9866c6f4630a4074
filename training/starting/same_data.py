"""The data of a run: the same when it continues, and the same on every process.

The order of samples is a function of the data, so other data under the same names would silently be another run. The
state holds the identity of every source, and of the tokenizer; they are compared before the first batch. A source that
the run has not read yet may change: data arrive during training.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence

from ...data.errors import DataError
from ...data.identity import SourceIdentity, difference
from ...data.loading.loader import Loader
from ...data.samples.tokenizer import open_tokenizer
from ...data.storage.files import shown_url
from ..checkpoint.store import StoreError
from ..recipe import Recipe
from ..state import RunState
from ..world import World


def sources_read(recipe: Recipe, state: RunState) -> list[int]:
    """The numbers of the sources that a run has read up to a state; those of its first step if it has not begun."""
    mixtures = [mixture for mixture in recipe.settled(state.decisions).mixtures() if mixture.step < max(state.step, 1)]
    return [i for i in range(len(recipe.data.train)) if any(mixture.weights[i] for mixture in mixtures)]


def check_same_data(recipe: Recipe, state: RunState, found: Sequence[SourceIdentity], where: str) -> None:
    """Raise StoreError if a source that the run `where` has read up to `state` has other samples now, or if its
    tokenizer is another; DataError if that cannot be read."""
    if state.tokenizer not in ("", open_tokenizer(recipe.data.tokenizer).identity):
        raise StoreError(
            f"the tokenizer changed: data.tokenizer = {shown_url(recipe.data.tokenizer)} is not what the run of "
            f"{where} was trained with; bring the file back to continue it, or give another --out to start a new run"
        )
    for i in sources_read(recipe, state):
        if i < len(state.data) and (different := difference(state.data[i], found[i])):
            raise StoreError(
                f"the data changed: {shown_url(recipe.data.train[i].source)} now has {found[i].size}, and the run of "
                f"{where} has read {state.data[i].size}; first difference: {different}; bring the shards back "
                f"to continue it, add new ones as another source in a later stage, or give another --out to start a "
                f"new run"
            )


def changed_sets(state: RunState, contents: Mapping[str, str]) -> str | None:
    """Why scores on evaluation sets of these `contents` cannot be compared with earlier ones of the run; None if they
    can."""
    changed = [url for url, its in contents.items() if state.evaluated.get(url, its) != its]
    if not changed:
        return None
    return (
        f"{', '.join(map(shown_url, changed))} changed: its scores from step {state.step} on are of other samples than "
        f"those before; the best commit is chosen anew among them"
    )


def open_together(world: World, recipe: Recipe, make: Callable[[], Loader]) -> tuple[Loader, list[SourceIdentity]]:
    """Every process's loader, and what identifies its sources. All ranks call it together.

    Raises DataError on all of them if one cannot open its loader, or if they see different samples."""
    loader, fault, tokenizer, found = None, "", "", []
    try:
        loader = make()
        found = [source.identity for source in loader.sources]
        tokenizer = loader.tokenizer.identity
    except DataError as error:
        if world.size == 1:
            raise
        fault = str(error)
    rows = world.objects([socket.gethostname(), os.getcwd(), fault, [each.digest for each in found], tokenizer])
    for rank, (host, folder, why, _, its) in enumerate(rows):
        if not why and its != rows[0][4]:
            its_file = shown_url(recipe.data.tokenizer)
            why = f"data.tokenizer = {its_file} is not the file that process 0 reads; copy it again"
        if why:
            raise DataError(f"{why} (seen by process {rank} on {host}, in {folder})")
    assert loader
    other = next((rank for rank, row in enumerate(rows) if row[3] != rows[0][3]), None)
    if other is not None:
        number = next(i for i, digest in enumerate(rows[0][3]) if digest != rows[other][3][i])
        sizes, shard = _compared(world, found[number], other)
        places = [f"process {rank} on {rows[rank][0]}, in {rows[rank][1]}" for rank in (0, other)]
        raise DataError(
            f"{shown_url(recipe.data.train[number].source)} is not the same everywhere: {sizes[0]} for {places[0]}, "
            f"{sizes[1]} for {places[1]}; first difference: {shard}; wait until copies and listings are complete, or "
            f"copy the shards again, and start again"
        )
    return loader, found


def _compared(world: World, own: SourceIdentity, other: int) -> tuple[list[str], str]:
    """The sizes of a source that ranks 0 and `other` see, and their first difference.

    Halves a range of shards until one is left: a list of all shards would be too long to send to every rank."""
    pairs = world.objects([own.size, len(own.shards)])
    same, differ = 0, min(pairs[0][1], pairs[other][1]) + 1  # how many first shards are known to be the same, and not
    while differ - same > 1:
        middle = (same + differ) // 2
        firsts = world.objects(own.first(middle))
        same, differ = (middle, differ) if firsts[0] == firsts[other] else (same, middle)
    names = world.objects(own.shards[same] if same < len(own.shards) else "")
    here, there = names[0], names[other]
    if not here or not there:
        return [pairs[0][0], pairs[other][0]], f"{here or there} is missing for process {other if here else 0}"
    if here != there:
        return [pairs[0][0], pairs[other][0]], f"{here} for process 0, {there} for process {other} in its place"
    return [pairs[0][0], pairs[other][0]], f"{here} has other samples"
