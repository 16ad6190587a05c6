"""Log-probabilities of responses under one policy: each computed once, kept by shard, read by later steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.devices import device_of
from sera_core.policies import shared_policy
from sera_core.rewards import quantise

SHARD_ROWS = 128
"""Rows a shard: fixed, so that batches are formed from the same responses whatever the machine."""


@dataclass(frozen=True)
class Text:
    """One response to score: its key, its prompt's token ids and its own."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]


def score_texts(attempt: Attempt) -> list[str]:
    """Write logps.parquet: log π(y|x) of every response in a file of pairs or samples, in the file's order.

    The key of a pair's response is `<pair_id>/chosen` or `<pair_id>/rejected`, of a sample
    `<prompt_id>/<sample>`. A probe does so for a few rows alone, see `_score_probe`.
    """
    if "probe" in attempt.fields:
        return _score_probe(attempt)
    shards = _shards(attempt)
    parts = attempt.parts()
    policy = None
    for number, shard in list(enumerate(shards))[len(parts) :]:
        policy = policy or _load(attempt)
        done = sum(len(earlier) for earlier in shards[:number])
        parts.append(_score_shard(attempt, policy, number, shard, done, sum(map(len, shards))))
    _merge(attempt, parts)
    return ["logps.parquet"]


def _score_probe(attempt: Attempt) -> list[str]:
    """A few rows spread over the file, each response by the plain loop: what the others' noise is held to."""
    from sera_core.logprobs import plain_sequence_logps, score_tokens

    rows = _rows(attempt)
    picked = np.unique(np.linspace(0, len(rows) - 1, attempt.fields["probe"]).astype(int)) if rows else []
    texts = [text for row in picked for text in rows[row]]
    items = [(text.prompt_ids, text.response_ids) for text in texts]
    columns = {
        "id": [text.id for text in texts],
        "logps": quantise(plain_sequence_logps(_load(attempt), items)) if items else [],
        "tokens": [len(text.response_ids) for text in texts],
    }
    schema.write_table(schema.table(schema.LOGPS, columns), attempt.write("logps.parquet"))
    attempt.counts["responses"] = len(texts)
    attempt.metrics["tokens/probe"] = score_tokens(items)
    return ["logps.parquet"]


def _shards(attempt: Attempt) -> list[list[Text]]:
    """The responses in pieces of a fixed number of rows, in the file's (prompt_id) order."""
    rows = _rows(attempt)
    pieces = [rows[start : start + SHARD_ROWS] for start in range(0, len(rows), SHARD_ROWS)]
    return [[text for row in piece for text in row] for piece in pieces]


def _rows(attempt: Attempt) -> list[list[Text]]:
    """The responses of each row of the file: two of a pair, one of a sample."""
    name = attempt.fields["file"]
    path = attempt.input("texts").path(name)
    if name == "responses.parquet":
        rows = list(schema.iter_rows(path, ["prompt_id", "sample", "response_ids"]))
        prompts = _prompts(attempt)
        return [
            [Text(f"{r['prompt_id']}/{r['sample']}", prompts[r["prompt_id"]], r["response_ids"])]
            for r in rows
        ]
    rows = schema.iter_rows(path, ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    return [
        [Text(f"{r['pair_id']}/{side}", r["prompt_ids"], r[f"{side}_ids"]) for side in ("chosen", "rejected")]
        for r in rows
    ]


def _prompts(attempt: Attempt) -> dict[str, list[int]]:
    rendered = attempt.input("rendered")
    files = ("prompts.parquet", "heldout.parquet")
    rows: Iterator[dict[str, Any]] = (
        row for name in files for row in schema.iter_rows(rendered.path(name), ["prompt_id", "prompt_ids"])
    )
    return {row["prompt_id"]: row["prompt_ids"] for row in rows}


def _load(attempt: Attempt) -> Any:
    base = attempt.input("model").folder("policy")
    folder = attempt.input("policy").folder("policy")
    device = device_of(attempt.execution.device)
    return shared_policy(folder, attempt.fields["dtype"], device, base)


def _score_shard(
    attempt: Attempt, policy: Any, number: int, shard: Sequence[Text], done: int, total: int
) -> dict[str, Any]:
    from sera_core.logprobs import score_tokens, sequence_logps

    items = [(text.prompt_ids, text.response_ids) for text in shard]
    values = sequence_logps(
        policy,
        items,
        tokens_per_batch=attempt.execution.tokens_per_batch,
        progress=lambda scored, _: attempt.progress(done + scored, total, "responses"),
    )
    relative = f"part-{number:05d}.parquet"
    columns = {
        "id": [text.id for text in shard],
        "logps": quantise(values),
        "tokens": [len(text.response_ids) for text in shard],
    }
    schema.write_table(schema.table(schema.LOGPS, columns), attempt.write(relative))
    return attempt.commit_part(number, [relative], {"tokens": score_tokens(items)})


def _merge(attempt: Attempt, parts: Sequence[dict[str, Any]]) -> None:
    attempt.use_parts(list(parts))
    paths = [attempt.part_path(part, next(iter(part["files"]))) for part in parts]
    tables = [schema.read_table(path, schema.LOGPS) for path in paths]
    merged = pa.concat_tables(tables) if tables else schema.table(schema.LOGPS, {"id": []})
    schema.write_table(merged.combine_chunks(), attempt.write("logps.parquet"))
    attempt.counts["responses"] = merged.num_rows
    attempt.metrics["tokens/scored"] = sum(part["info"]["tokens"] for part in parts)
