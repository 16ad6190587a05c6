"""Compute log-probabilities of responses under one policy, by shard; later steps read them from the store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import Lookup, Rows, Writer, strings
from sera_core.data.folds import fold_of
from sera_core.errors import SeraError
from sera_core.method.rewards import length_desensitised, quantise
from sera_core.models.batch_sizes import tokens_per_batch
from sera_core.models.devices import device_of
from sera_core.models.memory_estimate import ModelShape, folder_shape, scoring_memory
from sera_core.models.shared_policies import shared_policy
from tasks.engines.child_step import Channel
from tasks.engines.finish_shards import finish_shards
from tasks.engines.replica_processes import serve
from tasks.engines.sampler import Finished
from tasks.engines.shards import Shards

SHARD_ROWS = 128
"""Rows per shard: fixed, so that batches are the same on every machine."""


@dataclass(frozen=True)
class Text:
    """One response to score: its key, the prompt's token ids and the response's."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    shared: int
    """Tokens up to the length of the pair's shorter response; a sample's own length."""


def score_texts(attempt: Attempt) -> list[str]:
    """Write logps.parquet: log π(y|x) of every response in a file of pairs or samples, in the file's order.

    The key of a pair's response is `<pair_id>/chosen` or `<pair_id>/rejected`, of a sample
    `<prompt_id>/<sample>`. A probe scores only a few rows, see `_score_probe`, and a step of a fold only the
    pairs in it.

    With the field `ld_alpha` a value is the sum that LD-DPO compares (`length_desensitised`).
    """
    if "probe" in attempt.fields:
        return _score_probe(attempt)
    _merge(attempt, finish_shards(attempt, open_work(attempt), f"{__name__}:open_work"))
    return ["logps.parquet"]


def open_work(attempt: Attempt) -> Shards:
    """The shards of the step, for it or for one of several workers."""
    return _Work(attempt)


