"""Estimate tokens, seconds, bytes and memory of a step, from measured steps where there are any."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sera_core.artifacts.manifest import Artifact, StepRecord, StepSpec, find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import MEMORY_SETTINGS
from sera_core.artifacts.store import Store
from sera_core.config import SeraConfig
from sera_core.counts import RoundCounts
from sera_core.errors import InputError
from sera_core.guards.memory import accelerator_here, device_memory
from sera_core.method.pairing import expected_pairs, sampled_policies
from sera_core.models.batch_sizes import micro_batch, sampling_batch, tokens_per_batch
from sera_core.models.devices import training_processes
from sera_core.models.memory_estimate import (
    BYTES,
    ModelShape,
    fine_tuning_memory,
    folder_shape,
    least_training_memory,
    sampling_memory,
    scoring_memory,
    shape_of,
    trained_parameters,
    training_memory,
)
from sera_core.models.model_sources import resolve_source
from sera_core.steps import FOLD_TOKENS

CHARACTERS_A_TOKEN = 4.2
DENSE = 3.5
"""Bytes (UTF-8) a token of dense text, for the longest pairs: Chinese and Japanese have three a character."""
COST = {"logps": 1.0, "sample": 2.5, "train": 3.0, "sft": 3.0}
"""Cost per token relative to one forward pass, measured on two CPU cores.

Training is full fine-tuning; an adapter saves a third."""
EFFICIENCY = 0.7
"""Speed of a forward pass relative to a plain matrix product."""
SAMPLED_SHARE = 0.8
"""Mean length of a sampled response as a share of its limit."""


@dataclass(frozen=True)
class Workload:
    """Sizes: pairs by side, prompts to sample, mean tokens of a prompt and of an answer.

    Also tokens of the longest prompt, tokens of prompt, chosen and rejected of the longest pairs, and the
    model's shape if it is on this machine.
    """

    train: int
    heldout: int
    test: int
    prompts: int
    prompt: float
    answer: float
    longest_prompt: int
    longest: list[tuple[int, int, int]]
    shape: ModelShape | None
    conversations: list[int] = field(default_factory=list)
    """Tokens of each conversation that `start.sft` trains on."""


def _length_of(messages: Sequence[dict[str, Any]]) -> int:
    """Characters."""
    return sum(len(message["content"]) + len(message.get("reasoning_content") or "") for message in messages)


def workload(
    config: SeraConfig, data: StepRecord, store: Store, messages: StepRecord | None = None
) -> Workload:
    """Sizes from the records and texts of the steps that read data, and conversations to fine-tune on."""
    table = pq.read_table(
        Artifact(store, data.ref).path("train.parquet"), columns=["prompt_id", "prompt", "chosen", "rejected"]
    ).to_pylist()
    prompt = [_length_of(row["prompt"]) for row in table]
    answer = [_length_of(row["chosen"] + row["rejected"]) / 2 for row in table]
    train, heldout, test = (data.counts.get(side, 0) for side in ("train", "heldout", "test"))
    prompts = len({row["prompt_id"] for row in table}) + data.counts.get("prompts", 0)
    return Workload(
        train,
        heldout,
        test,
        prompts,
        _tokens(prompt),
        _tokens(answer),
        *_longest(table, config),
        shape_of_source(config),
        _conversations(table, config, store, messages),
    )


def _conversations(
    table: Sequence[dict[str, Any]], config: SeraConfig, store: Store, messages: StepRecord | None
) -> list[int]:
    """Tokens of each conversation to fine-tune on; those over the limit are dropped."""
    limit = config.data.max_prompt_tokens + config.data.max_response_tokens
    if not config.start.tunes:
        return []
    if config.start.file is None:
        distinct = {str((row["prompt"], row["chosen"])): row["prompt"] + row["chosen"] for row in table}
        found = list(distinct.values())
    else:
        assert messages is not None, "its conversations are read before"
        path = Artifact(store, messages.ref).path("messages.parquet")
        found = pq.read_table(path, columns=["messages"]).column("messages").to_pylist()
    tokens = [int(_tokens([_length_of(messages)])) for messages in found]
    return [count for count in tokens if count <= limit]


def _tokens(characters: Sequence[float]) -> float:
    return float(np.mean(characters)) / CHARACTERS_A_TOKEN + 10 if characters else 0.0


def _longest(table: Sequence[dict[str, Any]], config: SeraConfig) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens of the longest prompt, and of prompt, chosen and rejected of the longest batch.

    Without pairs that are over a limit, if those are dropped.
    """
    part = config.data
    limits = (part.max_prompt_tokens, part.max_response_tokens, part.max_response_tokens)
    found = []
    for row in table:
        sides = [row[name] for name in ("prompt", "chosen", "rejected")]
        over = any(
            _length_of(side) / CHARACTERS_A_TOKEN > limit for side, limit in zip(sides, limits, strict=True)
        )
        if not over or part.on_long == "cut":
            prompt, chosen, rejected = map(min, (int(_bytes_of(side) / DENSE) + 10 for side in sides), limits)
            found.append((prompt, chosen, rejected))
    found = found or [limits]
    pairs = sorted(found, key=sum, reverse=True)[: config.train.batch]
    return max(prompt for prompt, _, _ in found), pairs


