"""Parquet schemas of all artifacts. Log-probabilities are in nats, float64, summed over the response."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MESSAGE = [("role", pa.string()), ("content", pa.string())]
MESSAGES = pa.list_(pa.struct(_MESSAGE))
REASONED = pa.list_(pa.struct([*_MESSAGE, ("reasoning_content", pa.string())]))
"""MESSAGES in files where any message has separate reasoning content; null for messages without it."""
IDS = pa.list_(pa.int32())
NATS = pa.float64()
ROW_GROUP = 1024
"""Rows written together, where a row may have long texts."""
_REPEATED = (
    "format",
    "origin",
    "round",
    "stage",
    "kept",
    "reason",
    "finish_reason",
    "order",
    "better",
    "rater",
)
"""Columns with few different values."""

_PAIR = [
    ("pair_id", pa.string()),
    ("prompt_id", pa.string()),
    ("format", pa.string()),
    ("prompt", MESSAGES),
    ("chosen", MESSAGES),
    ("rejected", MESSAGES),
    ("prompt_ids", IDS),
    ("chosen_ids", IDS),
    ("rejected_ids", IDS),
    ("origin", pa.string()),
    ("round", pa.int32()),
]
PAIRS = pa.schema(_PAIR)
MIXTURE = pa.schema([*_PAIR, ("ref_chosen_logps", NATS), ("ref_rejected_logps", NATS)])
PROMPTS = pa.schema([("prompt_id", pa.string()), ("prompt", MESSAGES), ("prompt_ids", IDS)])
"""Prompts available for sampling, one row each."""
CONVERSATIONS = pa.schema([("conversation_id", pa.string()), ("messages", MESSAGES)])
"""Conversations for supervised fine-tuning, each ending with an answer."""
IGNORED = -100
"""Label of a token that the loss leaves out."""
EXAMPLES = pa.schema([("conversation_id", pa.string()), ("ids", IDS), ("labels", IDS)])
"""The same as token ids. `labels` are the ids of the answers' tokens, and IGNORED elsewhere."""
LOGPS = pa.schema([("id", pa.string()), ("logps", NATS), ("tokens", pa.int32())])
"""Log-probabilities of responses; `id` is the response's key (see `tasks.scoring.response_key`)."""
RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("response_ids", IDS),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("policy_logps", NATS),
        ("ref_logps", NATS),
        ("past_logps", pa.list_(NATS)),
        ("past_ref_logps", pa.list_(NATS)),
        ("reward", NATS),
        ("ensemble_reward", NATS),
    ]
)
PAIR_SAMPLES = pa.schema(
    [("pair_id", pa.string()), ("chosen_sample", pa.int32()), ("rejected_sample", pa.int32())]
)
"""The two samples that make up a generated pair."""
SCORED = pa.schema(
    [
        ("pair_id", pa.string()),
        ("policy_chosen_logps", NATS),
        ("policy_rejected_logps", NATS),
        ("ref_chosen_logps", NATS),
        ("ref_rejected_logps", NATS),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("chosen_reward", NATS),
        ("rejected_reward", NATS),
        ("margin", NATS),
        ("ensemble_margin", NATS),
    ]
)
LEDGER = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("origin", pa.string()),
        ("round", pa.int32()),
        ("stage", pa.string()),
        ("ensemble_margin", NATS),
        ("rank", pa.int32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)
