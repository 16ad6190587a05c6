"""Sample R responses per prompt from a policy, each with token ids, seed and log-probability.

Prompts are split into shards of fixed size in prompt_id order; finished shards are committed and not sampled
again. Batches of the transformers engine never span shards, so an interrupted run gives the same bytes as an
uninterrupted one, and several workers (`execution.distribute`) the same as one. vLLM begins with the next
shards while a shard's last responses are unfinished, as one of several workers with one more; after an
interruption, and by several workers, its responses are the same up to float noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.step import Attempt
from sera_core.data.rendering import Renderer
from sera_core.errors import SeraError
from sera_core.method.rewards import quantise
from sera_core.models.batch_sizes import few_tokens, sampling_batch
from sera_core.models.devices import device_of
from sera_core.models.memory_estimate import folder_shape, sampling_memory
from sera_core.models.shared_policies import shared_policy
from tasks.engines.child_step import Channel
from tasks.engines.choose import open_sampler
from tasks.engines.finish_shards import finish_shards
from tasks.engines.replica_processes import serve
from tasks.engines.sampler import (
    Finished,
    LooksAhead,
    Request,
    Sampler,
    Settings,
    no_progress,
    position_limit,
)
from tasks.engines.shards import Checked, Shards

SHARD_PROMPTS = 64
"""Prompts per shard: fixed, so that batches are the same on every machine."""
PROBED_RESPONSES = 16
"""Number of responses of the first shard whose log-probabilities are compared with the scorer's."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from: its id, and its token ids with the generation prompt."""

    prompt_id: str
    ids: tuple[int, ...]


def sample_prompts(
    sampler: Sampler,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    responses: int,
    seed: int,
    round: int = 0,
    finished: Finished = no_progress,
) -> pa.Table:
    """The rows of responses.parquet for these prompts, in their order, samples 0 … `responses` − 1 of each.

    Args:
        sampler: the engine with the policy.
        renderer: decodes ids into text.
        prompts: the prompts.
        settings: sampling settings.
        responses: R, responses per prompt.
        seed: seed of the run.
        round: the current round.
        finished: called with the number of complete responses.
    """
    keys = requests_of(prompts, responses, seed, round)
    requests = [request for _, _, request in keys]
    found = sampler.sample(requests, settings, finished) if requests else []
    columns = {
        "prompt_id": [prompt_id for prompt_id, _, _ in keys],
        "sample": [number for _, number, _ in keys],
        "response": [renderer.text(response.ids) for response in found],
        "response_ids": [response.ids for response in found],
        "seed": [request.seed for request in requests],
        "finish_reason": [response.finish_reason for response in found],
        "tokens": [len(response.ids) for response in found],
        "policy_logps": quantise(np.array([response.logps for response in found], dtype=np.float64)),
        "past_logps": [[] for _ in found],
        "past_ref_logps": [[] for _ in found],
    }
    return schema.table(schema.RESPONSES, columns)


def requests_of(
    prompts: Sequence[Prompt], responses: int, seed: int, round: int
) -> list[tuple[str, int, Request]]:
    """(prompt_id, sample, request) of every response; these and the round decide the request's seed."""
    return [
        (prompt.prompt_id, number, Request(prompt.ids, derived_seed(seed, round, prompt.prompt_id, number)))
        for prompt in prompts
        for number in range(responses)
    ]


# ------------------------------------------------------------------------------------------------------ step


def sample_responses(attempt: Attempt) -> list[str]:
    """Write responses.parquet, and dropped.parquet with every prompt of the side that was not sampled.

    The sampler's log-probabilities are kept if it uses the scorer's dtype and a probe agrees. The start
    policy's responses to the same prompts (`anchors`) follow the policy's, prompt by prompt.
    """
    fitting, dropped = _choose_prompts(attempt)
    _write_dropped(attempt, dropped)
    parts = finish_shards(attempt, _Work(attempt, fitting), f"{__name__}:open_work")
    _merge(attempt, parts)
    attempt.counts["prompts"] = len(fitting)
    return ["responses.parquet", "dropped.parquet"]


def open_work(attempt: Attempt) -> Shards:
    """The shards of the step, for one of several workers."""
    return _Work(attempt, _choose_prompts(attempt)[0])


