"""Supervised fine-tuning before round 0: model and examples in, start policy and log out; resumes from
checkpoints."""

import json
import logging
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.schema import IGNORED
from sera_core.artifacts.step import Attempt
from sera_core.config import TrainConfig
from sera_core.errors import InputError, SeraError
from sera_core.models.architecture import positions, refuse_beyond_index_topk
from sera_core.models.batch_sizes import few_tokens, micro_batch
from sera_core.models.devices import device_of
from sera_core.models.memory_estimate import fine_tuning_memory, folder_shape
from sera_core.models.policies import load_policy, load_tokenizer, save_policy, weights_digest
from sera_core.models.shared_policies import release_policies
from tasks.engines.library_logs import hide_library_notices
from tasks.engines.stored_checkpoints import latest_checkpoint, store_checkpoint
from tasks.engines.tracking import ended, refuse_missing, trackers
from tasks.engines.trainer_arguments import trainer_arguments

LOG = logging.getLogger("sera.train")
RATE = "start.sft_learning_rate"
START_BOUND = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest difference between trainer and scorer at step 0 by dtype, in nats per answer token."""


def fine_tune(attempt: Attempt) -> list[str]:
    """Write policy/, a complete folder in the run's dtype, and log.jsonl (one line per step, without times).

    Raises:
        InputError: an example exceeds the model's positions, or a tracking package is missing.
        SeraError: the loss or a weight is not finite, or trainer and scorer disagree at step 0.
    """
    refuse_missing(attempt.execution.tracking)
    run = FineTuning(attempt)
    with tempfile.TemporaryDirectory(prefix="sera-sft-") as scratch, hide_library_notices():
        trainer = run.build(Path(scratch))
        with ended(attempt.execution.tracking):
            trainer.train()
        files = run.write_policy(Path(scratch))
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in run.lines)
    attempt.write("log.jsonl").write_text(text)
    run.report()
    return [*files, "log.jsonl"]


@dataclass(frozen=True)
class Examples:
    """The sequences to train on, in the file's order."""

    ids: list[list[int]]
    labels: list[list[int]]

    @classmethod
    def read(cls, path: Path) -> "Examples":
        """Read examples.parquet."""
        table = schema.read_table(path, schema.EXAMPLES)
        return cls(table.column("ids").to_pylist(), table.column("labels").to_pylist())

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.ids]

    @cached_property
    def answers(self) -> list[int]:
        """Answer tokens of each example."""
        return [sum(label != IGNORED for label in labels) for labels in self.labels]

    def scored(self, rows: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """(everything before an answer, the answer) of every answer of these rows."""
        return [
            (self.ids[row][:start], self.ids[row][start:end])
            for row in rows
            for start, end in answer_spans(self.labels[row])
        ]


def answer_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of answer tokens."""
    found: list[tuple[int, int]] = []
    for at, label in enumerate(labels):
        if label == IGNORED:
            continue
        start = found.pop()[0] if found and found[-1][1] == at else at
        found.append((start, at + 1))
    return found


def shuffled_passes(count: int, epochs: int, seed: int) -> list[int]:
    """Rows in training order: each pass shuffled by the seed and its number."""
    order: list[int] = []
    for number in range(epochs):
        rows = list(range(count))
        random.Random(derived_seed("sft", seed, number)).shuffle(rows)
        order += rows
    return order


class FineTuning:
    """State of one attempt at the fine-tuning: settings, data, log and checkpoint position."""

    def __init__(self, attempt: Attempt) -> None:
        fields = attempt.fields
        self.attempt = attempt
        self.train = TrainConfig.model_validate(
            fields["train"] | {"batch": fields["batch"], "epochs": fields["epochs"]}
        )
        self.dtype = fields["dtype"]
        self.examples = Examples.read(attempt.input("examples").path("examples.parquet"))
        self.order = shuffled_passes(len(self.examples.ids), fields["epochs"], fields["seed"])
        self.seed = derived_seed("sft", fields["seed"]) % 2**32
        self.start = attempt.input("model").folder("policy")
        self.device = device_of(attempt.execution.device)
        self.lines: list[dict[str, Any]] = []
        self.expected: float | None = None
        """The scorer's loss of the first batch, in nats per answer token; None after a checkpoint."""
        self.trainable = 0

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return math.ceil(len(self.order) / self.train.batch)

    def rows_of(self, step: int) -> list[int]:
        """Rows of a step's global batch."""
        return self.order[step * self.train.batch : (step + 1) * self.train.batch]

    # ------------------------------------------------------------------------------------------ building

    def build(self, scratch: Path) -> Any:
        """Create the trainer, resumed from the last checkpoint if there is one."""
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig

        from sera_core.models.dropout import disable_dropout
        from tasks.engines.optimizers import warmup_schedule
        from tasks.engines.sft_trainer import AnswerTrainer, ExampleCollator
        from tasks.engines.step_hooks import StepHooks
        from tasks.engines.trained_weights import TrainedWeights

        release_policies()
        size, checkpoint = self._plan_batches(), latest_checkpoint(self.attempt)
        self.model = self._load_model(checkpoint is None)
        self.weights = TrainedWeights(self.model, self._exact_weights())
        disable_dropout(self.model)
        self.optimizer = self._make_optimizer(checkpoint)
        first, execution, where = len(self.lines), self.attempt.execution, self.attempt.spec.where
        common = trainer_arguments(
            scratch, self.train, self.seed, execution, f"{where.get('run', 'sera')}-sft"
        )
        arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        arguments._n_gpu = min(1, arguments.n_gpu)  # train on one device, even if more are visible
        left = self.order[first * self.train.batch :]
        columns = {"input_ids": self.examples.ids, "labels": self.examples.labels}
        tokenizer = load_tokenizer(self.start)
        hooks = StepHooks(first, lambda: self._begin(checkpoint), self._check, self._done)
        self.trainer = AnswerTrainer(
            model=self.model,
            args=arguments,
            rows=Dataset.from_dict(columns).select(left),
            tokenizer=tokenizer,
            optimizers=(
                self.optimizer,
                warmup_schedule(self.optimizer, self.train.warmup * self.steps, first),
            ),
            callbacks=[hooks, *trackers(execution.tracking, where.get("logs") or str(scratch))],
            collator=ExampleCollator(size),
            clip=self.weights.clip,
        )
        return self.trainer

    def _plan_batches(self) -> int:
        """Choose the micro-batch, and plan its memory."""
        shape, tokens = folder_shape(self.start), self.examples.tokens
        execution, longest = self.attempt.execution, max(self.examples.tokens)
        size = micro_batch(execution, self.train, shape, self.dtype, tokens, longest)
        recompute, most = execution.gradient_checkpointing, size * longest
        self.attempt.memory.planned = fine_tuning_memory(
            shape, self.dtype, self.train, most, longest, recompute, self.device
        )
        return size

    def _load_model(self, fresh: bool) -> Any:
        """The model to train, with weights of the run's dtype. `fresh`: without a checkpoint."""
        model = load_policy(self.start, self.dtype, self.device)
        longest, limit = max(self.examples.tokens), positions(model)
        if limit is not None and longest > limit:
            raise InputError(
                f"start.sft: an example has {longest} tokens, but the model has {limit} positions"
            )
        refuse_beyond_index_topk(model, longest)
        if fresh:
            self.expected = self._scored_loss(model)
        if self.train.method == "full":
            return model
        from tasks.engines.adapters import new_adapter

        return new_adapter(model, self.train, self.seed)

    def _scored_loss(self, model: Any) -> float:
        """The scorer's value of the loss of the first batch, nats per answer token."""
        from sera_core.models.logprobs import sequence_logps

        rows = self.rows_of(0)
        items, budget = self.examples.scored(rows), few_tokens(self.attempt.execution)
        logps = sequence_logps(model, items, tokens_per_batch=budget)
        return -float(logps.sum()) / sum(self.examples.answers[row] for row in rows)

    def _exact_weights(self) -> dict[str, Any] | None:
        """The model's weights in float32, if the model to train has rounded them."""
        if self.train.method == "lora" or self.dtype == "float32":  # an adapter is in float32 anyway
            return None
        return dict(load_policy(self.start, "float32", self.device).named_parameters())

    def _make_optimizer(self, checkpoint: dict[str, Path] | None) -> Any:
        """The optimizer of the trained weights; restores weights, moments and log from a checkpoint."""
        from tasks.engines.checkpoints import load_checkpoint
        from tasks.engines.optimizers import optimizer_of

        optimizer = optimizer_of(self.train.optimizer, self.weights, self.attempt.fields["learning_rate"])
        self.trainable = sum(weight.numel() for weight in self.weights.named.values())
        if checkpoint is not None:
            self.lines = load_checkpoint(checkpoint, self.weights.named, optimizer)["log"]
            self.weights.to_model()
        return optimizer

    # ----------------------------------------------------------------------------------------- each step

    def _begin(self, checkpoint: dict[str, Path] | None) -> None:
        from tasks.engines.checkpoints import restore_rng

        if checkpoint is not None:
            restore_rng(checkpoint["rng.safetensors"])

    def _check(self, step: int) -> None:
        """Before an update: the loss is finite, and at step 0 that of the scorer."""
        loss = self.trainer.batch_loss
        if not math.isfinite(loss):
            raise SeraError(
                f"start.sft, step {step}: the loss is {loss}; lower {RATE}, or drop the conversation"
            )
        if step == 0 and self.expected is not None and abs(loss - self.expected) > START_BOUND[self.dtype]:
            raise SeraError(
                f"start.sft: the loss at step 0 is {loss:.5f} nats per answer token, but the scorer finds "
                f"{self.expected:.5f}: trainer and scorer do not compute the same model; this is a defect of "
                "sera-flow or of its libraries with this architecture"
            )

    def _done(self, step: int, logs: dict[str, float]) -> None:
        """After an update: log a line, report progress, and write a checkpoint if due."""
        rows = self.rows_of(step)
        before = self.lines[-1]["tokens/fine_tuned"] if self.lines else 0
        metrics = {name: value for name, value in logs.items() if name != "epoch"}
        self.lines.append(
            {
                "step": step,
                **metrics,
                "examples": len(rows),
                "answer_tokens": sum(self.examples.answers[row] for row in rows),
                "tokens/fine_tuned": before + sum(self.examples.tokens[row] for row in rows),
            }
        )
        LOG.info("fine-tuning, step %d of %d: loss %.4g", step + 1, self.steps, metrics["loss"])
        done = min((step + 1) * self.train.batch, len(self.order))
        self.attempt.progress(done, len(self.order), "conversations")
        every = self.attempt.execution.checkpoint_steps
        if every and (step + 1) % every == 0 and step + 1 < self.steps:
            state = {"step": step + 1, "log": self.lines}
            store_checkpoint(self.attempt, self.weights.named, self.optimizer, state, RATE)

    # -------------------------------------------------------------------------------------------- result

    def write_policy(self, scratch: Path) -> list[str]:
        """Write policy/…: weights in the run's dtype, an adapter merged; everything else from the model."""
        from tasks.engines.checkpoints import refuse_not_finite

        refuse_not_finite(self.weights.named, self.steps - 1, RATE)
        self.weights.finish(self.model)
        folder = self.attempt.write("policy/config.json").parent
        start = self.attempt.input("model").folder("policy")  # check its files again after training
        model = self._merged(start, scratch / "adapter") if self.train.method == "lora" else self.model
        save_policy(model, start, folder, self.dtype)
        return sorted(f"policy/{path.name}" for path in folder.iterdir())

    def _merged(self, start: Path, adapter: Path) -> Any:
        """The model with the adapter merged into its weights, in float32."""
        save_policy(self.model, start, adapter)
        del self.model, self.trainer, self.optimizer, self.weights  # gives their memory back
        return load_policy(adapter, "float32", base=start)

    def report(self) -> None:
        """Set the counts and metrics of the step's record."""
        seen = sum(line["answer_tokens"] for line in self.lines)
        assert sum(line["examples"] for line in self.lines) == len(self.order), "not the planned examples"
        self.attempt.counts["examples"] = len(self.examples.ids)
        self.attempt.metrics |= {
            "train_loss": sum(line["loss"] * line["answer_tokens"] for line in self.lines) / seen,
            "first_loss": self.lines[0]["loss"],
            "last_loss": self.lines[-1]["loss"],
            "tokens/fine_tuned": self.lines[-1]["tokens/fine_tuned"],
            "answer_tokens": seen,
            "steps": len(self.lines),
            "learning_rate": self.attempt.fields["learning_rate"],
            "trainable_parameters": self.trainable,
            "weights/start": weights_digest(self.start),
            "weights/result": weights_digest(self.attempt.folder / "policy"),
        }
