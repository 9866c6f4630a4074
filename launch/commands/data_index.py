"""`treering data index`: indexes all shards of a source in parallel, and can write the indexes next to the shards.

Every index is saved as soon as it exists, so after an interruption the same command continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.errors import DataError, shown
from ...data.shards.account import Account, Count, total
from ...data.shards.filter import Filter
from ...data.shards.index import Handles
from ...data.shards.listing import index_table, list_shards
from ...data.shards.opening import apply_filter, summarize_shards
from ...data.shards.parallel import enough_workers, index_all, sweep
from ...data.shards.sidecar import put_index
from ...data.shards.source import Source, pattern_of
from ...data.shards.summary import ShardSummary, write_summary
from ...data.shards.tar_reader import DamagedShard
from ...data.storage.files import shown_url
from ...data.units import counted
from ...training.logging.counting import counting
from ..errors import RunError, safe_text
from .data_output import account_json, size_text, skipped_line, skipped_lines


def index_url(url: str, workers: int | None, beside: bool, filter: str | None) -> dict[str, Any]:
    """Index all shards of a URL; returns their counts, the faults of damaged shards, and how many samples pass a
    filter.

    With `beside`, indexes and summary are also written next to the shards, so that other nodes need not scan them.
    Raises DataError.
    """
    wanted = _read(filter)
    pattern = pattern_of(url)
    shards = list_shards(pattern)
    workers = workers or enough_workers(pattern)
    faults, unread, account = [], set(), Account()
    with counting("shards") as report:
        for shard, index in index_all(shards, workers, report):
            if isinstance(index, DataError):
                faults.append({"shard": shown_url(shard.url), "reason": str(index)})
                if not isinstance(index, DamagedShard):
                    unread.add(shard)
            else:
                account = total((account, index.account))
    summary = summarize_shards(
        pattern, [shard for shard in shards if shard not in unread], skip_damaged=True, workers=workers
    )
    whole = [each for each in summary if not each.fault]
    found: dict[str, Any] = {
        "source": shown_url(url),
        "shards": len(shards),
        "samples": sum(each.samples for each in whole),
        "bytes": sum(shard.size for shard in shards),
        "faults": faults,
        **account_json(account),
    }
    if wanted is not None:
        handles = Handles(
            [each.shard for each in whole],
            [each.samples for each in whole],
            lambda shard, anew: index_table(shard, anew=anew),
        )
        with counting("shards") as report:
            found["accepted"] = int(apply_filter(pattern, wanted, whole, handles, workers, report).counts.sum())
    if beside:
        _put_beside(pattern, summary, workers)
        found["beside"] = len(whole)
    return found


def _read(text: str | None) -> Filter | None:
    try:
        return None if text is None else Filter(text)
    except ValueError as error:
        raise RunError(f"--filter: {safe_text(str(error))}", 2) from None


def _put_beside(pattern: str, summary: Sequence[ShardSummary], workers: int) -> None:
    whole = [each.shard for each in summary if not each.fault]
    with counting("indexes written") as report:
        for _ in sweep(put_index, whole, workers, report):
            pass
    write_summary(pattern, summary, beside=True)


def as_text(found: dict[str, Any], filter: str | None) -> str:
    """The result of `index_url` as text, one line or a few."""
    whole = found["shards"] - len(found["faults"])
    lines = [f"{counted(found['samples'], 'sample')} in {counted(whole, 'shard')}, {size_text(found['bytes'])}"]
    others = {name: Count(**count) for name, count in found["account"].items()}
    lines += skipped_lines(Account(others).skipped_members)
    if "accepted" in found:
        lines.append(accepts(filter or "", found["accepted"], found["samples"]))
    if "beside" in found:
        lines.append(f"next to the shards, in .treering: {counted(found['beside'], 'index')}, and a summary")
    return "\n".join(lines)


def accepts(filter: str, count: int, of: int) -> str:
    """One line that says how many samples pass a filter."""
    return safe_text(
        f"the filter {shown(filter)} accepts {count:,} of {counted(of, 'sample')} ({count / max(of, 1):.1%})"
    )


def source_notes(source: Source, filter: str | None) -> list[str]:
    """Lines to print about a source when a run starts: how many samples pass its filter, which shards are skipped, and
    what in the shards belongs to no sample."""
    name = safe_text(shown_url(source.url))
    lines = [] if filter is None else [f"{name}: {accepts(filter, len(source), source.samples_before_filter)}"]
    if source.skipped:
        count = len(source.skipped)
        what = "1 damaged shard is" if count == 1 else f"{count} damaged shards are"
        lines.append(f"{name}: {what} skipped; see ledger.jsonl")
    if source.skipped_members:
        lines.append(f"{name}: {skipped_line(source.skipped_members)}; `treering data lint` names them")
    return lines