def do_as_replica(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Do shards of the step as one of several processes; see `tasks.engines.replica_processes`."""
    return serve(request, channel)


class _Work:
    """The shards, and the engine, which is loaded on first use; see `Shards`."""

    unit = "responses"

    def __init__(self, attempt: Attempt, prompts: Sequence[Prompt]) -> None:
        self.attempt = attempt
        self.shards = [
            prompts[start : start + SHARD_PROMPTS] for start in range(0, len(prompts), SHARD_PROMPTS)
        ]
        self.renderer = Renderer(_folders(attempt)[1])
        self.sampler: Sampler | None = None
        self.begun: set[int] = set()

    @property
    def sizes(self) -> list[int]:
        """Responses of each shard."""
        return [len(shard) * self.attempt.fields["responses"] for shard in self.shards]

    @property
    def checked(self) -> Checked:
        """The first shard is checked as soon as there is room for the scorer's model."""
        return "at the end" if self.fills_device else "early"

    @property
    def ahead(self) -> int:
        """Shards that a worker should know of at once."""
        return 2 if self.attempt.fields["engine"] == "vllm" else 1

    def do(self, number: int, following: Sequence[int], finished: Finished) -> None:
        """Sample one shard and commit it."""
        attempt, fields = self.attempt, self.attempt.fields
        if self.sampler is None:
            self.sampler = self._open()
        self._look_ahead(self.sampler, [number, *following])
        table = sample_prompts(
            self.sampler,
            self.renderer,
            self.shards[number],
            self._settings(),
            responses=fields["responses"],
            seed=fields["seed"],
            round=fields["round"],
            finished=finished,
        )
        relative = f"part-{number:05d}.parquet"
        schema.write_table(table, attempt.write(relative))
        attempt.commit_part(number, [relative], {"responses": table.num_rows})

    def check(self) -> None:
        """Compare the first shard's log-probabilities with the scorer's."""
        _probe(self.attempt, self.shards[0], _read_part(self.attempt, self.attempt.shards(1)[0]))

    def _settings(self) -> Settings:
        fields = self.attempt.fields
        stop_ids = self.renderer.stop_ids
        return Settings(fields["temperature"], fields["top_p"], fields["max_tokens"], stop_ids)

    def _look_ahead(self, sampler: Sampler, numbers: Sequence[int]) -> None:
        """Let an engine that can begin with all responses of these shards."""
        if isinstance(sampler, LooksAhead):
            fields = self.attempt.fields
            for number in numbers:
                if number not in self.begun:
                    self.begun.add(number)
                    keys = requests_of(
                        self.shards[number], fields["responses"], fields["seed"], fields["round"]
                    )
                    sampler.enqueue([request for _, _, request in keys], self._settings())

    @property
    def fills_device(self) -> bool:
        """Whether the engine leaves no room for the scorer's model beside it: vLLM on an accelerator."""
        engine, device = self.attempt.fields["engine"], self.attempt.execution.device
        return engine == "vllm" and device_of(device) != "cpu"

    def close(self) -> None:
        """Free the engine."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    def _open(self) -> Sampler:
        fields, execution = self.attempt.fields, self.attempt.execution
        policy, base = _folders(self.attempt)
        longest = max(len(prompt.ids) for shard in self.shards for prompt in shard)
        row, batch = longest + fields["max_tokens"], 1
        if fields["engine"] == "transformers":  # vLLM takes a fixed share of the memory
            shape = folder_shape(base)
            batch = sampling_batch(execution, shape, fields["dtype"], row)
            self.attempt.memory.planned = sampling_memory(
                shape, fields["dtype"], batch, row, device_of(execution.device)
            )
        return open_sampler(
            fields["engine"],
            policy,
            base=base,
            dtype=fields["dtype"],
            device=device_of(execution.device),
            batch=batch,
            max_length=row,
        )


def _folders(attempt: Attempt) -> tuple[Path, Path]:
    """The policy's folder, and the initial policy's, which is the base of an adapter."""
    return attempt.input("policy").folder("policy"), attempt.input("model").folder("policy")


def _read_part(attempt: Attempt, part: dict[str, Any]) -> pa.Table:
    return schema.read_table(attempt.part_path(part, next(iter(part["files"]))), schema.RESPONSES)


def _merge(attempt: Attempt, parts: list[dict[str, Any]]) -> None:
    """Merge all shards into one file, without log-probabilities in another dtype than the scorer's."""
    tables = [schema.read_table(path, schema.RESPONSES) for path in attempt.part_paths(parts)]
    merged = pa.concat_tables([schema.table(schema.RESPONSES, {"prompt_id": []}), *tables]).combine_chunks()
    _measure(attempt, merged)
    if "anchors" in attempt.spec.inputs:
        merged = _with_anchors(attempt, merged)
    if attempt.fields["scored_again"] or "anchors" in attempt.spec.inputs:
        place = merged.schema.get_field_index("policy_logps")
        merged = merged.set_column(place, merged.schema.field(place), pa.nulls(len(merged), pa.float64()))
    schema.write_table(merged, attempt.write("responses.parquet"))


def _with_anchors(attempt: Attempt, own: pa.Table) -> pa.Table:
    """The policy's responses and those of the start policy, which are numbered after them.

    Raises:
        SeraError: the start policy answered other prompts.
    """
    path = attempt.input("anchors").path("responses.parquet")
    anchors = schema.read_table(path, schema.RESPONSES)
    if anchors["prompt_id"] != own["prompt_id"]:
        raise SeraError(f"{path}: has responses to other prompts; delete that step and run again")
    place = anchors.schema.get_field_index("sample")
    numbers = anchors["sample"].to_numpy() + attempt.fields["responses"]
    anchors = anchors.set_column(place, anchors.schema.field(place), pa.array(numbers))
    both = pa.concat_tables([own, anchors])
    return both.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).combine_chunks()


# --------------------------------------------------------------------------------------------------- prompts


