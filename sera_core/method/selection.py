"""Select training pairs by margin: preference rules, control rules, and a reason for each pair.

Selection is over the whole set, not per prompt. Ties are broken by id, so the result does not depend on the
input order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from sera_core.errors import InputError
from sera_core.extensions import Registry, is_own
from sera_core.method.ordinals import has_repeats, ordinals, sorted_by

UNORDERED_RULES = ("relabel", "none")
"""Rules without an order of preference: a subset of their pairs must be drawn at random."""
BY_VARIANCE = "prompt-variance"
"""The rule for generated pairs alone: it looks at all responses of a prompt."""
SIZED_BY_FRACTION = ("top-fraction", "middle", BY_VARIANCE, "random", "bottom")
"""Rules that keep a fraction of all pairs."""
DIRECTIONS = ("large", "small")


@dataclass(frozen=True)
class Selection:
    """The outcome of each pair, in input order.

    reason is `kept`, or why not: `non_finite` (the margin is not a number), `not_preferred` (not above the
    floor), `below_cut` (above the floor, beyond the rule's cut), `not_middle` (above the floor, rule
    `middle`), `not_drawn` (control `random`), `above_cut` (control `bottom`).
    """

    kept: Bool[np.ndarray, " pair"]
    rank: Int[np.ndarray, " pair"]
    """Place in the rule's order, from 1; 0 if the margin is not finite."""
    reason: np.ndarray
    swapped: Bool[np.ndarray, " pair"]
    """Rule `relabel`: whether chosen and rejected must be swapped."""


@dataclass(frozen=True)
class Pairs:
    """What a rule sees of the pairs, in input order, and its settings."""

    margins: Float[np.ndarray, " pair"]
    """In nats."""
    order: UInt64[np.ndarray, " pair"]
    """A number per pair, in the order of the ids (`ordinals`)."""
    finite: Bool[np.ndarray, " pair"]
    above_floor: Bool[np.ndarray, " pair"]
    """Finite, and above `min_margin`."""
    preference: Float[np.ndarray, " pair"]
    """The margin, or its negative where small ones are preferred; for `prompt-variance` the variance."""
    fraction: float | int
    k: int
    cut: float | int
    """Smallest `preference` that the rule `threshold` keeps."""
    seed: int
    score_kept: int | None

    @property
    def achieved(self) -> int:
        """How many pairs the controls keep: as many as `top-fraction` does, unless given."""
        if self.score_kept is not None:
            return self.score_kept
        return min(round_half_up(self.fraction * self.finite.sum()), int(self.above_floor.sum()))


Chosen = tuple[np.ndarray, np.ndarray, str | np.ndarray]
"""Kept (one bool per pair), rank (from 1; 0 where not finite), and why a finite pair was dropped."""


def select(
    margins: Float[np.ndarray, " pair"],
    ids: Sequence[str] | np.ndarray,
    *,
    rule: str,
    fraction: float | int = 0.7,
    k: int = 0,
    threshold: float | int = 0.0,
    min_margin: float | int = 0.0,
    direction: str = "large",
    seed: int = 0,
    score_kept: int | None = None,
    variance: Float[np.ndarray, " pair"] | None = None,
) -> Selection:
    """Select pairs by their (ensemble) margin, in nats.

    | rule           | keeps                                                                             |
    |----------------|-----------------------------------------------------------------------------------|
    | `top-fraction` | the preferred `fraction` of all finite pairs (half a pair counts as one)          |
    | `top-k`        | the `k` preferred pairs                                                           |
    | `threshold`    | margin >= `threshold` (direction `small`: <=)                                     |
    | `middle`       | the `fraction` of all finite pairs whose margins are nearest to the median in rank |
    | `prompt-variance` | the `fraction` of all finite pairs whose prompts' responses differ most           |
    | `random`       | control: a seeded draw, as many as `top-fraction` achieved, floor included        |
    | `bottom`       | control: the least preferred, as many as `top-fraction` achieved                  |
    | `relabel`      | all; a pair with a negative margin is swapped,      an exact 0 stays as it is     |
    | `none`         | all                                                                               |
    | `module:name`  | those for which the user's own rule says True (see `sera_core.extensions`)        |

    The first five and `module:name` also require margin > `min_margin` (strictly) and give other pairs
    the reason `not_preferred`, even if the cut would drop them too. The fraction is of all finite pairs,
    so the floor can only make the selection smaller. The controls ignore the floor when they choose
    pairs. Keeping only clearly preferred pairs is SeRA's (arXiv 2410.09362); all values here are ours.
    `middle` drops what the policy prefers most and least clearly (middle percentiles of the margin: arXiv
    2510.13212, read second-hand; the paper's second measure, the loss difference, is not used).
    `prompt-variance` keeps the prompts that tell most about the policy (`prompt_variance`). `threshold`
    is the rule of RS-DPO (arXiv 2402.10038), σ(margin/τ) ≥ η, at `threshold` = τ ln(η / (1 − η)).
    Published evidence disagrees on the direction (large: arXiv 2502.14560; small: 2406.17312,
    2508.04149).

    Args:
        margins: in nats, without β, already rounded.
        ids: one distinct id per pair; ties are ordered by id, ascending.
        direction: whether `large` or `small` margins are preferred; small ones must still be above the floor.
        seed: seed of the rule `random`.
        score_kept: number of pairs the controls keep (from another arm's selection); None: as many as
            `top-fraction` keeps here.
        variance: for the rule `prompt-variance`, the `prompt_variance` of each pair's prompt.

    Raises:
        ValueError: an unknown rule or direction, a number out of its range, ids that repeat or do not fit.
    """
    choose = SELECTION.named(rule)
    preference = variance if rule == BY_VARIANCE else margins if direction == "large" else -margins
    if preference is None:
        raise ValueError(
            f"The rule {BY_VARIANCE} needs all responses of each prompt, which only generated pairs have; "
            f"choose one of {', '.join(SELECTION_RULES)}."
        )
    order = ordinals(ids)
    _check(margins, order, fraction, k, threshold, min_margin, direction, score_kept)
    finite = np.isfinite(margins)
    pairs = Pairs(
        margins=margins,
        order=order,
        finite=finite,
        above_floor=finite & (margins > min_margin),
        preference=preference,
        fraction=fraction,
        k=k,
        cut=threshold if direction == "large" else -threshold,
        seed=seed,
        score_kept=score_kept,
    )
    kept, rank, dropped = _own(choose, rule, pairs) if is_own(rule) else choose(pairs)
    reason = _word(kept, "kept", _word(finite, dropped, "non_finite"))
    return Selection(kept, rank, reason, kept & (margins < 0) & (rule == "relabel"))


