"""A round's training before a model is loaded: its pairs and their order, what it refuses, its batches."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.step import Attempt
from sera_core.config import TrainConfig
from sera_core.data.folds import fold_of
from sera_core.errors import InputError, SeraError
from sera_core.models.batch_sizes import micro_batch
from sera_core.models.devices import device_of
from sera_core.models.memory_estimate import folder_shape, training_memory
from tasks.engines.heads_consistency import heads_consistency
from tasks.engines.tracking import refuse_missing
from tasks.engines.trainer_arguments import trainer_arguments
from tasks.engines.training_data import ORIGINS, Mixture, fold_order, training_order

if TYPE_CHECKING:
    from tasks.engines.ranks import Ranks


class PlannedTraining:
    """One training attempt: settings, data and order."""

    def __init__(self, attempt: Attempt, ranks: "Ranks | None") -> None:
        """Read the mixture and plan the order.

        Args:
            attempt: the step's.
            ranks: the processes that train together; None: this one alone.
        """
        fields, self.ranks = attempt.fields, ranks
        self.attempt, self.train = attempt, TrainConfig.model_validate(fields["train"])
        self.bf16 = fields["dtype"] != "float32"
        path = attempt.input("mixture").path("mixture.parquet")
        self.consistency = heads_consistency(attempt)
        smoothing = self._smoothing()
        self.mixture = Mixture.read(path, self.train.needs_reference, smoothing)
        seed = (fields["seed"], fields["round"])
        self.fold, self.rows = fold_of(fields), list(range(len(self.mixture.pair_ids)))
        settings = (self.train.batch, self.train.epochs, seed, fields.get("token_budget"))
        if self.fold is None:
            self.order = training_order(self.mixture.tokens, *settings)
        else:
            held = set(self.fold.rows(path).tolist())
            self.rows = [row for row in self.rows if row not in held]
            self.order = fold_order(self.mixture.tokens, self.rows, self.fold.of, *settings)
        self.seed = derived_seed("train", *seed) % 2**32
        self.start = attempt.input("start").folder("policy")
        self.device = device_of(attempt.execution.device)
        self.micro_batch = 0

    def _smoothing(self) -> dict[str, float]:
        """Label smoothing ε of the pairs, by origin."""
        if isinstance(fixed := self.train.label_smoothing, float):
            return dict.fromkeys(ORIGINS, fixed)
        return {"human": 0.0, "generated": 0.0 if self.consistency is None else 1 - self.consistency}

    @property
    def first(self) -> bool:
        """Whether this process writes and reports: it trains alone, or is the first of several."""
        return self.ranks is None or self.ranks.first

    @property
    def tracking(self) -> str:
        """`execution.tracking` of this process."""
        return self.attempt.execution.tracking if self.first else "none"

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return math.ceil(len(self.order) / self.train.batch)

    def rows_of(self, step: int) -> list[int]:
        """Rows of a step's global batch."""
        return self.order[step * self.train.batch : (step + 1) * self.train.batch]

    def refuse_unusable(self) -> None:
        """All checks that do not need a loaded model."""
        if not self.order:
            raise InputError(self._no_pairs())
        refuse_missing(self.attempt.execution.tracking)
        if self.train.method == "full" and self.starts_from_adapter:
            raise SeraError(
                'the start policy is an adapter, but train.method is "full"; keep one method per run'
            )
        if self.train.method == "lora":
            self._refuse_other_base()

    def _no_pairs(self) -> str:
        if self.fold is None or not self.mixture.pair_ids.size:
            return "the mixture has no pairs; select or sample more"
        return (
            f"review.crossfit = {self.fold.of}: all {len(self.mixture.pair_ids)} pairs of round "
            f"{self.attempt.fields['round']} have prompts of fold {self.fold.out + 1}, so none is left for "
            "training its policy, and these settings are fixed in a run: start a new run that keeps more "
            "pairs, has another seed, or review.crossfit = 0"
        )

    @property
    def starts_from_adapter(self) -> bool:
        """Whether the start policy is the adapter of an earlier round."""
        return (self.start / "adapter_config.json").is_file()

    def _refuse_other_base(self) -> None:
        """Check that the start adapter belongs to the run's model."""
        start, model = self.attempt.input("start").ref, self.attempt.input("model").ref
        base = start.model_dump()
        if self.starts_from_adapter:
            base = json.loads((self.start / "base.json").read_text())
        if base["digest"] != model.digest:
            raise SeraError(
                f"the start policy's base has the weights {base['digest'][:12]}…, but the run's model is "
                f"{model.digest[:12]}…: an adapter works only with its base; start from the run's model"
            )

    @property
    def rounded(self) -> bool:
        """Whether the model to train has rounded weights; an adapter is in float32 anyway."""
        return self.train.method == "full" and self.bf16

    @property
    def shards(self) -> bool:
        """Whether processes share the weights by rows."""
        return self.ranks is not None and self.attempt.execution.shard_weights

    def plan_batches(self) -> None:
        """Choose the micro-batch, and plan its memory."""
        shape = folder_shape(self.attempt.input("model").folder("policy"))
        dtype, longest = self.attempt.fields["dtype"], self.mixture.longest
        count, execution = 1 if self.ranks is None else self.ranks.count, self.attempt.execution
        self.micro_batch = micro_batch(
            execution, self.train, shape, dtype, self.mixture.tokens, longest, count
        )
        largest = sorted(self.mixture.tokens)[-self.micro_batch :]
        recompute, shares = execution.gradient_checkpointing, count if self.shards else 1
        planned = training_memory(
            shape, dtype, self.train, sum(largest), longest, recompute, self.device, shares
        )
        self.attempt.memory.planned = planned

    def trl_arguments(self, scratch: Path) -> Any:
        """The settings as TRL takes them."""
        from trl.trainer.dpo_config import DPOConfig

        from tasks.engines.dpo_trainer import trl_losses

        (losses, weights), smoothing = trl_losses(self.train), self.train.label_smoothing
        execution = self.attempt.execution.model_copy(update={"tracking": self.tracking})
        arguments = DPOConfig(
            **trainer_arguments(scratch, self.train, self.seed, execution, self._tracked_as()),
            max_length=None,
            precompute_ref_log_probs=True,
            beta=self.train.beta,
            loss_type=losses,
            loss_weights=weights or None,
            ld_alpha=None if self.train.ld_alpha == 1 else self.train.ld_alpha,
            use_weighting=self.train.pair_weights == "wpo",
            label_smoothing=smoothing if isinstance(smoothing, float) else 0.0,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # train on one device, even if more are visible
        return arguments

    def _tracked_as(self) -> str:
        """Name of the tracker's run."""
        fold = "" if self.fold is None else f"-fold-{self.fold.out}"
        return f"{self.attempt.spec.where.get('run', 'sera')}-round-{self.attempt.fields['round']}{fold}"
