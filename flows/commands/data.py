"""`sera data`: what a preference file holds, before a run reads it."""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flows.commands.capability_inputs import (
    InputPair,
    PairIds,
    count_reasons,
    find_policy,
    open_renderer,
    policy_folder,
    reading_from_flags,
    refuse_empty,
    tokenize_pairs,
)
from flows.commands.output import check_output, print_result, quiet_stdout, write_output
from sera_core.artifacts import schema
from sera_core.data import loading
from sera_core.data.differences import last_text
from sera_core.data.look import Lengths, chosen_has_more, lengths, text_differences
from sera_core.data.preferences import Drop, Pair, Unread, drop_degenerate, under_both_labels
from sera_core.data.sources import read_rows
from sera_core.errors import InputError
from sera_core.method.estimates import Estimate
from sera_core.method.features import words_of
from sera_core.method.panel import TOKENS
from sera_core.reporting.words import REASONS

PARTS = ("prompt", "chosen", "rejected")
SHOWN_CHARACTERS = 600
"""Of a text that is printed."""


@dataclass(frozen=True)
class _AsRead:
    """The pairs as a model reads them, or as plain text."""

    unit: str
    counts: dict[str, list[int]]
    """Length of each prompt, chosen and rejected answer, in units."""
    texts: Sequence[tuple[str, ...]]
    """The first pairs: prompt, chosen, rejected."""
    special_tokens: int = 0
    """Pairs that contain special tokens of the tokenizer as text."""


def data(args: argparse.Namespace) -> int:
    """Show what a preference file holds."""
    _check(args)
    rows = read_rows(args.file)
    reading = reading_from_flags(args)
    read = loading.read_pairs(args.file, rows, reading)
    loading.refuse_unmapped("--columns", reading.columns, read.unmapped)
    kept, degenerate = drop_degenerate("train", read.items)
    dropped = [*read.dropped, *degenerate]
    refuse_empty(args.file, kept, dropped)
    wanted = {id(pair) for pair in kept}
    pairs = [pair for pair in read.items if id(pair) in wanted]  # in the file's order
    as_read = _by_model(args, pairs) if args.model else _as_text(pairs, args.show)
    differences = text_differences(pairs)
    if args.model:
        chosen, rejected = (np.array(as_read.counts[side], dtype=np.float64) for side in PARTS[1:])
        differences = {TOKENS: chosen - rejected} | differences
    more = chosen_has_more(differences, [pair.prompt_id for pair in pairs])
    if args.out is not None:
        write_output(schema.from_rows(schema.PAIRS, [pair.row for pair in pairs]), args.out)
    _print(args, read, pairs, dropped, as_read, more)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.show < 0:
        raise InputError(f"--show {args.show}: must be 0 or more")
    if not args.model and (args.chat_template or args.template_kwargs):
        raise InputError(
            "--chat-template, --template-kwargs: only with --model, whose tokenizer reads the text"
        )
    if args.out is not None:
        check_output(args.out, args.force)


def _as_text(pairs: Sequence[Pair], shown: int) -> _AsRead:
    counts = {
        part: [sum(len(words_of(message["content"])) for message in getattr(pair, part)) for pair in pairs]
        for part in PARTS
    }
    texts = [
        (
            "\n".join(f"{message['role']}: {message['content']}" for message in pair.prompt),
            last_text(pair.chosen, "assistant"),
            last_text(pair.rejected, "assistant"),
        )
        for pair in pairs[:shown]
    ]
    return _AsRead("words", counts, texts)


def _by_model(args: argparse.Namespace, pairs: Sequence[Pair]) -> _AsRead:
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folder = policy_folder("--model", find_policy("--model", args.model), Path(scratch) / "model")
        renderer = open_renderer("--model", folder, args.chat_template, args.template_kwargs)
        ids: list[PairIds] = tokenize_pairs(renderer, [InputPair(pair, None) for pair in pairs])
        texts = [
            tuple(str(renderer.tokenizer.decode(list(part), skip_special_tokens=False)) for part in row)
            for row in ids[: args.show]
        ]
        special = sum(
            renderer.spells_special_tokens([*pair.prompt, *pair.chosen, *pair.rejected]) for pair in pairs
        )
    counts = {part: [len(row[number]) for row in ids] for number, part in enumerate(PARTS)}
    return _AsRead(TOKENS, counts, texts, special)