def prompt_variance(
    rewards: Float[np.ndarray, " response"], prompts: Int[np.ndarray, " response"]
) -> Float[np.ndarray, " prompt"]:
    """How much the policy's preferences between a prompt's responses vary, in [0, ¼].

        PVar(x) = mean over i ≠ j of (σ(r_i − r_j) − ½)²          arXiv 2510.13022, read second-hand

    the variance of the preference probability of two different responses (its mean is ½). A prompt with fewer
    than two finite rewards has 0.

    Args:
        rewards: β times the log-ratio, so that σ of a difference is DPO's preference probability.
        prompts: number of each response's prompt, from 0.
    """
    count = int(prompts.max(initial=-1)) + 1
    found = np.zeros(count)
    order = np.argsort(prompts, kind="stable")
    ends = np.searchsorted(prompts[order], np.arange(count + 1))
    for prompt in range(count):
        own = rewards[order[ends[prompt] : ends[prompt + 1]]]
        own = own[np.isfinite(own)]
        if own.size > 1:
            preferred = 0.5 * (1 + np.tanh((own[:, None] - own[None]) / 2))
            found[prompt] = ((preferred - 0.5) ** 2).sum() / (own.size * (own.size - 1))
    return found


def expected_kept(rule: str, pairs: int, fraction: float | int, k: int) -> int:
    """Pairs that a rule keeps of `pairs` finite ones if the floor drops none.

    How many the rule `threshold` or one of the user's own keeps cannot be known: at most all.
    """
    if rule in SIZED_BY_FRACTION:
        return round_half_up(fraction * pairs)
    return min(k, pairs) if rule == "top-k" else pairs


def _by_preference(pairs: Pairs, within: Callable[[np.ndarray], np.ndarray]) -> Chosen:
    """The rules that prefer: above the floor, and within the cut by rank."""
    # Pairs above the floor come first; with direction "small" those below it would otherwise be first.
    rank = _rank(pairs.finite, pairs.order, -pairs.preference, ~pairs.above_floor)
    dropped = _word(pairs.above_floor, "below_cut", "not_preferred")
    return pairs.above_floor & within(rank), rank, dropped


def _top_fraction(pairs: Pairs) -> Chosen:
    return _by_preference(pairs, lambda rank: rank <= round_half_up(pairs.fraction * pairs.finite.sum()))


def _top_k(pairs: Pairs) -> Chosen:
    return _by_preference(pairs, lambda rank: rank <= pairs.k)


def _threshold(pairs: Pairs) -> Chosen:
    return _by_preference(pairs, lambda _: pairs.preference >= pairs.cut)


def _middle(pairs: Pairs) -> Chosen:
    place = _rank(pairs.finite, pairs.order, pairs.margins)
    finite = int(pairs.finite.sum())
    distance = np.abs(place - (finite + 1) / 2)
    rank = _rank(pairs.finite, pairs.order, -pairs.margins, distance, ~pairs.above_floor)
    dropped = _word(pairs.above_floor, "not_middle", "not_preferred")
    return pairs.above_floor & (rank <= round_half_up(pairs.fraction * finite)), rank, dropped