def _choose_prompts(attempt: Attempt) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """The side's distinct prompts in prompt_id order: all that fit, or `prompts` of them drawn at random.

    Also the others by reason.

    Train prompts are drawn anew each round; held-out prompts are the same in all rounds, so that metrics are
    comparable.
    """
    fields = attempt.fields
    drawn_in = fields["round"] if fields["side"] == "train" else "all rounds"
    fitting, too_long = _distinct_prompts(attempt)

    def place(prompt: Prompt) -> int:
        return derived_seed(fields["seed"], drawn_in, prompt.prompt_id, "prompts")

    limit = len(fitting) if fields["prompts"] is None else fields["prompts"]
    drawn = {prompt.prompt_id for prompt in sorted(fitting, key=place)[:limit]}
    not_drawn = [prompt for prompt in fitting if prompt.prompt_id not in drawn]
    dropped = {"not_drawn": not_drawn, "prompt_too_long": too_long}
    return [prompt for prompt in fitting if prompt.prompt_id in drawn], dropped


def _distinct_prompts(attempt: Attempt) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that leave room for a response of `max_tokens`, and the others."""
    name = {"train": "prompts.parquet", "heldout": "heldout.parquet"}[attempt.fields["side"]]
    rows = schema.iter_rows(attempt.input("rendered").path(name), ["prompt_id", "prompt_ids"])
    distinct = {row["prompt_id"]: Prompt(row["prompt_id"], tuple(row["prompt_ids"])) for row in rows}
    prompts = [prompt for _, prompt in sorted(distinct.items())]
    positions = position_limit(_folders(attempt)[1])
    if positions is None:
        return prompts, []
    room = positions - attempt.fields["max_tokens"]
    return [p for p in prompts if len(p.ids) <= room], [p for p in prompts if len(p.ids) > room]


def _write_dropped(attempt: Attempt, dropped: dict[str, list[Prompt]]) -> None:
    fields = attempt.fields
    shared = {
        "origin": "generated",
        "round": fields["round"],
        "stage": "sample" if fields["side"] == "train" else f"sample_{fields['side']}",
        "kept": False,
    }
    rows = [
        shared | {"prompt_id": prompt.prompt_id, "reason": reason}
        for reason, prompts in dropped.items()
        for prompt in prompts
    ]
    schema.write_table(schema.from_rows(schema.LEDGER, rows), attempt.write("dropped.parquet"))
    attempt.counts.update({reason: len(prompts) for reason, prompts in dropped.items() if prompts})


# ------------------------------------------------------------------------------------------------- evidence


def _probe(attempt: Attempt, prompts: Sequence[Prompt], sampled: pa.Table) -> None:
    """Compare the sampler's log-probabilities of a few responses with the scorer's; record the difference.

    Raises:
        SeraError: they differ by more than `max_parity_nats` although both use the same dtype.
    """
    from sera_core.models.logprobs import score_tokens, sequence_logps

    fields = attempt.fields
    ids = {prompt.prompt_id: prompt.ids for prompt in prompts}
    chosen = np.linspace(0, len(sampled) - 1, min(PROBED_RESPONSES, len(sampled))).astype(int)
    rows = sampled.take(chosen).to_pylist()
    items = [(ids[row["prompt_id"]], row["response_ids"]) for row in rows]
    policy, base = _folders(attempt)
    scorer = shared_policy(policy, fields["model_dtype"], device_of(attempt.execution.device), base)
    scored = sequence_logps(scorer, items, tokens_per_batch=few_tokens(attempt.execution))
    differences = np.abs(scored - np.array([row["policy_logps"] for row in rows]))
    worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
    attempt.metrics["parity/max_nats"] = float(quantise(differences)[worst])
    attempt.metrics["tokens/probe"] = score_tokens(items)
    allowed = fields["max_parity_nats"]
    if fields["dtype"] == fields["model_dtype"] and not differences[worst] <= allowed:
        row = rows[worst]
        raise SeraError(
            f"prompt {row['prompt_id']}, sample {row['sample']}: the {fields['engine']} engine computes "
            f"{row['policy_logps']:.4f} nats for the response, the scorer {scored[worst]:.4f}, a difference "
            f"above sampling.max_parity_nats = {allowed}; the engine may have other weights. Use "
            'sampling.engine = "transformers", or raise the limit if bfloat16 rounding explains it'
        )


def _measure(attempt: Attempt, sampled: pa.Table) -> None:
    """Counts and metrics of the responses; all of them stay in the file."""
    tokens = sampled["tokens"].to_numpy()
    cut = np.array([reason == "length" for reason in sampled["finish_reason"].to_pylist()], dtype=bool)
    attempt.counts["responses"] = len(sampled)
    attempt.counts["cut_by_limit"] = int(cut.sum())
    attempt.counts["empty"] = int(((tokens == 1) & ~cut).sum())
    attempt.metrics["tokens/sampled"] = int(tokens.sum())
    if len(sampled):
        attempt.metrics["samples/mean_tokens"] = round(float(tokens.mean()), 6)
        attempt.metrics["samples/share_cut"] = round(float(cut.mean()), 6)
