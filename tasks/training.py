"""Train one round: start policy and mixture in, policy and log out; resumes from checkpoints."""

import json
import logging
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sera_core.artifacts.local_store import disk_full_error
from sera_core.artifacts.step import Attempt
from sera_core.errors import SeraError
from sera_core.models.architecture import refuse_beyond_index_topk
from sera_core.models.batch_sizes import few_tokens
from sera_core.models.devices import device_of, training_processes
from sera_core.models.policies import load_policy, load_tokenizer, save_policy, weights_digest
from sera_core.models.shared_policies import release_policies
from sera_core.steps import FOLD_TOKENS
from tasks.engines.child_step import Channel
from tasks.engines.library_logs import hide_library_notices
from tasks.engines.members import speaking
from tasks.engines.planned_training import PlannedTraining
from tasks.engines.processes import SharedAttempt, train_in_processes
from tasks.engines.start_check import Probe, StartCheck, StartDiffersError
from tasks.engines.stored_checkpoints import latest_checkpoint, store_checkpoint
from tasks.engines.tracking import ended, trackers

if TYPE_CHECKING:
    from tasks.engines.ranks import Ranks

LOG = logging.getLogger("sera.train")


def train_policy(attempt: Attempt) -> list[str]:
    """Write policy/ and log.jsonl (one line per optimizer step, without times).

    Raises:
        InputError: the mixture cannot be used for training, or a tracking package is missing.
        SeraError: policy and reference should be equal at step 0 but differ, or the loss or a weight is not
            finite.
    """
    run = TrainingRun(attempt)
    run.refuse_unusable()
    count = training_processes(attempt.execution, run.train.batch)
    if count > 1:
        return train_in_processes(attempt, count, f"{__name__}:train_as_rank")
    try:
        files = _train(run)
    except StartDiffersError as error:
        LOG.warning("%s; retrying once", error)
        run = TrainingRun(attempt, first_margin=error.margin)
        files = _train(run)
    return _finish(run, files)