def _bytes_of(messages: Sequence[dict[str, Any]]) -> int:
    """Bytes in UTF-8."""
    texts = [text for m in messages for text in (m["content"], m.get("reasoning_content")) if text]
    return sum(len(text.encode("utf-8", errors="replace")) for text in texts)


def shape_of_source(config: SeraConfig) -> ModelShape | None:
    """The model's shape, from its files; None if the model is not on this machine."""
    source = resolve_source(config.model.source, config.model.revision)
    if source.kind == "package":
        from sera_core.models.gguf import gguf_reader

        tensors = gguf_reader(Path(source.location)).tensors
        return shape_of({tensor.name: [int(size) for size in tensor.shape] for tensor in tensors})
    return folder_shape(Path(source.location)) if source.kind == "folder" else None


def gigaflops(seconds: float = 0.3) -> float:
    """Speed of a float32 matrix product on this machine in GFLOP/s, best of many."""
    a = np.ones((768, 768), dtype=np.float32)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        np.matmul(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best / 1e9


def round_of(spec: StepSpec, walked: int | None) -> int | None:
    """The round whose pairs a step works on: a fold policy is trained on those of an earlier round.

    Args:
        walked: the round that does the step.
    """
    return spec.fields["round"] if spec.step == "train" else walked


def _folds(spec: StepSpec) -> int:
    """Number of the folds that share the work; 1 for a step without."""
    return spec.fields["fold"]["of"] if "fold" in spec.fields else 1


class Estimator:
    """Estimates the cost of a run's steps."""

    def __init__(self, config: SeraConfig, store: Store, records: RunStore, size: Workload) -> None:
        self.config, self.size = config, size
        self.rate = gigaflops() * 1e9 * EFFICIENCY * (1.7 if config.model.dtype == "bfloat16" else 1.0)
        self.measured = _measured(store, records, accelerator_here(config.execution.device))

    def expected(self, spec: StepSpec, counts: RoundCounts | None) -> dict[str, Any]:
        """{"tokens", "seconds", "bytes", "memory"} of a step.

        None where it depends on a model that is not on this machine; memory also for steps without a policy,
        and for engines that take a fixed share.

        Args:
            spec: the step.
            counts: pairs and prompts of its round (`round_of`); None for a step before the rounds.
        """
        tokens = self._tokens(spec, counts)
        return {
            "tokens": int(tokens),
            "seconds": self._seconds(spec.step, tokens),
            "bytes": self._bytes(spec),
            "memory": self._memory(spec),
        }

    def _tokens(self, spec: StepSpec, counts: RoundCounts | None) -> float:
        if spec.step == "logps":
            return self._scored(spec, counts, self.size.prompt + 2 * self.size.answer)
        if spec.step == "sample":
            prompts = self._sampled(spec.fields["side"], counts)
            return prompts * spec.fields["responses"] * spec.fields["max_tokens"] * SAMPLED_SHARE
        if spec.step == "train":
            return self._trained_on(spec, counts) / _folds(spec)
        if spec.step == "sft":
            return sum(self.size.conversations) * self.config.start.sft_epochs
        return 0.0

    def _trained_on(self, spec: StepSpec, counts: RoundCounts | None) -> float:
        """Training tokens of the round."""
        if (budget := spec.fields.get("token_budget")) is not None:
            return budget
        if counts is None:
            return 0.0
        pair = 2 * self.size.prompt + 2 * self.size.answer
        return (counts.human + counts.generated) * pair * self.config.train.epochs

    def _scored(self, spec: StepSpec, counts: RoundCounts | None, pair: float) -> float:
        size, file = self.size, spec.fields["file"]
        if "probe" in spec.fields:
            responses = 2 if file == "train.parquet" else 1
            return spec.fields["probe"] * responses * (size.prompt + size.answer) / _folds(spec)
        pairs = {"train.parquet": size.train, "heldout.parquet": size.heldout, "test.parquet": size.test}
        if file in pairs:
            return pairs[file] * pair / _folds(spec)
        side = spec.where["side"] if file == "responses.parquet" else "train"
        prompts = self._sampled(side, counts)
        if file == "pairs.parquet":
            return prompts * expected_pairs(self.config.pairing.rule, self.config.sampling.responses) * pair
        part = self.config.evaluate if side == "heldout" else self.config.sampling
        policies = 1 if side == "heldout" else sampled_policies(self.config.pairing.rule)
        return prompts * (size.prompt + policies * part.responses * part.max_tokens * SAMPLED_SHARE)

    def _sampled(self, side: str, counts: RoundCounts | None) -> int:
        """Prompts sampled on a side."""
        if side == "heldout":
            return min(self.config.evaluate.prompts, self.size.heldout)
        return 0 if counts is None else counts.prompts

    def _seconds(self, step: str, tokens: float) -> float | None:
        devices = self._devices(step)
        if step in self.measured:
            return round(tokens * self.measured[step] / devices, 1)
        if not tokens:
            return 1.0
        if self.size.shape is None:
            return None
        adapter = step in ("train", "sft") and self.config.train.method == "lora"
        cost = COST[step] * (0.7 if adapter else 1.0)
        return round(tokens * 2 * self.size.shape.parameters * cost / self.rate / devices + 2, 1)

    def _devices(self, step: str) -> int:
        """Accelerators that share the work of a step; processes on a CPU share its threads."""
        execution = self.config.execution
        if step != "train" or not accelerator_here(execution.device):
            return 1
        return training_processes(execution, self.config.train.batch)

    def _bytes(self, spec: StepSpec) -> int | None:
        size = self.size
        if spec.step not in ("model", "train", "sft"):
            return 3_000 * (size.train + size.heldout + size.test)
        if size.shape is None:
            return None
        if spec.step == "model":
            return 4 * size.shape.parameters
        if spec.step == "sft":
            return BYTES[self.config.model.dtype] * size.shape.parameters
        return 4 * trained_parameters(self.config.train, size.shape)

    def _memory(self, spec: StepSpec) -> int | None:
        """Bytes of main memory and of the accelerator's."""
        size, execution, fields = self.size, self.config.execution, spec.fields
        if (shape := size.shape) is None:
            return None
        prompt, sampled = size.longest_prompt, self.config.sampling.max_tokens
        device = "cuda" if accelerator_here(execution.device) else "cpu"
        if spec.step == "logps":
            answers = max(sampled, self.config.evaluate.max_tokens)
            row = max(prompt + answers, *(pair[0] + max(pair[1:]) for pair in size.longest))
            tokens = tokens_per_batch(execution, shape, fields["dtype"], row)
            return scoring_memory(shape, fields["dtype"], max(tokens, row), row, device)
        if spec.step == "sample" and fields["engine"] == "transformers":
            row = prompt + fields["max_tokens"]
            responses = sampling_batch(execution, shape, fields["dtype"], row)
            return sampling_memory(shape, fields["dtype"], responses, row, device)
        if spec.step == "train":
            generated, train = 2 * (prompt + sampled), self.config.train
            human = [2 * prompt + chosen + rejected for prompt, chosen, rejected in size.longest]
            pairs = [max(tokens, generated) for tokens in human] + [generated] * (train.batch - len(human))
            row = max(prompt + 2 * sampled, *map(sum, size.longest))
            processes = training_processes(execution, train.batch)
            count = micro_batch(execution, train, shape, fields["dtype"], pairs, row, processes)
            tokens, recompute = sum(sorted(pairs)[-count:]), execution.gradient_checkpointing
            shares = processes if execution.shard_weights else 1
            each = training_memory(shape, fields["dtype"], train, tokens, row, recompute, device, shares)
            return each * (processes if device == "cpu" else 1)  # GPUs have a memory of their own
        if spec.step == "sft" and size.conversations:
            train = self.config.train.model_copy(update={"batch": fields["batch"]})
            row, recompute = max(size.conversations), execution.gradient_checkpointing
            count = micro_batch(execution, train, shape, fields["dtype"], size.conversations, row)
            return fine_tuning_memory(shape, fields["dtype"], train, count * row, row, recompute, device)
        return None


def refuse_what_cannot_fit(config: SeraConfig, shape: ModelShape | None) -> None:
    """Refuse a run whose training cannot fit into memory, before its first round is scored.

    Args:
        config: the run's.
        shape: the model's; None if it is not on this machine: nothing is checked.

    Raises:
        InputError: weights, gradients and optimizer states alone need more than the machine or its
            accelerator has; or there are fewer GPUs than processes.
    """
    if shape is None:
        return
    processes = training_processes(config.execution, config.train.batch)
    apart = accelerator_here(config.execution.device)
    shares = processes if config.execution.shard_weights else 1
    least = least_training_memory(shape, config.model.dtype, config.train, shares)
    least *= 1 if apart else processes
    if least <= (total := device_memory(config.execution.device)[0]):
        return
    smaller = ""
    if config.train.method == "full":
        smaller = 'set train.method = "lora", or '
    elif config.model.dtype != "nf4":
        smaller = 'set model.dtype = "bfloat16" or "nf4", or '
    if processes > 1 and not apart:
        smaller = f"lower execution.processes = {processes}, or {smaller}"
    elif processes > 1 and shares == 1 and config.in_blocks is None:
        smaller = f"set execution.shard_weights = true, or {smaller}"
    raise InputError(
        f"training a model of {shape.parameters / 1e9:.3g} billion parameters cannot fit: weights, "
        f"gradients and optimizer states alone need {least / 2**30:.1f} GiB, and there are "
        f"{total / 2**30:.1f} GiB where it would run; {smaller}use a smaller model or a larger machine"
    )


def memory_warning(rows: Sequence[dict[str, Any]], device: str) -> Iterator[str]:
    """A warning if the step that needs the most memory needs more than is free where it computes.

    Args:
        rows: the steps to do, with their expected cost.
        device: `execution.device`.
    """
    planned = [row for row in rows if row["memory"] is not None]
    most = max(planned, key=lambda row: row["memory"], default=None)
    if most is not None and most["memory"] > (free := device_memory(device)[1]):
        yield (
            f"step {most['step']} may need {most['memory'] / 2**30:.1f} GiB of memory, but "
            f"{free / 2**30:.1f} GiB are free: lower {MEMORY_SETTINGS[most['step']]}, or use a larger machine"
        )


def _measured(store: Store, records: RunStore, apart: bool) -> dict[str, float]:
    """Seconds per token of each step in the run's finished rounds.

    Args:
        store: of the steps.
        records: the run's.
        apart: whether processes have an accelerator each; then seconds on one of them.
    """
    tokens: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for manifest in records.rounds():
        for ref in manifest.used:
            record = find_record(store, ref.step, ref.key)
            if record is not None and (count := _counted(record)):
                tokens[ref.step] = tokens.get(ref.step, 0) + count
                devices = record.environment.get("processes", 1) if apart else 1
                seconds[ref.step] = seconds.get(ref.step, 0) + record.seconds * devices
    return {step: seconds[step] / count for step, count in tokens.items()}


def _counted(record: StepRecord) -> int:
    names = {
        "logps": "tokens/scored",
        "sample": "tokens/sampled",
        "train": "tokens/trained",
        "sft": "tokens/fine_tuned",
    }
    name = FOLD_TOKENS if record.step == "train" and "fold" in record.fields else names.get(record.step, "")
    return int(record.metrics.get(name, 0))
