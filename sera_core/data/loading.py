"""Read a source into pairs or prompts: detect each row's format, and collect unusable rows by kind."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sera_core.data.formats import (
    Reading,
    TiedCompletionsError,
    conversation_form,
    holds_prompt,
    normal_form,
)
from sera_core.data.parsing import KINDS, BadRowError, parse_conversation, parse_pair, parse_prompt
from sera_core.data.preferences import Drop, Pair, Prompt, Unread
from sera_core.data.sources import Row
from sera_core.data.splitting import CONVERSATIONS
from sera_core.errors import InputError

NAMED = 10
"""Maximum rows of a kind in an error message."""


@dataclass
class Read:
    """Result of reading a source.

    Attributes:
        items: the pairs or prompts, in the source's order.
        dropped: unusable rows, with the reason `tied_ratings` or a kind of `parsing.KINDS`.
        formats: number of rows by format.
        repeated_prompts: number of pairs whose answers both begin with the prompt's text.
        unmapped: names in `Reading.columns` that no row has.
    """

    items: list[Any] = field(default_factory=list)
    dropped: list[Drop] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    repeated_prompts: int = 0
    unmapped: set[str] = field(default_factory=set)


def read_pairs(name: str, rows: Sequence[Row], reading: Reading, side: str = "train") -> Read:
    """Pairs of a source's rows.

    Args:
        name: the source, for messages.
        rows: rows from `sources.read_source`.
        reading: how to read them.
        side: recorded for the dropped rows.

    Raises:
        InputError: a row cannot be used (with on_bad_row = "drop": cannot be read at all).
    """
    normal = _normal_rows(rows, reading, side)
    implicit = not any(holds_prompt(row.data) for row in normal.items)
    read = _parsed(name, normal, reading, side, lambda row: _pair_of(row, reading, implicit))
    read.repeated_prompts = sum(map(_repeats_prompt, read.items))
    return read


def _pair_of(row: Row, reading: Reading, implicit: bool) -> Pair:
    pair = parse_pair(row, reading.on_diverge, implicit)
    if not reading.values:
        return pair
    values = {
        name: (row.data.get(f"{name}_chosen"), row.data.get(f"{name}_rejected")) for name in reading.values
    }
    return replace(pair, values=values)


def read_prompts(name: str, rows: Sequence[Row], reading: Reading, side: str = "prompts") -> Read:
    """Prompts of a source's rows, which are prompt-only rows or pairs.

    Arguments and errors as in `read_pairs`.
    """
    normal = _normal_rows(rows, reading, side)
    return _parsed(name, normal, reading, side, lambda row: _prompt_of(row, reading))


def _prompt_of(row: Row, reading: Reading) -> Prompt:
    if holds_prompt(row.data) or row.data.get("chosen") is None or row.data.get("rejected") is None:
        return parse_prompt(row)
    return Prompt(parse_pair(row, reading.on_diverge).prompt, row.where)


def read_conversations(name: str, rows: Sequence[Row], reading: Reading, side: str = CONVERSATIONS) -> Read:
    """Conversations of a source's rows, each as one `Prompt` that ends with an answer.

    Arguments and errors as in `read_pairs`.
    """
    normal = Read()
    for row in rows:
        held_in, found = conversation_form(row, reading)
        normal.formats[held_in] += 1
        normal.items.append(found)
    return _parsed(name, normal, reading, side, parse_conversation)


def _normal_rows(rows: Sequence[Row], reading: Reading, side: str) -> Read:
    read = Read()
    read.unmapped = {
        theirs for theirs in reading.columns.values() if not any(theirs in row.data for row in rows)
    }
    for row in rows:
        try:
            found, normal = normal_form(row, reading)
        except TiedCompletionsError:
            read.dropped.append(Drop(side, Unread(row), "tied_ratings"))
            read.formats["ultrafeedback"] += 1
            continue
        read.formats[found] += 1
        read.items.append(normal)
    return read


def refuse_unmapped(where: str, columns: Mapping[str, str], unmapped: Iterable[str]) -> None:
    """Refuse a mapping to a column that no source has: it is probably a typo.

    Raises:
        InputError: there is one; the message names it.
    """
    for ours, theirs in columns.items():
        if theirs in unmapped:
            raise InputError(f"{where}: {ours} is mapped to {theirs!r}, a column that no row has; correct it")


def _parsed(
    name: str, normal: Read, reading: Reading, side: str, parse: Callable[[Row], Pair | Prompt]
) -> Read:
    read = Read(dropped=normal.dropped, formats=normal.formats, unmapped=normal.unmapped)
    bad: dict[str, list[str]] = {}
    for row in normal.items:
        try:
            read.items.append(parse(row))
        except BadRowError as error:
            bad.setdefault(error.kind, []).append(str(error))
            read.dropped.append(Drop(side, Unread(row), error.kind))
    if bad and reading.on_bad_row == "refuse":
        raise InputError(_refusal(name, bad, normal.formats))
    return read


def _refusal(name: str, bad: Mapping[str, Sequence[str]], formats: Mapping[str, int]) -> str:
    """The error message: count and first rows of each kind, and what to do."""
    remedy = 'or set data.on_bad_row = "drop" (--on-bad-row drop) to leave such rows out'
    count = sum(map(len, bad.values()))
    if count == 1:
        ((only,),) = bad.values()
        return f"{only}; {remedy}"
    lines = [f"{name}: {count:,} rows cannot be used (read as {format_counts(formats)}):"]
    for kind, messages in sorted(bad.items()):
        more = f", the first {NAMED}" if len(messages) > NAMED else ""
        lines.append(f"  {kind}: {KINDS[kind]}, {len(messages):,} rows{more}:")
        lines += [f"    {message}" for message in messages[:NAMED]]
    return "\n".join([*lines, f"correct them, {remedy}"])


def format_counts(formats: Mapping[str, int]) -> str:
    """`1,200 rows as hh, 3 as preference`."""
    ordered = sorted(formats.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count:,} rows as {name}" for name, count in ordered) or "no row"


def _repeats_prompt(pair: Pair) -> bool:
    """Whether both answers begin with the prompt's text, so that the template would write it twice."""
    said = pair.prompt[-1]["content"].strip()
    return all(answer[0]["content"].lstrip().startswith(said) for answer in (pair.chosen, pair.rejected))


def repeated_prompts_warning(count: int) -> str:
    """The warning for pairs whose answers repeat the prompt."""
    return (
        f"warning: in {count:,} pairs chosen and rejected both begin with the prompt's text, so the chat "
        "template writes it twice; remove it from the answers"
    )


def special_tokens_warning(count: int) -> str:
    """The warning for rows that contain special tokens."""
    return (
        f"warning: {count:,} rows contain special tokens of the tokenizer, which are read as plain text; if "
        "a chat template was already applied to the data, use the data without it"
    )