def train_as_rank(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train as one of several processes; only the first one writes the files.

    Args:
        request: see `tasks.engines.processes`.
        channel: to the owner of the attempt.

    Returns:
        files, counts, metrics (of the first process), and grown: bytes by which memory grew.
    """
    rank = request["rank"]
    from tasks.engines.ranks import meet, part

    attempt, folder = SharedAttempt(request, channel), Path(rank["folder"])
    device = device_of(attempt.execution.device)
    ranks = meet(folder / "meeting", rank["rank"], rank["count"], device)
    # only the first speaks, because the others would repeat it
    with speaking(channel) if ranks.first else nullcontext(), attempt.memory:
        try:
            run = TrainingRun(attempt, rank["first_margin"], ranks)
            files = _train(run, folder)
            files = _finish(run, files) if ranks.first else []
        except StartDiffersError as error:
            channel.tell(margin=error.margin)
            raise
        except OSError as error:
            if (trouble := disk_full_error(error, attempt.folder)) is None:
                raise
            raise trouble from error
    part()
    return {
        "files": files,
        "counts": attempt.counts,
        "metrics": attempt.metrics,
        "grown": attempt.memory.grown,
    }


def _train(run: "TrainingRun", folder: Path | None = None) -> list[str]:
    """Train and write the policy; temporary files go below `folder`."""
    with tempfile.TemporaryDirectory(prefix="sera-train-", dir=folder) as scratch, hide_library_notices():
        trainer = run.build(Path(scratch))
        with ended(run.tracking):
            trainer.train()
        return run.write_policy(trainer.model)


def _finish(run: "TrainingRun", files: list[str]) -> list[str]:
    """Write the log and set the record's metrics; returns all files."""
    lines = (json.dumps(line, sort_keys=True) + "\n" for line in run.lines)
    run.attempt.write("log.jsonl").write_text("".join(lines))
    run.report()
    return [*files, "log.jsonl"]


class TrainingRun(PlannedTraining):
    """State of one training attempt: the plan, model, log and checkpoint position."""

    def __init__(
        self, attempt: Attempt, first_margin: float | None = None, ranks: "Ranks | None" = None
    ) -> None:
        """State of a try.

        Args:
            attempt: the step's.
            first_margin: margin at step 0, in nats, with which the first try was refused; else None.
            ranks: the processes that train together; None: this one alone.
        """
        super().__init__(attempt, ranks)
        self.lines: list[dict[str, Any]] = []
        self.step0: dict[str, float] = {}
        self.start_check = StartCheck(self.mixture, self.rows_of(0), self.train.beta, self.bf16, first_margin)
        self.probe: Probe = {}
        self.trainable = 0

    @property
    def must_start_at_zero(self) -> bool:
        """Whether every margin of the first batch must be zero up to noise."""
        return self.train.needs_reference and self.attempt.fields["start_is_reference"]

    def pair_id(self, pair: dict[str, Any]) -> str:
        """The pair_id of one of `ReviewedDPOTrainer.pairs`."""
        return self.mixture.pair_id(pair["row"])

    # ------------------------------------------------------------------------------------------ building

    def build(self, scratch: Path) -> Any:
        """Create the trainer, resumed from the last checkpoint if there is one."""
        from sera_core.models.dropout import disable_dropout
        from tasks.engines.optimizers import warmup_schedule

        release_policies()
        self.plan_batches()
        checkpoint = latest_checkpoint(self.attempt)
        if checkpoint is None and self.first:
            self.probe = self._score_probe()
        self.model, transformer = self._load_model()
        disable_dropout(self.model)
        text_config = transformer.config.get_text_config()
        self.mixture.refuse_lengths(getattr(text_config, "max_position_embeddings", None))
        refuse_beyond_index_topk(transformer, self.mixture.longest_sequence)
        if checkpoint is not None:
            state = json.loads(checkpoint["state.json"].read_text())
            self.lines, self.step0 = state["log"], state["step0"]
        first = len(self.lines)
        self.trainer = self._make_trainer(scratch, transformer, checkpoint)
        self.weights = self._weights_of(transformer)
        self.optimizer = self._make_optimizer(checkpoint)
        self._refuse_apart(first)
        schedule = warmup_schedule(self.optimizer, self.train.warmup * self.steps, first)
        self.trainer.change(self.weights, self.optimizer, schedule)
        return self.trainer

    def _make_trainer(self, scratch: Path, transformer: Any, checkpoint: dict[str, Path] | None) -> Any:
        """The trainer of the steps that are left. It probes the model, which has to be whole for that."""

        from tasks.engines.dpo_trainer import ReviewedDPOTrainer
        from tasks.engines.pair_forward import can_share_prompt
        from tasks.engines.step_hooks import StepHooks

        first, share = len(self.lines), can_share_prompt(transformer, self.mixture.longest)
        if self.shards:
            from tasks.engines.sharded_weights import refuse_uneven_passes

            refuse_uneven_passes(transformer, share)
        logs = self.attempt.spec.where.get("logs") or str(scratch)
        hooks = StepHooks(first, lambda: self._begin(checkpoint), self._check, self._done)
        return ReviewedDPOTrainer(
            model=self.model,
            train=self.train,
            args=self.trl_arguments(scratch),
            rows=self.mixture.dataset(scratch).select(self.order[first * self.train.batch :]),
            tokenizer=load_tokenizer(self.start),
            optimizers=(None, None),  # see `change`
            callbacks=[hooks, *trackers(self.tracking, logs)],
            micro_batch=self.micro_batch,
            share=share,
            ranks=self.ranks,
        )

    def _weights_of(self, transformer: Any) -> Any:
        """The weights to train; the model's are shared by rows first if they are to be."""
        from tasks.engines.trained_weights import TrainedWeights

        if not self.shards:
            return TrainedWeights(self.model, self._exact_weights(self.device) if self.rounded else None)
        from tasks.engines.sharded_weights import ShardedWeights

        assert self.ranks is not None
        exact = (lambda: self._exact_weights("cpu")) if self.rounded else None
        return ShardedWeights(self.model, transformer, self.ranks, self.device, exact)

    def _refuse_apart(self, step: int) -> None:
        """Check that all processes hold the same weights after so many steps; a shared row is held once."""
        if self.ranks is not None and not self.shards:
            self.ranks.refuse_apart(self.weights.named, step)

    def _make_optimizer(self, checkpoint: dict[str, Path] | None) -> Any:
        """The optimizer of the trained weights; restores weights, moments and log from a checkpoint."""
        from tasks.engines.checkpoints import load_checkpoint
        from tasks.engines.optimizers import optimizer_of

        optimizer = optimizer_of(self.train.optimizer, self.weights, self.attempt.fields["learning_rate"])
        self.trainable = sum(weight.numel() for weight in self.weights.named.values())  # of all processes
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.weights.named, optimizer)
            self.weights.to_model()
        return optimizer

    def _load_model(self) -> tuple[Any, Any]:
        """(model to train, its transformer).

        It computes with weights of the run's dtype, the base of an adapter too, so that it is the same model
        in training, scoring and sampling.
        """
        if self.train.method == "full":
            model = load_policy(self.start, self.attempt.fields["dtype"], self.device)
            return model, model
        from peft import PeftModel

        from tasks.engines.adapters import new_adapter

        folder = self.attempt.input("model").folder("policy")
        base = load_policy(folder, self.attempt.fields["dtype"], self.device)
        if self.starts_from_adapter:
            return PeftModel.from_pretrained(base, str(self.start), is_trainable=True), base
        return new_adapter(base, self.train, self.seed), base

    def _exact_weights(self, device: str) -> dict[str, Any]:
        """The start policy's weights in float32."""
        return dict(load_policy(self.start, "float32", device).named_parameters())

    # ----------------------------------------------------------------------------------------- each step

    def _begin(self, checkpoint: dict[str, Path] | None) -> None:
        from tasks.engines.checkpoints import restore_rng

        if checkpoint is not None:
            restore_rng(checkpoint["rng.safetensors"])

    def _check(self, step: int) -> None:
        """Before an update: check the batch's pairs, that values are finite, and the margins at step 0."""
        pairs = self.trainer.pairs()
        assert sorted(pair["row"] for pair in pairs) == sorted(self.rows_of(step)), "not the planned pairs"
        for pair in pairs:
            if not all(map(math.isfinite, pair.values())):
                raise SeraError(
                    f"step {step}, pair {self.pair_id(pair)}: log-probabilities or loss are not finite "
                    f"({pair}); lower train.learning_rate, or drop the pair"
                )
        if step == 0 and self.first:
            self._check_start(pairs)

    def _check_start(self, pairs: list[dict[str, Any]]) -> None:
        self.step0 = self.start_check.margins(pairs)
        if self.must_start_at_zero:
            self.step0 |= self.start_check.refuse_other_reference(pairs, self.probe)

    def _score_probe(self) -> Probe:
        if not self.must_start_at_zero:
            return {}
        base = self.attempt.input("model").folder("policy")
        policy = load_policy(self.start, self.attempt.fields["dtype"], self.device, base=base)
        return self.start_check.score(policy, few_tokens(self.attempt.execution))

    def _done(self, step: int, logs: dict[str, float]) -> None:
        """After an update: log a line, report progress, and write a checkpoint if due."""
        rows = self.rows_of(step)
        tokens = (self.lines[-1]["tokens/trained"] if self.lines else 0) + sum(
            self.mixture.tokens[row] for row in rows
        )
        metrics = {name: value for name, value in logs.items() if name != "epoch"}
        self.lines.append({"step": step, **metrics, "pairs": len(rows), "tokens/trained": tokens})
        summary = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        LOG.info("step %d of %d: %s", step + 1, self.steps, summary)
        self.attempt.progress(min((step + 1) * self.train.batch, len(self.order)), len(self.order), "pairs")
        every = self.attempt.execution.checkpoint_steps
        if every and (step + 1) % every == 0 and step + 1 < self.steps:
            self._save_checkpoint(step + 1)

    def _save_checkpoint(self, step: int) -> None:
        self._refuse_apart(step)
        state = {"step": step, "log": self.lines, "step0": self.step0}
        parameters, sharded = self.weights.named, self.weights.sharded
        store_checkpoint(self.attempt, parameters, self.optimizer, state, ranks=self.ranks, sharded=sharded)

    # -------------------------------------------------------------------------------------------- result

    def write_policy(self, model: Any) -> list[str]:
        """Write policy/…: weights from the model, everything else from the start policy."""
        from tasks.engines.checkpoints import refuse_not_finite

        refuse_not_finite(self.weights.named, self.steps - 1)
        self._refuse_apart(self.steps)
        self.optimizer.state.clear()  # the weights are gathered in the place of their moments
        weights = self.weights.whole(model)
        if not self.first:
            return []
        self.weights.finish(model)
        folder = self.attempt.write("policy/config.json").parent
        start = self.attempt.input("start").folder("policy")  # check its files again after training
        save_policy(model, start, folder, weights=weights)
        if self.train.method == "lora":
            base = self.attempt.input("model").ref.model_dump()
            (folder / "base.json").write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")
        return sorted(f"policy/{path.name}" for path in folder.iterdir())

    def report(self) -> None:
        """Set the counts and metrics of the step's record."""
        seen = sum(line["pairs"] for line in self.lines)
        assert seen == len(self.order), f"{seen} pairs were trained on where {len(self.order)} were planned"
        self.attempt.counts["pairs"] = len(self.rows)
        trained = "tokens/trained" if self.fold is None else FOLD_TOKENS
        self.attempt.metrics |= {
            "train_loss": sum(line["loss"] * line["pairs"] for line in self.lines) / seen,
            **self.step0,
            **{name: self.lines[-1][name] for name in ("rewards/margins", "rewards/accuracies")},
            trained: self.lines[-1]["tokens/trained"],
            "steps": len(self.lines),
            "pairs": seen,
            "learning_rate": self.attempt.fields["learning_rate"],
            "trainable_parameters": self.trainable,
            "weights/start": weights_digest(self.start),
            "weights/result": weights_digest(self.attempt.folder / "policy"),
        }
        if self.train.smooths_by_consistency:
            self.attempt.metrics["consistency"] = self.consistency