_NARROW = (LEDGER, SCORED)
"""Schemas whose rows are numbers and ids, so that many of them may be in memory."""
RATINGS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("rating", NATS),
        ("failure", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("rater", pa.string()),
    ]
)
"""A rater's ratings of responses, in the responses' order and the rater's own unit; null where it was not
asked (no text, or cut) or failed. `rater`: who gave a rating that was read from a file."""
HARNESS = pa.schema([("task", pa.string()), ("item", pa.int32()), ("score", pa.float64())])
"""Scores in [0, 1] on capability tasks; `item` is its number in the task's data."""
VERDICTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("pair_id", pa.string()),
        ("sample", pa.int32()),
        ("order", pa.string()),
        ("asked", pa.bool_()),
        ("better", pa.string()),
        ("failure", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("first_words", pa.int32()),
        ("second_words", pa.int32()),
    ]
)
"""A judge's verdicts, two rows for each comparison. `order`: `given` shows the first answer (of the judged
round, or the chosen one) as A, `swapped` as B. `better`: A, B or tie, null with a `failure`. `asked`: false
where both answers are the same text. `pair_id` is null for answers of two rounds, `sample` for pairs. Lengths
are in words."""


def table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """A table with exactly the schema's columns; missing columns are filled with null.

    Args:
        columns: values by name: arrow's, numpy's, or any sequence.
    """
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise KeyError(f"columns {sorted(unknown)} are not in the schema {schema.names}")
    rows = len(next(iter(columns.values())))
    arrays = [
        _array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, type=f.type) for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    held = isinstance(values, pa.Array | pa.ChunkedArray)
    return values.cast(kind) if held else pa.array(values, type=kind)


def from_rows(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table from dictionaries; missing values become null.

    Messages have the type MESSAGES, or REASONED if any of them has reasoning.
    """
    names = [field.name for field in schema if field.type == MESSAGES]
    messages = (message for row in rows for name in names for message in row.get(name) or ())
    if any(message.get("reasoning_content") for message in messages):
        schema = reasoned(schema)
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def reasoned(schema: pa.Schema) -> pa.Schema:
    """The schema with messages of type REASONED."""
    return pa.schema([pa.field(f.name, REASONED if f.type == MESSAGES else f.type) for f in schema])


def as_held(schema: pa.Schema, *held: pa.Schema) -> pa.Schema:
    """The schema, with messages of type REASONED if any schema in `held` has them."""
    return reasoned(schema) if any(_has_reasoning(field.type) for one in held for field in one) else schema


def _has_reasoning(kind: pa.DataType) -> bool:
    messages = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
    return messages and kind.value_type.get_field_index("reasoning_content") >= 0


def row_group(schema: pa.Schema) -> int:
    """Rows of a row group of a table with this schema."""
    return 16 * ROW_GROUP if any(schema.equals(one) for one in _NARROW) else ROW_GROUP


def open_writer(path: Path, schema: pa.Schema, rows: int) -> pq.ParquetWriter:
    """A writer of parquet whose bytes depend only on the content: zstd, no host data.

    A table of more than ROW_GROUP rows is written without statistics, which nothing reads, and with
    dictionaries only where they make it smaller; both cost more time than to compress it.

    Args:
        rows: rows of the table, as far as they are known: only whether they are more than ROW_GROUP matters.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fast: dict[str, Any] = {"write_statistics": False, "use_dictionary": _dictionaries(schema)}
    return pq.ParquetWriter(
        path, schema, compression="zstd", store_schema=False, **(fast if rows > ROW_GROUP else {})
    )


def _dictionaries(schema: pa.Schema) -> list[str]:
    """Columns written with a dictionary, by their paths in parquet: few values, or token ids."""
    return [
        f"{field.name}.list.element" if field.type == IDS else field.name
        for field in schema
        if field.name in _REPEATED or field.type == IDS
    ]


def write_table(data: pa.Table, path: Path) -> None:
    """Write a table by `open_writer`, in row groups of `row_group` rows."""
    size = row_group(data.schema)
    with open_writer(path, data.schema, data.num_rows) as writer:
        for start in range(0, max(1, data.num_rows), size):
            writer.write_table(data.slice(start, size).combine_chunks(), row_group_size=size)


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read parquet; with a schema, the file must have exactly its columns."""
    data = pq.read_table(path)
    return data if schema is None else data.select(schema.names).cast(as_held(schema, data.schema))


def iter_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file as dictionaries, one row group in memory at a time."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=list(columns) if columns else None).to_pylist()
