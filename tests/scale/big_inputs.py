"""Synthetic inputs of a round with many pairs: ids, lengths and log-probabilities as in a run, texts short.

Four fifths of the pairs are human ones. For each of the others there is a prompt with two sampled responses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import StepRef, StepSpec
from sera_core.artifacts.step import Attempt, run_step
from sera_core.artifacts.store import Store
from sera_core.artifacts.streaming import Writer
from sera_core.config import ExecutionConfig

RESPONSES = 2
AT_ONCE = 64 * schema.ROW_GROUP
"""Rows made at once."""
PROBED = 64
"""Responses scored again in float32."""


def put(
    store: Store,
    step: str,
    files: Callable[[Attempt], list[str]],
    fields: Mapping[str, Any] | None = None,
    inputs: Mapping[str, StepRef] | None = None,
) -> StepRef:
    """A made step."""
    spec = StepSpec(step=step, version=1, fields=dict(fields or {}), inputs=dict(inputs or {}))
    return run_step(store, spec, files, ExecutionConfig()).ref


def make_inputs(store: Store, pairs: int, data: StepRef, model: StepRef) -> dict[str, StepRef]:
    """Rendered pairs, responses, and the log-probabilities of both.

    Args:
        pairs: human and generated pairs together.
    """
    generated = pairs // 5
    human = pairs - generated
    rendered = put(
        store, "render", lambda a: _rendered(a, human, generated), {"pairs": pairs}, {"data": data}
    )
    samples = put(store, "sample", lambda a: _sampled(a, generated), {"pairs": pairs}, {"policy": model})
    made = {"rendered": rendered, "samples": samples}

    def logps(keys: Callable[[], Iterator[pa.Array]], name: str, texts: StepRef, shift: float) -> StepRef:
        inputs = {"texts": texts, "policy": model}
        return put(store, "logps", lambda a: _logps(a, keys(), shift), {"kind": name}, inputs)

    for kind, shift in (("policy", 1.0), ("reference", 0.0)):
        probed = f"exact-{'policy' if kind == 'policy' else 'ref'}"
        made[f"human-{kind}"] = logps(lambda: _human_keys(human), kind, rendered, shift)
        made[f"human-{probed}"] = logps(lambda: _few(_human_keys(human)), probed, rendered, shift + 1e-5)
        made[f"samples-{probed}"] = logps(lambda: _few(_sample_keys(generated)), probed, samples, shift)
    made["samples-reference"] = logps(lambda: _sample_keys(generated), "reference", samples, 0.0)
    return made


def _rendered(attempt: Attempt, human: int, prompts: int) -> list[str]:
    with Writer(attempt.write("train.parquet"), schema.PAIRS) as out:
        for ids in _ids(human, "human"):
            prompt_ids = next(_ids(len(ids), "prompt", int(ids[0].as_py()[:8], 16)))
            out.write(_pairs(ids, prompt_ids))
    with Writer(attempt.write("prompts.parquet"), schema.PROMPTS) as out:
        for ids in _ids(prompts, "sampled"):
            columns = {"prompt_id": ids, "prompt": _messages("user", ids), "prompt_ids": _tokens(ids, 5)}
            out.write(schema.table(schema.PROMPTS, columns))
    _empty(attempt, "heldout.parquet", schema.PAIRS)
    _empty(attempt, "dropped.parquet", schema.LEDGER)
    attempt.write("flipped.json").write_text("[]")
    return ["train.parquet", "prompts.parquet", "heldout.parquet", "dropped.parquet", "flipped.json"]


def _pairs(ids: pa.Array, prompts: pa.Array) -> pa.Table:
    count = len(ids)
    columns = {
        "pair_id": ids,
        "prompt_id": prompts,
        "format": ["conversational"] * count,
        "prompt": _messages("user", prompts),
        "chosen": _messages("assistant", ids),
        "rejected": _messages("assistant", prompts),
        "prompt_ids": _tokens(ids, 5),
        "chosen_ids": _tokens(ids, 4),
        "rejected_ids": _tokens(ids, 3),
        "origin": ["human"] * count,
        "round": np.zeros(count, dtype=np.int32),
    }
    return schema.table(schema.PAIRS, columns)


def _sampled(attempt: Attempt, prompts: int) -> list[str]:
    with Writer(attempt.write("responses.parquet"), schema.RESPONSES) as out:
        for number, ids in enumerate(_ids(prompts, "sampled")):
            rows = len(ids) * RESPONSES
            repeated = ids.take(np.repeat(np.arange(len(ids)), RESPONSES))
            columns = {
                "prompt_id": repeated,
                "sample": np.tile(np.arange(RESPONSES, dtype=np.int32), len(ids)),
                "response": pa.array([f"answer {number}" for number in range(rows)]),
                "response_ids": _tokens(repeated, 4),
                "seed": np.arange(rows),
                "finish_reason": ["stop"] * rows,
                "tokens": np.full(rows, 4, dtype=np.int32),
                "policy_logps": _drawn(number, rows, 1.0),
                "past_logps": [[]] * rows,
                "past_ref_logps": [[]] * rows,
            }
            out.write(schema.table(schema.RESPONSES, columns))
    _empty(attempt, "dropped.parquet", schema.LEDGER)
    return ["responses.parquet", "dropped.parquet"]


def _logps(attempt: Attempt, keys: Iterator[pa.Array], shift: float) -> list[str]:
    with Writer(attempt.write("logps.parquet"), schema.LOGPS) as out:
        for number, some in enumerate(keys):
            columns = {
                "id": some,
                "logps": _drawn(number, len(some), shift),
                "tokens": np.full(len(some), 4, dtype=np.int32),
            }
            out.write(schema.table(schema.LOGPS, columns))
    return ["logps.parquet"]


def _drawn(number: int, rows: int, shift: float) -> np.ndarray:
    """Log-probabilities of the responses made at one time, in nats; a probe's are nearly the same.

    A policy that is shifted prefers the first response of two, by so much that three pairs in four are above
    the floor.
    """
    drawn = np.random.default_rng((number, int(shift))).normal(-20, 3, rows).round(6)
    return drawn + shift * np.where(np.arange(rows) % 2, 1, 5)


def _human_keys(count: int) -> Iterator[pa.Array]:
    for ids in _ids(count, "human"):
        yield _keys(ids, ("chosen", "rejected"))


def _sample_keys(count: int) -> Iterator[pa.Array]:
    for ids in _ids(count, "sampled"):
        yield _keys(ids, [str(sample) for sample in range(RESPONSES)])


def _keys(ids: pa.Array, ends: Sequence[str]) -> pa.Array:
    return pa.array([f"{id}/{end}" for id in ids.to_pylist() for end in ends])


def _few(keys: Iterator[pa.Array]) -> Iterator[pa.Array]:
    yield next(keys)[:PROBED]


def _ids(count: int, kind: str, seed: int = 0) -> Iterator[pa.Array]:
    """`count` ids of 16 hex digits, some at a time; the same for a kind and seed."""
    draw = np.random.default_rng((len(kind), seed))
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        digits = draw.bytes(8 * size).hex().encode()
        ends = pa.py_buffer(np.arange(0, 16 * size + 1, 16, dtype=np.int32))
        yield pa.StringArray.from_buffers(size, ends, pa.py_buffer(digits))


def _messages(role: str, texts: pa.Array) -> pa.Array:
    turns = pa.StructArray.from_arrays([pa.array([role] * len(texts)), texts], names=["role", "content"])
    return pa.ListArray.from_arrays(np.arange(len(texts) + 1, dtype=np.int32), turns)


def _tokens(ids: pa.Array, count: int) -> pa.Array:
    """`count` token ids a row, different from row to row."""
    values = np.frombuffer(ids.buffers()[2], dtype=np.uint8).reshape(-1, 16)
    values = values[ids.offset : ids.offset + len(ids), :count].astype(np.int32)
    values[:, 0] += np.arange(len(ids), dtype=np.int32) * 128
    ends = np.arange(0, count * len(ids) + 1, count, dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1)))


def _empty(attempt: Attempt, name: str, kind: pa.Schema) -> None:
    schema.write_table(kind.empty_table(), attempt.write(name))
