"""Output of `treering data index`, `lint` and `inspect`: tables and lines.

Keys, captions and labels come from the shards and are untrusted: all are printed through `shown` or `safe_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.errors import shown
from ...data.ledger import LedgerEntry, read_ledger
from ...data.shards.account import Account, Count
from ...data.shards.parallel import enough_workers
from ...data.shards.source import Source, attribution
from ...data.storage.files import shown_url
from ...data.tools.contact_sheet import Card, Section, cards, with_notes, write_sheet
from ...data.tools.inspect import inspect, locate_entries, open_indexed, sample_numbers, sorted_numbers
from ...data.tools.lint import Findings
from ...data.tools.pack import PackResult
from ...data.units import counted
from ...training.logging.counting import counting
from ..errors import safe_text
from .data_batch import StepBatch

MOST_FAULTS = 8
MOST_BAD = 40
_MOST_ROWS = 12
_ON_A_SHEET = 120
_QUANTILES = ("mean", "least", "p10", "p50", "p90", "p99", "most")
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def packed_lines(packed: PackResult) -> list[str]:
    """The result of packing, as lines for a terminal."""
    shards = packed.shards
    captions = f" with {counted(packed.captions, 'caption')}" if packed.captions is not None else ""
    of = "" if packed.part == len(shards) else f"{packed.part:,} of "
    lines = [f"{counted(packed.samples, 'sample')}{captions} in {of}{counted(len(shards), 'shard')}"]
    lines.append(safe_text(shards[0]))
    lines += [f"to\n{safe_text(shards[-1])}"] if len(shards) > 1 else []
    if packed.bad:
        lines.append(f"skipped {counted(packed.bad, 'sample')} that cannot be used: see the .bad.jsonl files")
    if packed.refused:
        lines.append(
            f"skipped {len(packed.refused):,} of the table's {counted(packed.rows or 0, 'row')}, which cannot be used:"
        )
        lines += [f"  {safe_text(each)}" for each in packed.refused[:MOST_FAULTS]]
        more = len(packed.refused) - MOST_FAULTS
        lines += [f"  and {more:,} more; --json lists all"] if more > 0 else []
    if packed.written < packed.part:
        lines.append(f"{counted(packed.written, 'shard')} written now")
    if packed.missing:
        lines.append(f"{counted(packed.missing, 'shard')} still to be written, by the other parts")
    return lines


def faults_message(shards: int, reasons: Sequence[str]) -> str:
    """The faults of a source's shards, on one screen."""
    few = [f"  {safe_text(reason[:300])}".replace("\n", " ") for reason in reasons[:MOST_FAULTS]]
    more = [f"  and {len(reasons) - MOST_FAULTS} more; --json lists all"] if len(reasons) > MOST_FAULTS else []
    return "\n".join([f"{counted(len(reasons), 'fault')} in {counted(shards, 'shard')}", *few, *more])


def size_text(count: float) -> str:
    """Bytes in decimal units."""
    factor, unit = next(((factor, unit) for factor, unit in _UNITS if count >= factor), (1, "B"))
    return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:,.0f} {unit}"


def skipped_line(counts: Mapping[str, Sequence[Any]]) -> str:
    """One line: how many members belong to no sample, and what they are; `counts` holds members and bytes by what they
    are. Empty if there are none."""
    members, size = (sum(count[i] for count in counts.values()) for i in range(2))
    few = "; ".join(f"{name}: {count[0]:,}" if count[0] else name for name, count in counts.items())
    return f"{counted(members, 'member')} ({size_text(size)}) in no sample: {few}" if counts else ""


def account_json(account: Account) -> dict[str, Any]:
    """What all members and bytes of a source are, as plain data; the bytes add up to `bytes_accounted_for`."""
    rows = {name: {"members": c.members, "bytes": c.bytes, "example": c.example} for name, c in account.counts.items()}
    return {"members": account.members, "bytes_accounted_for": account.bytes, "account": rows}


def skipped_lines(counts: Mapping[str, Count]) -> list[str]:
    """What belongs to no sample, with the name of the first of each kind."""
    line = skipped_line(counts)
    named = [f"  {name}, such as {count.example}" for name, count in counts.items() if count.example]
    return [line, *named] if line else []


def batch_lines(found: StepBatch) -> list[str]:
    """The samples of a step, one per line, below a heading."""
    numbers = [sample.number for sample in found.samples]
    first, last = min(numbers), max(numbers)
    lines = [f"step {found.step}, stage {found.stage + 1}: samples {first:,} to {last:,} of the run"]
    for each in found.samples:
        where = f"rank {each.rank}  {each.number}  {shown(each.source)}  {shown(each.shard)}  {shown(each.key)}"
        replaced = "".join(f"  (replaces {bad})" for bad in each.replaces)
        lines.append(f"{where}  {shown(each.caption)}{replaced}")
    return [safe_text(line) for line in lines]