# ------------------------------------------------------------------------------------------------- the output


def _print(
    args: argparse.Namespace,
    read: loading.Read,
    pairs: Sequence[Pair],
    dropped: Sequence[Drop],
    as_read: _AsRead,
    more: Mapping[str, Estimate],
) -> None:
    both = len(under_both_labels(pairs)) // 2
    sizes = {part: lengths(counts) for part, counts in as_read.counts.items()}
    value = {
        "file": args.file,
        "formats": dict(read.formats),
        "rows": read.formats.total(),
        "pairs": len(pairs),
        "prompts": len({pair.prompt_id for pair in pairs}),
        "dropped": count_reasons(dropped),
        "both_labels": both,
        "repeated_prompts": read.repeated_prompts,
        "special_tokens": as_read.special_tokens if args.model else None,
        "unit": as_read.unit,
        "lengths": {part: asdict(found) for part, found in sizes.items()},
        "chosen_has_more": {name: asdict(found) for name, found in more.items()},
        "shown": [dict(zip(PARTS, texts, strict=True)) for texts in as_read.texts],
        "out": None if args.out is None else str(args.out),
    }
    lines = [
        f"{args.file}: {loading.format_counts(read.formats)}",
        f"{len(pairs):,} pairs of {value['prompts']:,} prompts",
        *_dropped_lines(dropped),
        f"label conflicts: {both:,} pairs are there under both labels" if both else "label conflicts: none",
        *_warnings(read, as_read),
        "",
        *_length_lines(as_read.unit, sizes),
        "",
        *_feature_lines(more),
        *_text_lines(as_read.texts, of_model=bool(args.model)),
    ]
    if args.out is not None:
        lines += ["", f"{args.out}: {len(pairs):,} pairs written"]
    print_result(args, value, lines)


def _dropped_lines(dropped: Sequence[Drop]) -> Iterator[str]:
    counts = count_reasons(dropped)
    yield f"left out: {sum(counts.values()):,} rows" if counts else "left out: none"
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        first = next(drop.item for drop in dropped if drop.reason == reason)
        where = first.row.where if isinstance(first, Unread) else first.where
        yield f"  {count:>9,}  {reason}: {REASONS[reason]} (the first: {where})"


def _warnings(read: loading.Read, as_read: _AsRead) -> Iterator[str]:
    if read.repeated_prompts:
        yield loading.repeated_prompts_warning(read.repeated_prompts)
    if as_read.special_tokens:
        yield loading.special_tokens_warning(as_read.special_tokens)


def _length_lines(unit: str, sizes: Mapping[str, Lengths]) -> Iterator[str]:
    yield f"{'length in ' + unit:<18}{'median':>9}{'95 %':>9}{'longest':>9}"
    for part, found in sizes.items():
        yield f"  {part:<16}{found.median:>9,.0f}{found.p95:>9,.0f}{found.most:>9,}"


def _feature_lines(more: Mapping[str, Estimate]) -> Iterator[str]:
    yield "how often the chosen answer has more of it, where the two differ:"
    width = max(map(len, more))
    for name, found in more.items():
        if found.value is None:
            yield f"  {name:<{width}}  no answers differ"
            continue
        ends = "" if found.low is None or found.high is None else f" [{found.low:.0%}, {found.high:.0%}]"
        yield f"  {name:<{width}}  {found.value:>4.0%}{ends} of {found.pairs:,} pairs"
    yield "Far from 50 %, a policy can learn the feature instead of the preference."


def _text_lines(texts: Sequence[Sequence[str]], of_model: bool) -> Iterator[str]:
    for number, row in enumerate(texts, 1):
        yield ""
        yield f"pair {number}, as the model reads it:" if of_model else f"pair {number}:"
        for part, text in zip(PARTS, row, strict=True):
            cut = len(text) - SHOWN_CHARACTERS
            yield f"--- {part}"
            yield text if cut <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({cut:,} more characters)"
