"""Read, check and split preference data (`load_pairs`), then tokenise it (`render_pairs`).

Every row is either on a side or in dropped.parquet with its reason, so that

    read = train + heldout + test + prompts + Σ reasons

Files are sorted by (prompt_id, pair_id), so their bytes do not depend on the order of the source rows.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.differences import COLUMNS
from sera_core.data.formats import Reading
from sera_core.data.loading import (
    Read,
    read_pairs,
    read_prompts,
    refuse_unmapped,
    repeated_prompts_warning,
    special_tokens_warning,
)
from sera_core.data.preferences import (
    Drop,
    Message,
    drop_degenerate,
    drop_repeated_prompts,
    sort_key,
    under_both_labels,
)
from sera_core.data.sources import read_source
from sera_core.data.splitting import flip_labels, groups_of, remove_overlap, share, split_groups, subset
from sera_core.errors import InputError
from sera_core.method.panel import COLUMN, column_difference

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer

LOG = logging.getLogger("sera.data")
PAIR_SIDES = ("train", "heldout", "test")
FILES = [
    "train.parquet",
    "heldout.parquet",
    "test.parquet",
    "prompts.parquet",
    "dropped.parquet",
    "flipped.json",
]
ANSWER_IDS = ("chosen_ids", "rejected_ids")
IDS = ("prompt_ids", *ANSWER_IDS)
ROWS_AT_ONCE = 256
Row = dict[str, Any]

# ------------------------------------------------------------------------------------------------------- data


def load_pairs(attempt: Attempt) -> list[str]:
    """Read the sources, refuse malformed rows, drop degenerate pairs, and split the rest into sides."""
    fields = attempt.fields
    dropped: list[Drop] = []
    attempt.metrics |= {"formats": {}, "repeated_prompts": 0}
    unmapped: list[set[str]] = []
    given: dict[str, list[Any]] = {
        side: _read_side(attempt, side, dropped, unmapped) for side in (*PAIR_SIDES, "prompts")
    }
    refuse_unmapped("data.columns", _reading(fields).columns, set.intersection(*unmapped))
    if count := attempt.metrics["repeated_prompts"]:
        LOG.warning(repeated_prompts_warning(count))
    sides = _divide(_apart(given, fields["on_overlap"], dropped), fields)
    _limit(sides, fields, dropped)
    _refuse_empty(sides, fields, dropped)
    attempt.metrics["both_labels"] = len(under_both_labels(sides["train"])) // 2
    sides["train"], flipped = flip_labels(sides["train"], fields["flip_fraction"], fields["split_seed"])

    columns = _write_columns(attempt, sides)
    for side in PAIR_SIDES:
        rows = [pair.row for pair in sorted(sides[side], key=sort_key)]
        schema.write_table(schema.from_rows(schema.PAIRS, rows), attempt.write(f"{side}.parquet"))
    prompts = [{"prompt_id": p.prompt_id, "prompt": p.prompt} for p in sorted(sides["prompts"], key=sort_key)]
    schema.write_table(schema.from_rows(schema.PROMPTS, prompts), attempt.write("prompts.parquet"))
    _write_dropped(
        attempt, [_ledger_row("data", d.side, d.item.pair_id, d.item.prompt_id, d.reason) for d in dropped]
    )
    attempt.write("flipped.json").write_text(json.dumps(flipped, indent=1) + "\n")
    _count(attempt, sides, [drop.reason for drop in dropped])
    _measure_groups(attempt, sides, len(flipped))
    return [*FILES, *columns]


def _write_columns(attempt: Attempt, sides: Mapping[str, Sequence[Any]]) -> list[str]:
    """Write the user's columns that the panel names: chosen less rejected, of the pairs of all sides.

    Raises:
        InputError: a value is missing or no number, or a column is the same for both answers of every pair.
    """
    if not (names := attempt.fields.get("values")):
        return []
    pairs = {pair.pair_id: pair for side in PAIR_SIDES for pair in sorted(sides[side], key=sort_key)}
    found: dict[str, Any] = {"pair_id": list(pairs)}
    for name in names:
        chosen, rejected = zip(*(pair.values[name] for pair in pairs.values()), strict=True)
        try:
            found[name] = column_difference(name, chosen, rejected)
        except InputError as error:
            raise InputError(
                f"decide.panel, {COLUMN}{name} (read from {name}_chosen and {name}_rejected): {error}"
            ) from error
    schema.write_table(pa.table(found), attempt.write(COLUMNS))
    return [COLUMNS]


def _read_side(attempt: Attempt, side: str, dropped: list[Drop], unmapped: list[set[str]]) -> list[Any]:
    """Distinct pairs (or prompts) of one side's sources; updates the counts and metrics."""
    items: list[Any] = []
    formats = Counter[str]()
    sources = attempt.spec.where["sources"][side]
    for path, source in zip(sources, attempt.fields[side], strict=True):
        read = _read_source(attempt, side, path, source)
        formats += read.formats
        unmapped.append(read.unmapped)
        attempt.metrics["repeated_prompts"] += read.repeated_prompts
        dropped += read.dropped
        taken, rest = share(read.items, source["weight"], attempt.fields["split_seed"])
        dropped += [Drop(side, item, "not_drawn") for item in rest]
        items += taken
    if formats:
        attempt.metrics["formats"][side] = dict(sorted(formats.items()))
    if side == "prompts":
        kept, repeated = drop_repeated_prompts(items)
    else:
        kept, repeated = drop_degenerate(side, items, attempt.fields["on_equal"])
    dropped += repeated
    return kept