def bad_line(entry: LedgerEntry) -> str:
    """One line about a bad sample."""
    return safe_text(f"{shown_url(entry.shard)} at byte {entry.offset}: {shown(entry.key)}: {entry.reason}")


def findings_json(found: Findings) -> dict[str, Any]:
    """The result of lint, as plain data."""
    return {
        "source": shown_url(found.source),
        "shards": found.shards,
        "samples": found.samples,
        "clean": found.clean,
        "reasons": found.kinds,
        "bad": [{"shard": shown_url(e.shard), "key": e.key, "offset": e.offset, "reason": e.reason} for e in found.bad],
        "faults": [{"shard": shown_url(fault.shard), "reason": fault.reason} for fault in found.faults],
        **account_json(found.account),
    }


def findings(found: Findings, ledger: Path | None) -> Group:
    """The result of lint for a terminal: the first bad samples, a table of all reasons, the total."""
    parts: list[Any] = [Text(bad_line(entry)) for entry in found.bad[:MOST_BAD]]
    more = len(found.bad) - len(parts)
    if more:
        parts.append(Text(f"and {more:,} more; " + ("the ledger" if ledger else "--ledger FILE") + " lists all"))
    if found.bad:
        parts.append(reasons_table(found.kinds))
    total = (
        f"{len(found.bad):,} of {counted(found.samples, 'sample')} in {counted(found.shards, 'shard')} cannot be used"
    )
    parts.append(Text(total))
    parts += [Text(line) for line in skipped_lines(found.account.skipped_members)]
    if ledger is not None:
        parts.append(Text(f"ledger: {safe_text(str(ledger))}"))
    return Group(*parts)


def reasons_table(kinds: Mapping[str, int]) -> Table:
    """A table of the reasons, with the number of bad samples for each."""
    table = Table("reason", box=box.SIMPLE_HEAD)
    table.add_column("samples", justify="right")
    for kind, count in kinds.items():
        table.add_row(Text(safe_text(kind)), f"{count:,}")
    return table


def statistics(found: Mapping[str, Any]) -> Group:
    """The statistics of inspect, for a terminal."""
    pictures, captions = found["pictures"], found["captions"]
    every = found["inspected"] == found["samples"]
    looked = "all inspected" if every else f"{found['inspected']:,} of them inspected"
    parts: list[Any] = [
        Text(
            f"{safe_text(found['source'])}: {counted(found['samples'], 'sample')} in "
            f"{counted(found['shards'], 'shard')}, {size_text(found['bytes'])}; {looked}"
        )
    ]
    parts += [Text(line) for line in [skipped_line(found["skipped_members"])] if line]
    if found["bad"]:
        parts.append(reasons_table(found["bad"]))
    if found["unread"]:
        parts.append(Text(f"ignored next to good captions: {_counts(found['unread'])}"))
    rows = {name.replace("_", " "): pictures[name] for name in ("width", "height", "short_side", "width_over_height")}
    rows |= {"captions per sample": captions["a_sample"], "tokens per caption": captions["tokens"]}
    rows |= {"characters per caption": captions["characters"]}
    columns = list(found["columns"].items())
    rows |= {f"column {_quoted(name, 30)}": column["numbers"] for name, column in columns if column["numbers"]}
    table = Table("", box=box.SIMPLE_HEAD)
    for name in _QUANTILES:
        table.add_column(name, justify="right")
    for label, values in rows.items():
        table.add_row(label, *(f"{values[name]:,.4g}" if values else "–" for name in _QUANTILES))
    parts.append(table)
    if captions["count"]:
        parts.append(Text(f"{captions['cut_at_77']:.2%} of {captions['count']:,} captions are truncated at 77 tokens"))
    parts.append(Text(f"scripts: {_counts(captions['scripts'])}"))
    for what, equal in (("pictures", pictures["equal"]), ("captions", captions["equal"])):
        named = ", ".join(f"{_quoted(group['first'])} {group['times']} times" for group in equal["largest"][:3])
        parts.append(Text(f"{what} that are copies: {equal['copies']:,}" + (f" (most: {named})" if named else "")))
    parts.append(Text(f"pictures in files that are copies: {pictures['equal_files']['copies']:,}"))
    parts.append(Text(_alike_line(pictures["alike"])))
    names = list(found["labels"])
    parts += [Text(f"label {_quoted(name)}: {_counts(found['labels'][name])}") for name in names[:_MOST_ROWS]]
    if len(names) > _MOST_ROWS:
        parts.append(Text(f"and {len(names) - _MOST_ROWS} more labels; --json lists all"))
    parts += [Text(_column_line(name, column, found["inspected"])) for name, column in columns[:_MOST_ROWS]]
    if len(columns) > _MOST_ROWS:
        parts.append(Text(f"and {len(columns) - _MOST_ROWS} more columns; --json lists all"))
    return Group(*parts)


