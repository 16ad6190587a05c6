"""Select training pairs by margin: preference rules, control rules, and a reason for each pair.

Selection is over the whole set, not per prompt. Ties are broken by id, so the result does not depend on the
input order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

SELECTION_RULES = ("top-fraction", "top-k", "threshold", "random", "bottom", "relabel", "none")
UNORDERED_RULES = ("relabel", "none")
"""Rules without an order of preference: a subset of their pairs must be drawn at random."""
DIRECTIONS = ("large", "small")


@dataclass(frozen=True)
class Selection:
    """The outcome of each pair, in input order.

    reason is `kept`, or why not: `non_finite` (the margin is not a number), `not_preferred` (not above the
    floor), `below_cut` (above the floor, beyond the rule's cut), `not_drawn` (control `random`), `above_cut`
    (control `bottom`).
    """

    kept: Bool[np.ndarray, " pair"]
    rank: Int[np.ndarray, " pair"]
    """Place in the rule's order, from 1; 0 if the margin is not finite."""
    reason: np.ndarray
    swapped: Bool[np.ndarray, " pair"]
    """Rule `relabel`: whether chosen and rejected must be swapped."""


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
) -> Selection:
    """Select pairs by their (ensemble) margin, in nats.

    | rule           | keeps                                                                             |
    |----------------|-----------------------------------------------------------------------------------|
    | `top-fraction` | the preferred `fraction` of all finite pairs (half a pair counts as one)          |
    | `top-k`        | the `k` preferred pairs                                                           |
    | `threshold`    | margin >= `threshold` (direction `small`: <=)                                     |
    | `random`       | control: a seeded draw, as many as `top-fraction` achieved, floor included        |
    | `bottom`       | control: the least preferred, as many as `top-fraction` achieved                  |
    | `relabel`      | all; a pair with a negative margin is to be turned, an exact 0 stays as it is     |
    | `none`         | all                                                                               |

    The first three also require margin > `min_margin` (strictly) and give other pairs the reason
    `not_preferred`, even if the cut would drop them too. The fraction is of all finite pairs, so the floor
    can only make the selection smaller. The controls ignore the floor when they choose pairs. Keeping only
    clearly preferred pairs is SeRA's (arXiv 2410.09362); all values here are ours. Published evidence
    disagrees on the direction (large: arXiv 2502.14560; small: 2406.17312, 2508.04149).

    Args:
        margins: in nats, without β, already rounded.
        ids: one distinct id per pair; ties are ordered by id, ascending.
        direction: whether `large` or `small` margins are preferred; small ones must still be above the floor.
        seed: seed of the rule `random`.
        score_kept: number of pairs the controls keep (from another arm's selection); None: as many as
            `top-fraction` keeps here.

    Raises:
        ValueError: an unknown rule or direction, a number out of its range, ids that repeat or do not fit.
    """
    _check(margins, ids, rule, fraction, k, threshold, min_margin, direction, score_kept)
    names = np.asarray(ids, dtype=str)
    finite = np.isfinite(margins)
    preference = margins if direction == "large" else -margins
    above_floor = finite & (margins > min_margin)
    achieved = min(round_half_up(fraction * finite.sum()), int(above_floor.sum()))

    if rule in ("relabel", "none"):
        rank = _rank(finite, names, -preference)
        return _selection(finite, rank, finite, "kept", rule == "relabel", margins)
    if rule == "random":
        rank = _random_rank(finite, names, seed)
        kept = finite & (rank <= (achieved if score_kept is None else score_kept))
        return _selection(kept, rank, finite, "not_drawn", False, margins)
    if rule == "bottom":
        rank = _rank(finite, names, preference)
        kept = finite & (rank <= (achieved if score_kept is None else score_kept))
        return _selection(kept, rank, finite, "above_cut", False, margins)

    # Pairs above the floor come first; with direction "small" those below it would otherwise be first.
    rank = _rank(finite, names, -preference, ~above_floor)
    within_cut = {
        "top-fraction": rank <= round_half_up(fraction * finite.sum()),
        "top-k": rank <= k,
        "threshold": preference >= (threshold if direction == "large" else -threshold),
    }[rule]
    dropped = np.where(above_floor, "below_cut", "not_preferred")
    return _selection(above_floor & within_cut, rank, finite, dropped, False, margins)


def round_half_up(x: float | int | np.floating | np.integer) -> int:
    """Nearest integer, halves up.

    0.145 · 100 is 14.499999999999998 in float64; a small addend corrects this.
    """
    return int(np.floor(x + 0.5 + 1e-9))


def _rank(
    finite: Bool[np.ndarray, " pair"],
    names: np.ndarray,
    *keys: Float[np.ndarray, " pair"] | Bool[np.ndarray, " pair"],
) -> Int[np.ndarray, " pair"]:
    """Rank, from 1, of the finite pairs by the keys, ascending, last key first, ties by name; others 0."""
    rows = np.flatnonzero(finite)
    order = np.lexsort((names[rows], *(key[rows] for key in keys)))
    rank = np.zeros(finite.size, dtype=np.int64)
    rank[rows[order]] = np.arange(1, rows.size + 1)
    return rank


def _random_rank(finite: Bool[np.ndarray, " pair"], names: np.ndarray, seed: int) -> Int[np.ndarray, " pair"]:
    """A seeded random rank that depends on the set of names, not on their order."""
    rank = _rank(finite, names)
    draw = np.random.default_rng(seed).permutation(int(finite.sum())) + 1
    rank[finite] = draw[rank[finite] - 1]
    return rank


def _selection(
    kept: Bool[np.ndarray, " pair"],
    rank: Int[np.ndarray, " pair"],
    finite: Bool[np.ndarray, " pair"],
    dropped: str | np.ndarray,
    relabel: bool,
    margins: Float[np.ndarray, " pair"],
) -> Selection:
    reason = np.where(kept, "kept", np.where(finite, dropped, "non_finite")).astype(object)
    return Selection(kept, rank, reason, kept & (margins < 0) & relabel)


def _check(
    margins: Float[np.ndarray, " pair"],
    ids: Sequence[str] | np.ndarray,
    rule: str,
    fraction: float | int,
    k: int,
    threshold: float | int,
    min_margin: float | int,
    direction: str,
    score_kept: int | None,
) -> None:
    if rule not in SELECTION_RULES:
        raise ValueError(
            f"The selection rule {rule!r} is unknown; choose one of {', '.join(SELECTION_RULES)}."
        )
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
    if len(ids) != margins.size:
        raise ValueError(f"There are {margins.size} margins but {len(ids)} ids; give one id a pair.")
    if len(set(ids)) != len(ids):
        raise ValueError(
            f"{len(ids) - len(set(ids))} ids repeat, so ties between them could not be settled; "
            "drop duplicate pairs before selecting."
        )
