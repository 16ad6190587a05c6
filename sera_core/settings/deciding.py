"""What is measured after a round, what is decided by it, and when a run stops."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sera_core.method.panel import NAMES, TOKENS
from sera_core.settings.kinds import FeatureName, Fraction, Part, Positive, known_judge


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
    judge: Annotated[str, AfterValidator(known_judge)] | None = None
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