def _random(pairs: Pairs) -> Chosen:
    rank = _random_rank(pairs.finite, pairs.order, pairs.seed)
    return pairs.finite & (rank <= pairs.achieved), rank, "not_drawn"


def _bottom(pairs: Pairs) -> Chosen:
    rank = _rank(pairs.finite, pairs.order, pairs.preference)
    return pairs.finite & (rank <= pairs.achieved), rank, "above_cut"


def _all(pairs: Pairs) -> Chosen:
    return pairs.finite, _rank(pairs.finite, pairs.order, -pairs.preference), "kept"


SELECTION: Registry[Callable[[Pairs], Chosen]] = Registry(
    "selection rule",
    {
        "top-fraction": _top_fraction,
        "top-k": _top_k,
        "threshold": _threshold,
        "middle": _middle,
        BY_VARIANCE: _top_fraction,
        "random": _random,
        "bottom": _bottom,
        "relabel": _all,
        "none": _all,
    },
)
SELECTION_RULES = tuple(name for name in SELECTION.entries if name != BY_VARIANCE)
"""The rules that need margins alone."""


def _own(rule: Callable[..., Any], name: str, pairs: Pairs) -> Chosen:
    """The user's own rule, over the finite pairs by id; the floor is ours."""
    rows = np.flatnonzero(pairs.finite)
    rows = rows[np.argsort(pairs.order[rows])]
    returned = np.asarray(rule(pairs.margins[rows].copy(), fraction=pairs.fraction, seed=pairs.seed))
    if returned.shape != rows.shape or returned.dtype != bool:
        raise InputError(
            f"the selection rule {name!r} gave {returned.dtype} of shape {returned.shape} for {rows.size} "
            "pairs; it must give one bool per pair"
        )
    wanted = np.zeros(pairs.finite.size, dtype=bool)
    wanted[rows] = returned
    return _by_preference(pairs, lambda _: wanted)


def round_half_up(x: float | int | np.floating | np.integer) -> int:
    """Nearest integer, halves up.

    0.145 · 100 is 14.499999999999998 in float64; a small addend corrects this.
    """
    return int(np.floor(x + 0.5 + 1e-9))


def _word(where: Bool[np.ndarray, " pair"], yes: str | np.ndarray, no: str | np.ndarray) -> np.ndarray:
    """`yes` or `no` for each pair, as references to the same few texts."""
    return np.where(where, np.asarray(yes, dtype=object), np.asarray(no, dtype=object))


def _rank(
    finite: Bool[np.ndarray, " pair"],
    ids: UInt64[np.ndarray, " pair"],
    *keys: Float[np.ndarray, " pair"] | Bool[np.ndarray, " pair"],
) -> Int[np.ndarray, " pair"]:
    """Rank, from 1, of the finite pairs by the keys, ascending, last key first, ties by id; others 0."""
    rows = np.flatnonzero(finite)
    order = sorted_by(ids[rows], *(key[rows] for key in keys))
    rank = np.zeros(finite.size, dtype=np.int64)
    rank[rows[order]] = np.arange(1, rows.size + 1)
    return rank


def _random_rank(
    finite: Bool[np.ndarray, " pair"], ids: UInt64[np.ndarray, " pair"], seed: int
) -> Int[np.ndarray, " pair"]:
    """A seeded random rank that depends on the set of ids, not on their order."""
    rank = _rank(finite, ids)
    draw = np.random.default_rng(seed).permutation(int(finite.sum())) + 1
    rank[finite] = draw[rank[finite] - 1]
    return rank


def _check(
    margins: Float[np.ndarray, " pair"],
    ids: UInt64[np.ndarray, " id"],
    fraction: float | int,
    k: int,
    threshold: float | int,
    min_margin: float | int,
    direction: str,
    score_kept: int | None,
) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"The direction {direction!r} is unknown; prefer 'large' or 'small' margins.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is a share of the pairs and must lie in [0, 1], but is {fraction}.")
    if k < 0 or (score_kept is not None and score_kept < 0):
        raise ValueError(f"A number of pairs cannot be negative, but k = {k} and score_kept = {score_kept}.")
    if np.isnan(min_margin) or np.isnan(threshold):
        raise ValueError(
            f"min_margin = {min_margin} and threshold = {threshold} must be numbers of nats; "
            "-inf turns the floor off."
        )
    if ids.size != margins.size:
        raise ValueError(f"There are {margins.size} margins but {ids.size} ids; give one id a pair.")
    if has_repeats(ids):
        raise ValueError(
            f"{ids.size - np.unique(ids).size} ids repeat, so ties between them could not be settled; "
            "drop duplicate pairs before selecting."
        )
