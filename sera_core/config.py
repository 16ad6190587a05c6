"""One experiment's configuration: its sections, the rules that bind them, and what follows from them.

Command line, form, manifest and the table of settings come from here.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo, model_validator

from sera_core.data.folds import Fold
from sera_core.effects import refuse_ineffective
from sera_core.extensions import is_own, own_function
from sera_core.judges.names import candidates_file, is_model
from sera_core.method.pairing import ANCHORED
from sera_core.method.panel import column_of
from sera_core.method.selection import BY_VARIANCE
from sera_core.models.four_bits import ADAMW_8BIT
from sera_core.settings.data import DataConfig, ModelConfig, Source, StartConfig
from sera_core.settings.deciding import DecideConfig, EvaluateConfig, LimitsConfig
from sera_core.settings.execution import ExecutionConfig
from sera_core.settings.kinds import AUTO, CHOSEN, NO_SFT, Dtype, Loss, Part, Precision
from sera_core.settings.review import MixConfig, PairingConfig, ReviewConfig, SamplingConfig, SelectConfig
from sera_core.settings.training import TrainConfig

__all__ = [
    "AUTO",
    "CHOSEN",
    "NO_SFT",
    "DataConfig",
    "DecideConfig",
    "Dtype",
    "EvaluateConfig",
    "ExecutionConfig",
    "LimitsConfig",
    "Loss",
    "MixConfig",
    "ModelConfig",
    "PairingConfig",
    "Precision",
    "ReviewConfig",
    "SamplingConfig",
    "SelectConfig",
    "SeraConfig",
    "Source",
    "StartConfig",
    "TrainConfig",
]  # fmt: skip


class SeraConfig(Part):
    """One experiment: one model aligned on one set of preferences."""

    model: ModelConfig
    start: StartConfig = StartConfig()
    data: DataConfig
    review: ReviewConfig = ReviewConfig()
    select: SelectConfig = SelectConfig()
    select_generated: SelectConfig = SelectConfig()
    """Which generated pairs to keep: the same settings as [select], set separately."""
    sampling: SamplingConfig = SamplingConfig()
    pairing: PairingConfig = PairingConfig()
    mix: MixConfig = MixConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decide: DecideConfig = DecideConfig()
    limits: LimitsConfig = LimitsConfig()
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = 0
    """Seed of everything except the split."""

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> "SeraConfig":
        """A configuration from a run's record.

        It was checked when the run started, so rules added since then do not make an old run unreadable.
        """
        return cls.model_validate(data, context={"stored": True})

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> "SeraConfig":
        if (info.context or {}).get("stored"):
            return self
        self.check_own_code()
        refuse_ineffective(self)
        self._check_precision()
        self._check_sharding()
        self._check_judge()
        decide = self.decide
        if decide.review == "always" and decide.review_default in ("hold", "roll_back"):
            raise ValueError(
                f'decide.review_default = "{decide.review_default}" cannot answer for round 0, which '
                'decide.review = "always" asks about: the run would be left without a head. Choose '
                '"promote" or "stop", or ask with decide.review = "alarm"'
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "SeraConfig":
        train, score = self.train, self.score
        if self.select.rule == BY_VARIANCE:
            raise ValueError(
                f'select.rule = "{BY_VARIANCE}" compares responses of a prompt, human pairs have two: '
                "set select_generated.rule"
            )
        if train.loss_weights and len(train.loss_weights) != len(train.losses):
            raise ValueError(
                f"train.loss_weights has {len(train.loss_weights)} values for {len(train.losses)} losses; "
                "give one each"
            )
        if not train.ranking_losses:
            raise ValueError(
                'train.losses = ["sft"] compares no answers, so there is nothing to review by; name another '
                'loss beside it, as in ["sigmoid", "sft"]'
            )
        if len(set(train.losses)) != len(train.losses):
            raise ValueError("train.losses names a loss twice; give it once, with a larger weight")
        if train.tokens and not any(train.tokens):
            raise ValueError("train.tokens holds no number above 0; leave it empty, and train.epochs decides")
        if self.execution.processes != AUTO and int(self.execution.processes) > train.batch:
            raise ValueError(
                f"execution.processes = {self.execution.processes}, but a step of training has "
                f"{train.batch} pairs (train.batch), so some processes would have none; lower it"
            )
        if len(set(self.evaluate.harness)) != len(self.evaluate.harness):
            raise ValueError("evaluate.harness names a task file twice; give each once")
        if len(set(self.decide.panel)) != len(self.decide.panel):
            raise ValueError("decide.panel names a feature twice; give each once")
        if self.decide.uses_feature and self.decide.feature not in self.decide.panel:
            raise ValueError(
                f'decide.feature = "{self.decide.feature}" is not in decide.panel, so it would not be '
                'measured; add it there, choose one of the panel, or set decide.metric = "accuracy"'
            )
        if "robust" in train.losses and train.label_smoothing == 0:
            raise ValueError("the loss robust needs train.label_smoothing above 0 (with 0 it is DPO)")
        if "robust" in train.losses and train.smooths_by_consistency:
            raise ValueError(
                "the loss robust needs a fixed train.label_smoothing below 0.5, and two heads may disagree "
                "about half of all responses; use the loss sigmoid, or give a number"
            )
        if (
            "simpo" in train.losses
            and len(train.ranking_losses) > 1
            and score == "simpo"
            and self.review.score == "auto"
        ):
            raise ValueError(
                'losses that disagree on the implicit reward: set review.score to "implicit" or "simpo"'
            )
        if self.data.heldout_fraction + self.data.test_fraction >= 1:
            raise ValueError("data.heldout_fraction and data.test_fraction leave nothing to train on")
        return self

    def _check_precision(self) -> None:
        if self.model.dtype != "nf4":
            return
        if self.train.method != "lora":
            raise ValueError(
                'model.dtype = "nf4" rounds the weights to four bits, which cannot be trained; set '
                'train.method = "lora"'
            )
        if self.start.tunes:
            raise ValueError(
                'start.sft makes whole weights, which model.dtype = "nf4" would round to four bits; '
                'set model.dtype = "bfloat16", or leave start.sft out and name a fine-tuned model as '
                "model.source"
            )
        if self.sampling.dtype is not None or self.sampling.engine == "vllm":
            raise ValueError(
                'with model.dtype = "nf4" answers are sampled through the same four-bit base as they are '
                'scored; leave sampling.dtype out, and set sampling.engine = "transformers"'
            )

    def _check_sharding(self) -> None:
        if not self.execution.shard_weights:
            return
        if self.in_blocks:
            raise ValueError(
                f"execution.shard_weights = true shares weights and moments by rows, but {self.in_blocks} "
                "keeps them in blocks with a scale each; change one of the two"
            )

    def _check_judge(self) -> None:
        if self.decide.metric != "win-rate":
            return
        if self.decide.judge is None:
            raise ValueError(
                'decide.metric = "win-rate" needs a judge; name one with decide.judge, such as openai:<model>'
            )
        if not self.evaluate.prompts:
            raise ValueError(
                'decide.metric = "win-rate" compares answers to held-out prompts, and evaluate.prompts = 0 '
                "samples none; raise it"
            )

    @property
    def in_blocks(self) -> str | None:
        """The setting by which weights or moments are kept in blocks, which cannot be shared by rows."""
        if self.model.dtype == "nf4":
            return 'model.dtype = "nf4"'
        return f'train.optimizer = "{ADAMW_8BIT}"' if self.train.optimizer == ADAMW_8BIT else None

    def with_engine(self, engine: str) -> "SeraConfig":
        """The same with another sampling engine."""
        return self.model_copy(update={"sampling": self.sampling.model_copy(update={"engine": engine})})

    def own_code(self) -> dict[str, str]:
        """Code of the user's own that this configuration names: kind by `module:function`."""
        named = {
            "selection rule": (self.select.rule, self.select_generated.rule),
            "pairing rule": (self.pairing.rule,),
            "rater": () if self.candidates or is_model(self.pairing.by) else (self.pairing.by,),
            "judge": (self.decide.judge,) if self.decide.judge and not is_model(self.decide.judge) else (),
            "loss": self.train.losses,
            "sampling engine": (self.sampling.engine,),
            "feature": tuple(name for name in self.decide.panel if column_of(name) is None),
        }
        return {name: kind for kind, names in named.items() for name in names if is_own(name)}

    def check_own_code(self) -> None:
        """Import it, so that what is missing or not allowed is said before any work.

        Raises:
            InputError: the first that cannot be used.
        """
        for name, kind in self.own_code().items():
            own_function(name, kind)

    @property
    def score(self) -> str:
        """The implicit score to use: the one that fits the loss, unless `review.score` names one."""
        if self.review.score != "auto":
            return self.review.score
        by_loss = {"simpo": "simpo", "sigmoid_norm": "avg-implicit"}
        return by_loss.get(next(iter(self.train.ranking_losses), ""), "implicit")

    @property
    def candidates(self) -> str | None:
        """File with rated candidates that take the place of samples; None: the policy is sampled."""
        return candidates_file(self.pairing.by)

    @property
    def scores_samples_again(self) -> bool:
        """Whether samples are scored again because the sampler's log-probabilities cannot be used.

        In bfloat16, which four-bit weights are multiplied in too, two code paths differ by about half a nat
        per response, which would swamp the rewards. In float32 a probe in the sampling step checks that
        sampler and scorer agree.
        """
        return self.model.dtype != "float32" or self.sampling.dtype not in (None, self.model.dtype)

    @property
    def anchored(self) -> bool:
        """Whether the start policy's responses are rejected, beside those that the head samples."""
        return self.pairing.rule == ANCHORED

    @property
    def folds(self) -> list[Fold]:
        """The folds that human pairs are reviewed in; empty without cross-fitting."""
        return Fold.every(self.review.crossfit, self.seed)

    def token_budget(self, round: int) -> int | None:
        """Training tokens of a round; None: `train.epochs` decides."""
        tokens = self.train.tokens
        return (tokens[min(round, len(tokens) - 1)] or None) if tokens else None

    @property
    def learning_rate(self) -> float:
        """Peak learning rate to use (defaults: 5e-7 full, 5e-6 LoRA)."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        return 5e-7 if self.train.method == "full" else 5e-6

    @property
    def sft_learning_rate(self) -> float:
        """Peak learning rate of the supervised fine-tuning (defaults: 2e-5 full, 2e-4 LoRA)."""
        if self.start.sft_learning_rate is not None:
            return self.start.sft_learning_rate
        return 2e-5 if self.train.method == "full" else 2e-4

    def result_fields(self) -> dict[str, Any]:
        """The settings that change a result: all but `execution`, `limits` and `review.show_text`.

        Settings that older runs did not have are left out at their defaults, so such a run can continue.
        """
        hidden = {"execution": True, "limits": True, "review": {"show_text"}}
        fields = self.model_dump(mode="json", exclude=hidden)
        for section, names in ADDED_LATER.items():
            part = getattr(self, section)
            for name in names:
                if getattr(part, name) == type(part).model_fields[name].default:
                    del fields[section][name]
            if not fields[section]:
                del fields[section]
        return fields


ADDED_LATER = {
    "model": ("template_kwargs",),
    "start": ("sft", "sft_split", "sft_learning_rate", "sft_epochs", "sft_batch"),
    "data": ("format", "columns", "completions", "on_bad_row"),
    "review": ("crossfit",),
    "train": ("tokens", "ld_alpha", "pair_weights", "lora_targets", "use_rslora", "use_dora", "optimizer"),
    "evaluate": ("harness", "harness_items"),
    "decide": ("metric", "judge", "uncalibrated", "feature", "panel"),
    "pairing": ("by",),
    "mix": ("order",),
}
"""Settings, by section, that runs of the first version do not have."""