def _read_source(attempt: Attempt, side: str, path: str, source: Mapping[str, Any]) -> Read:
    digest, rows = read_source(path, source["split"])
    if digest != source["digest"]:
        raise InputError(
            f"data.{side}: {path} changed during the run (digest {digest[:12]}…, at the start "
            f"{source['digest'][:12]}…); do not modify the file, and run again"
        )
    attempt.counts["read"] += len(rows)
    read = read_prompts if side == "prompts" else read_pairs
    return read(path, rows, _reading(attempt.fields), side)


def _reading(fields: Mapping[str, Any]) -> Reading:
    names = ("format", "columns", "completions", "on_diverge", "on_bad_row")
    values = tuple(fields.get("values", ()))
    return Reading(seed=fields["split_seed"], values=values, **{name: fields[name] for name in names})


def _apart(given: dict[str, list[Any]], on_overlap: str, dropped: list[Drop]) -> dict[str, list[Any]]:
    """Remove shared prompts between the given sides: from held-out if in test, from train if in any other."""
    for side, names in (
        ("heldout", ("test",)),
        ("prompts", ("heldout", "test")),
        ("train", ("heldout", "test", "prompts")),
    ):
        others = {name: given[name] for name in names}
        given[side], overlap = remove_overlap(given[side], others, side=side, on_overlap=on_overlap)
        dropped += overlap
    return given