def do_as_replica(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Do shards of the step as one of several processes; see `tasks.engines.replica_processes`."""
    return serve(request, channel)


class _Work:
    """The shards, and the policy, which is loaded on first use; see `Shards`."""

    unit, checked, ahead = "responses", None, 1

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.texts = attempt, _Texts(attempt)
        self.policy: Any = None

    @property
    def sizes(self) -> list[int]:
        """Responses of each shard."""
        rows, most = len(self.texts.rows), SHARD_ROWS
        return [self.texts.per_row * min(most, rows - first) for first in range(0, rows, most)]

    def do(self, number: int, following: Sequence[int], finished: Finished) -> None:
        """Score one shard and commit it."""
        if self.policy is None:
            self.policy, self.shape = _load(self.attempt), _shape(self.attempt)
        first = number * SHARD_ROWS
        shard = self.texts.read(self.texts.rows[first : first + SHARD_ROWS])
        size = _plan_memory(self.attempt, self.shape, shard)
        _score_shard(self.attempt, self.policy, number, shard, size, finished)

    def check(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """The policy stays loaded for the next step (`shared_policy`)."""


def _score_probe(attempt: Attempt) -> list[str]:
    """Score a few rows spread over the file with the plain loop, to measure the noise of the others.

    The rows are the same in every fold; a step of a fold scores those of them that are in it, maybe none.
    """
    from sera_core.models.logprobs import plain_sequence_logps, score_tokens

    file = _Texts(attempt)
    picked = np.unique(np.linspace(0, file.size - 1, attempt.fields["probe"]).astype(int))
    texts = file.read(np.intersect1d(picked, file.rows).tolist())
    items = [(text.prompt_ids, text.response_ids) for text in texts]
    if texts:
        _plan_memory(attempt, _shape(attempt), texts)
    columns = {
        "id": [text.id for text in texts],
        "logps": quantise(plain_sequence_logps(_load(attempt), items)) if items else [],
        "tokens": [len(text.response_ids) for text in texts],
    }
    schema.write_table(schema.table(schema.LOGPS, columns), attempt.write("logps.parquet"))
    attempt.counts["responses"] = len(texts)
    attempt.metrics["tokens/probe"] = score_tokens(items)
    return ["logps.parquet"]


class _Texts:
    """The responses of a file of pairs or samples, read a few rows at a time."""

    def __init__(self, attempt: Attempt) -> None:
        name = attempt.fields["file"]
        path = attempt.input("texts").path(name)
        if name == "responses.parquet":
            self.per_row, self._prompts = 1, _PromptIds(attempt)
            self._file = Rows(path, ["prompt_id", "sample", "response_ids"])
        else:
            self.per_row, self._prompts = 2, None
            self._file = Rows(path, ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
        self.size = len(self._file)
        fold = fold_of(attempt.fields)
        self.rows: Sequence[int] = range(self.size) if fold is None else fold.rows(path).tolist()
        """Numbers of the rows to score: all, or those of a fold."""

    def read(self, numbers: Sequence[int]) -> list[Text]:
        """The responses of these rows: two per pair, one per sample."""
        rows = self._file.take(numbers)
        if self._prompts is None:
            return [
                Text(f"{r['pair_id']}/{side}", r["prompt_ids"], r[f"{side}_ids"], _shared(r))
                for r in rows
                for side in ("chosen", "rejected")
            ]
        prompts = self._prompts.of([r["prompt_id"] for r in rows])
        return [
            Text(f"{r['prompt_id']}/{r['sample']}", ids, r["response_ids"], len(r["response_ids"]))
            for r, ids in zip(rows, prompts, strict=True)
        ]


def _shared(pair: Mapping[str, Any]) -> int:
    return min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


class _PromptIds:
    """Token ids of prompts by prompt_id, from the rendered files of both sides."""

    def __init__(self, attempt: Attempt) -> None:
        rendered = attempt.input("rendered")
        paths = [rendered.path(name) for name in ("prompts.parquet", "heldout.parquet")]
        self._files = [Rows(path, ["prompt_ids"]) for path in paths]
        found = [strings(path, schema.PROMPTS, "prompt_id") for path in paths]
        distinct, self._rows = np.unique(np.concatenate(found), return_index=True)
        self._lookup = Lookup(distinct)

    def of(self, prompt_ids: Sequence[str]) -> list[list[int]]:
        """The token ids of each."""
        places = self._lookup.places(np.array(prompt_ids, dtype=np.str_))
        if (places < 0).any():
            missing = prompt_ids[int(np.argmin(places))]
            raise SeraError(f"prompt {missing}: it has samples to score, but it is not among the rendered")
        rows, first = self._rows[places], len(self._files[0])
        early, late = (
            file.take(some)
            for file, some in zip(self._files, (rows[rows < first], rows[rows >= first] - first), strict=True)
        )
        sides = (iter(early), iter(late))
        return [next(sides[int(row >= first)])["prompt_ids"] for row in rows]


def _load(attempt: Attempt) -> Any:
    base = attempt.input("model").folder("policy")
    folder = attempt.input("policy").folder("policy")
    device = device_of(attempt.execution.device)
    return shared_policy(folder, attempt.fields["dtype"], device, base)


def _shape(attempt: Attempt) -> ModelShape:
    return folder_shape(attempt.input("model").folder("policy"))


def _plan_memory(attempt: Attempt, shape: ModelShape, texts: Sequence[Text]) -> int:
    """Plan the memory of the next batches, which may only grow; returns their tokens."""
    longest = max(len(text.prompt_ids) + len(text.response_ids) for text in texts)
    size, dtype = longest, attempt.fields["dtype"]
    if "probe" not in attempt.fields:
        size = tokens_per_batch(attempt.execution, shape, dtype, longest)
    device = device_of(attempt.execution.device)
    needed = scoring_memory(shape, dtype, max(size, longest), longest, device)
    attempt.memory.planned = max(attempt.memory.planned or 0, needed)
    return size


def _score_shard(
    attempt: Attempt, policy: Any, number: int, shard: Sequence[Text], size: int, finished: Finished
) -> None:
    from sera_core.models.logprobs import response_token_logps, score_tokens, sequence_logps

    items, alpha = [(text.prompt_ids, text.response_ids) for text in shard], attempt.fields.get("ld_alpha")
    how: dict[str, Any] = {
        "tokens_per_batch": size,
        "progress": lambda scored, _: finished(scored),
    }
    if alpha is None:
        values = sequence_logps(policy, items, **how)
    else:
        by_text = zip(response_token_logps(policy, items, **how), shard, strict=True)
        values = np.array([length_desensitised(logps, text.shared, alpha) for logps, text in by_text])
    relative = f"part-{number:05d}.parquet"
    columns = {
        "id": [text.id for text in shard],
        "logps": quantise(values),
        "tokens": [len(text.response_ids) for text in shard],
    }
    schema.write_table(schema.table(schema.LOGPS, columns), attempt.write(relative))
    attempt.commit_part(number, [relative], {"tokens": score_tokens(items)})


def _merge(attempt: Attempt, parts: Sequence[dict[str, Any]]) -> None:
    with Writer(attempt.write("logps.parquet"), schema.LOGPS) as out:
        for path in attempt.part_paths(parts):
            out.write(schema.read_table(path, schema.LOGPS))
    attempt.counts["responses"] = out.rows
    attempt.metrics["tokens/scored"] = sum(part["info"]["tokens"] for part in parts)