def _alike_line(alike: Mapping[str, Any]) -> str:
    groups = "; ".join(", ".join(_quoted(key, 24) for key in group["keys"][:3]) for group in alike["largest"][:2])
    return f"pictures that look like an earlier one: {alike['copies']:,}" + (f" (as {groups})" if groups else "")


def _column_line(name: str, column: Mapping[str, Any], total: int) -> str:
    texts = f": {_counts(column['texts'])}" if column["texts"] else ""
    more = f" ({column['different']:,} different)" if column["different"] > _MOST_ROWS else ""
    return f"column {_quoted(name, 40)}: {'/'.join(column['types'])} in {column['samples'] / total:.0%}{texts}{more}"


def _quoted(text: str, most: int = 60) -> str:
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return f"'{safe_text(cut)}'".replace("\n", " ")


def _counts(counts: Mapping[str, int]) -> str:
    few = ", ".join(f"{_quoted(name, 40)[1:-1]} {count:,}" for name, count in list(counts.items())[:_MOST_ROWS])
    return few + (f" and {len(counts) - _MOST_ROWS} more" if len(counts) > _MOST_ROWS else "") or "–"


def inspect_url(url: str, samples: int, out: Path | None, workers: int | None) -> tuple[dict[str, Any], Group]:
    """Statistics of `samples` random samples, as data and as text; writes a contact sheet to `out` if given."""
    source, workers = _opened(url, workers)
    with counting("samples") as report:
        found = inspect(source, sorted_numbers(source, samples), workers, report)
    text = statistics(found)
    if out is not None:
        chosen = _cards(source, sample_numbers(source, min(samples, _ON_A_SHEET)), workers)
        lead = f"{len(chosen):,} of {len(source):,} samples, drawn at random."
        write_sheet(out, shown_url(url), _credited(lead, url), [Section("", chosen), *_alike(source, found, workers)])
        text.renderables.append(Text(f"contact sheet: {safe_text(str(out))}"))
    return found, text


def _cards(source: Source, numbers: Sequence[int], workers: int) -> list[Card]:
    with counting("pictures of the sheet") as report:
        return cards(source, numbers, workers, report)


def _credited(lead: str, url: str) -> str:
    """The introduction of a contact sheet, with the attribution that the licence of its pictures requires."""
    return " ".join([lead, *filter(None, [attribution(url)])])


def _alike(source: Source, found: Mapping[str, Any], workers: int) -> list[Section]:
    """The groups of pictures that look alike, for the user to judge."""
    groups = found["pictures"]["alike"]["largest"]
    keys = {key for group in groups for key in group["keys"]}
    numbers = {source.key(n): n for n in range(len(source)) if source.key(n) in keys} if keys else {}
    return [
        Section(f"{group['times']:,} that look alike", _cards(source, [numbers[key] for key in group["keys"]], workers))
        for group in groups
    ]


def replay_ledger(url: str, ledger: Path, out: Path | None, workers: int | None) -> tuple[dict[str, Any], Group]:
    """The samples listed in a run's ledger, as data and as text; writes a contact sheet of them to `out` if given."""
    entries = read_ledger(ledger)
    source, workers = _opened(url, workers)
    named = locate_entries(source, entries)
    notes = named.notes.values()
    named_cards = [
        with_notes(card, own) for card, own in zip(_cards(source, list(named.notes), workers), notes, strict=True)
    ]
    total = f"{len(named_cards):,} samples listed in {len(entries):,} entries of the ledger"
    if named.gone:
        total += f"; {named.gone:,} more are no longer in their shards"
    if named.elsewhere:
        total += f"; {named.elsewhere:,} more are in shards of another source"
    if out is not None:
        write_sheet(out, shown_url(url), _credited(f"{total}.", url), [Section("", named_cards)])
    found = {
        "source": shown_url(url),
        "samples": [
            {"shard": c.shard, "key": c.key, "offset": c.offset, "ledger": list(c.notes), "now": c.fault or None}
            for c in named_cards
        ],
        "gone": named.gone,
        "elsewhere": named.elsewhere,
    }
    sheet = [Text(f"contact sheet: {safe_text(str(out))}")] if out is not None else []
    return found, Group(*(Text(card_lines(card)) for card in named_cards), Text(total), *sheet)


def _opened(url: str, workers: int | None) -> tuple[Source, int]:
    workers = workers or enough_workers(url)
    with counting("shards") as report:
        return open_indexed(url, workers, report), workers


def card_lines(card: Card) -> str:
    """Lines about a sample of a ledger: where it lies, the recorded reasons, and what is wrong with it now."""
    now = f"now: {card.fault}" if card.fault else "now: it can be used"
    what = [*card.notes, *([] if card.fault in card.notes else [now])]
    return "\n  ".join(safe_text(line) for line in (f"{card.shard} at byte {card.offset}: {shown(card.key)}", *what))