def _divide(given: dict[str, list[Any]], fields: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Split held-out and test sides off train, unless they are given."""
    if not given["train"]:
        return given
    fractions = {side: 0.0 if fields[side] else fields[f"{side}_fraction"] for side in ("heldout", "test")}
    if fractions["heldout"] > 0 and len(groups_of(given["train"])) == 1:
        raise InputError(
            "data.train: all pairs have the same prompt and must stay on one side, so none can be held out; "
            "set data.heldout, or add pairs with other prompts"
        )
    split = split_groups(given["train"], fractions["heldout"], fractions["test"], fields["split_seed"])
    given["train"] = split["train"]
    given["heldout"] += split["heldout"]
    given["test"] += split["test"]
    return given


def _limit(sides: dict[str, list[Any]], fields: Mapping[str, Any], dropped: list[Drop]) -> None:
    for side in ("train", "heldout"):
        limit = fields[f"{side}_pairs"]
        if limit is not None:
            sides[side], rest = subset(sides[side], limit, fields["split_seed"], "limit")
            dropped += [Drop(side, pair, "over_limit") for pair in rest]


def _refuse_empty(
    sides: Mapping[str, Sequence[Any]], fields: Mapping[str, Any], dropped: Sequence[Drop]
) -> None:
    """Refuse a side that was given but has no usable row."""
    for side, items in sides.items():
        if fields[side] and not items:
            why = Counter(drop.reason for drop in dropped if drop.side == side)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(why.items()))
            raise InputError(f"data.{side}: no row is left ({reasons}); correct the rows or the settings")


def _measure_groups(attempt: Attempt, sides: Mapping[str, Sequence[Any]], flipped: int) -> None:
    groups = {side: groups_of(items) for side, items in sides.items()}
    attempt.metrics["groups"] = {side: len(held) for side, held in groups.items()}
    others = groups["heldout"] | groups["test"] | groups["prompts"]
    attempt.metrics["groups_shared_with_train"] = len(groups["train"] & others)
    attempt.metrics["flipped"] = flipped


# ----------------------------------------------------------------------------------------------------- shared


def _ledger_row(step: str, side: str, pair_id: str | None, prompt_id: str, reason: str) -> dict[str, Any]:
    """A ledger row; its stage is the step's name, followed by the side unless that is train."""
    stage = step if side == "train" else f"{step}_{side}"
    row = {"pair_id": pair_id, "prompt_id": prompt_id, "stage": stage, "reason": reason}
    return row | {"origin": "human", "round": 0, "kept": False}


def _write_dropped(attempt: Attempt, rows: Iterable[Mapping[str, Any]]) -> None:
    columns = ("stage", "reason", "prompt_id", "pair_id")
    ordered = sorted(rows, key=lambda row: tuple(row[name] or "" for name in columns))
    schema.write_table(schema.from_rows(schema.LEDGER, ordered), attempt.write("dropped.parquet"))


def _count(attempt: Attempt, sides: Mapping[str, Sequence[Any]], reasons: Iterable[str]) -> None:
    attempt.counts.update({side: len(items) for side, items in sides.items()})
    attempt.counts.update(reasons)


# ----------------------------------------------------------------------------------------------------- render


def render_pairs(attempt: Attempt) -> list[str]:
    """Tokenise every side, and drop (or cut) rows that are too long, empty or equal as tokens.

    prompts.parquet has the prompts for sampling: each distinct train prompt, and prompt-only rows.
    """
    from sera_core.data.rendering import Renderer

    data = attempt.input("data")
    arguments = attempt.fields.get("template_kwargs")
    renderer = Renderer(attempt.input("model").folder("policy"), arguments=arguments)
    attempt.metrics |= {"cut": 0, "sides": {}, "special_tokens": 0}
    dropped: list[Row] = []
    sides: dict[str, list[Row]] = {}
    for side in (*PAIR_SIDES, "prompts"):
        rows = list(schema.iter_rows(data.path(f"{side}.parquet")))
        attempt.counts["read"] += len(rows)
        sides[side] = _render_side(attempt, renderer, side, rows, dropped)

    for side in PAIR_SIDES:
        schema.write_table(schema.from_rows(schema.PAIRS, sides[side]), attempt.write(f"{side}.parquet"))
    prompts = _sampled_from(sides["train"], sides["prompts"])
    schema.write_table(schema.from_rows(schema.PROMPTS, prompts), attempt.write("prompts.parquet"))
    _write_dropped(attempt, [*schema.iter_rows(data.path("dropped.parquet")), *dropped])
    attempt.write("flipped.json").write_bytes(data.path("flipped.json").read_bytes())
    _count(attempt, sides, [row["reason"] for row in dropped])
    attempt.metrics["sampled_from"] = len(prompts)
    if count := attempt.metrics["special_tokens"]:
        LOG.warning(special_tokens_warning(count))
    return FILES


def _render_side(
    attempt: Attempt, renderer: "Renderer", side: str, rows: Sequence[Row], dropped: list[Row]
) -> list[Row]:
    """The side's usable rows with token ids; the others go to `dropped` with their reason."""
    kept, reasons = [], Counter[str]()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        attempt.progress(start, len(rows), f"{side} rows")
        for row in _with_ids(renderer, rows[start : start + ROWS_AT_ONCE]):
            attempt.metrics["special_tokens"] += renderer.spells_special_tokens(_texts(row))
            reason = _unusable(attempt, renderer, row)
            if reason is None:
                kept.append(
                    row | {name: np.asarray(row[name], dtype=np.int32) for name in IDS if name in row}
                )
            else:
                reasons[reason] += 1
                dropped.append(_ledger_row("render", side, row.get("pair_id"), row["prompt_id"], reason))
    attempt.progress(len(rows), len(rows), f"{side} rows")
    attempt.metrics["sides"][side] = {"read": len(rows), "kept": len(kept), **reasons}
    return kept


def _texts(row: Row) -> list[Message]:
    return [message for name in ("prompt", "chosen", "rejected") for message in row.get(name) or ()]


def _with_ids(renderer: "Renderer", rows: Sequence[Row]) -> list[Row]:
    """Pairs or prompts with their token ids, of any length."""
    if "pair_id" not in rows[0]:
        return [_with_prompt_ids(renderer, row) for row in rows]
    try:
        rendered = zip(*renderer.render_pairs(rows), strict=True)
    except InputError:
        _name_the_pair(renderer, rows)
        raise
    return [row | dict(zip(IDS, ids, strict=True)) for row, ids in zip(rows, rendered, strict=True)]


def _with_prompt_ids(renderer: "Renderer", row: Row) -> Row:
    try:
        return row | {"prompt_ids": renderer.prompt_ids(row["prompt"])}
    except InputError as error:
        raise InputError(f"prompt {row['prompt_id']}: {error}") from error


def _name_the_pair(renderer: "Renderer", rows: Sequence[Row]) -> None:
    """Raise an error that names the pair which the chat template rejects."""
    for row in rows:
        try:
            renderer.render_pairs([row])
        except InputError as error:
            raise InputError(f"pair {row['pair_id']}: {error}") from error


def _unusable(attempt: Attempt, renderer: "Renderer", row: Row) -> str | None:
    """Reason why a tokenised row is unusable, or None; cuts long answers."""
    fields = attempt.fields
    if len(row["prompt_ids"]) > fields["max_prompt_tokens"]:
        return "prompt_too_long"
    if "pair_id" not in row:
        return None
    if any(row[name][:1] in ([], [renderer.end_of_turn_id]) for name in ANSWER_IDS):
        return "empty"
    limit = fields["max_response_tokens"]
    long = [name for name in ANSWER_IDS if len(row[name]) > limit]
    if long and fields["on_long"] == "drop":
        return "too_long"
    for name in long:
        row[name] = row[name][:limit]
    if row["chosen_ids"] == row["rejected_ids"]:
        _refuse_equal(row, fields["on_equal"], bool(long))
        return "equal"
    attempt.metrics["cut"] += len(long)
    return None


def _refuse_equal(row: Row, on_equal: str, cut: bool) -> None:
    if on_equal == "refuse":
        after = " after the cut at data.max_response_tokens" if cut else ""
        length = len(row["prompt"][-1]["content"])  # not the text itself: Prefect shows the message
        raise InputError(
            f"pair {row['pair_id']} (its prompt ends in a message of {length:,} characters): chosen and "
            f'rejected are the same tokens{after}; remove the row, or set data.on_equal = "drop"'
        )


def _sampled_from(train: Sequence[Row], prompts: Sequence[Row]) -> list[Row]:
    distinct = {row["prompt_id"]: row for row in (*train, *prompts)}
    names = ("prompt_id", "prompt", "prompt_ids")
    return [{name: distinct[key][name] for name in names} for key in sorted(distinct)]
