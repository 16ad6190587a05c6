"""Mix human and generated pairs for training, with a generated share that grows from round to round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.ordinals import has_repeats, hashes, ordinals
from sera_core.method.selection import round_half_up

ON_SHORT = ("keep-share", "fill")
SHUFFLED = "shuffled"
ORDERS = (SHUFFLED, "easy-first", "hard-first")
"""Orders of the pairs in training."""
SPARE_PROMPTS = 1.25
"""Prompts to sample beyond the expected need, as a factor; ours.

If each of n prompts gives a kept pair with probability y, their number has a standard deviation of
√((1−y)/(y·n)) of its mean: at y = 0.7 that is 15 % for 20 prompts and 7 % for 100, so a quarter more covers
1.7 and 3.8 standard deviations. A shortfall costs human pairs, because the share is kept by dropping them;
spare pairs cost only their samples, and those with the smallest margins are dropped (`over_share`).
"""


@dataclass(frozen=True)
class Mixture:
    """The pairs of a mix as indices into the inputs, each side in its selection's order."""

    human: Int[np.ndarray, " human_kept"]
    generated: Int[np.ndarray, " generated_kept"]
    target_share: float
    share: float
    """The achieved share of generated pairs; 0 for an empty mix."""
    over_share_human: Bool[np.ndarray, " human"]
    """Human pairs left out of the mix, in input order."""
    over_share_generated: Bool[np.ndarray, " generated"]
    reason: str | None
    """`no_pairs` if generated pairs are needed and there are none, or the mix is empty; else None."""


def share_for_round(
    t: int, shares: Sequence[float | int] | None, ramp: tuple[float | int, float | int, int] | None
) -> float:
    """Target share of generated pairs in round t.

    Round 0 has none. From round 1 on it is `shares[t − 1]`, whose last value repeats, or a linear ramp from
    `start` in round 1 to `end` in round `rounds`, then constant. The growing share is SeRA's (arXiv
    2410.09362); the paper gives no schedule, so all values are ours.

    Args:
        t: the round, >= 0.
        shares: one target per round, each in [0, 1]; or None.
        ramp: (start, end, rounds), rounds >= 1; or None.

    Raises:
        ValueError: not exactly one schedule, a share outside [0, 1], a negative round.
    """
    if t < 0:
        raise ValueError(f"A round is numbered from 0, but t = {t}.")
    if (shares is None) == (ramp is None):
        raise ValueError("Give the growing share either as a list of shares or as a ramp, and not as both.")
    ends = tuple(shares) if shares is not None else ramp[:2]  # type: ignore[index]
    if not ends or not all(0 <= share <= 1 for share in ends):
        raise ValueError(
            f"Every share of generated pairs must lie in [0, 1] and there must be one, but got {ends}."
        )
    if t == 0:
        return 0.0
    if shares is not None:
        return float(shares[min(t, len(shares)) - 1])
    start, end, rounds = ramp  # type: ignore[misc]
    if rounds < 1:
        raise ValueError(f"The ramp must run over at least one round, but runs over {rounds}.")
    if t >= rounds:
        return float(end)
    return float(start + (end - start) * (t - 1) / (rounds - 1))


def mix(
    human: Int[np.ndarray, " human"],
    human_ids: Sequence[str] | np.ndarray,
    generated: Int[np.ndarray, " generated"],
    generated_ids: Sequence[str] | np.ndarray,
    *,
    share: float | int,
    size: int | None = None,
    on_short: str = "keep-share",
    seed: int,
) -> Mixture:
    """Mix the kept human and generated pairs so that the generated ones make up `share`.

    With target share s, H human and G generated pairs and N = `size` (default H):

        keep-share   n = ⌊min(N, H/(1−s), G/s)⌋,  n_g = round(s·n),  n_h = n − n_g
        fill         n = min(N, H + G),           n_g = round(s·n),  one side fills up for the other

    Halves are rounded up. Each side is taken in its selection's order: preferred pairs first, or at random
    for the control rules. Equal places (all of them, for a rule without an order) are ordered by a seeded
    hash of the id. The formula is ours.

    Args:
        human: place of each kept human pair in its selection's order, smallest first.
        human_ids: their ids.
        generated: places of the kept generated pairs.
        generated_ids: their ids.
        share: target share s of generated pairs, in [0, 1].
        size: pairs in the mix; None for as many as there are human pairs.
        on_short: what to do when a side has too few pairs.
        seed: seed of the order among equal places.

    Raises:
        ValueError: a share outside [0, 1], a size below 1, an unknown on_short, ids that do not fit.
    """
    _check(human, human_ids, generated, generated_ids, share, size, on_short)
    n_human, n_generated = mixed_counts(human.size, generated.size, float(share), size, on_short)
    no_pairs = (share > 0 and generated.size == 0) or n_human + n_generated == 0
    if no_pairs:
        n_human = n_generated = 0
    human_kept = _in_order(human, human_ids, seed)[:n_human]
    generated_kept = _in_order(generated, generated_ids, seed)[:n_generated]
    return Mixture(
        human=human_kept,
        generated=generated_kept,
        target_share=float(share),
        share=n_generated / max(n_human + n_generated, 1),
        over_share_human=_left_out(human.size, human_kept),
        over_share_generated=_left_out(generated.size, generated_kept),
        reason="no_pairs" if no_pairs else None,
    )


def mixed_counts(
    human: int, generated: int, share: float | int, size: int | None, on_short: str
) -> tuple[int, int]:
    """Number of human and generated pairs in the mix, by the formula of `mix`.

    Args:
        human: human pairs kept, H.
        generated: generated pairs kept, G.
        share: target share s of generated pairs, in [0, 1].
        size: pairs in the mix, N; None for H.
        on_short: what to do when a side has too few pairs.
    """
    h, g, s = human, generated, float(share)
    if on_short == "fill":
        n = min(h if size is None else size, h + g)
        n_human = min(n - min(round_half_up(s * n), g), h)
        return n_human, n - n_human
    n = _floor(min([*_bounds(h, s, size), *([g / s] if s > 0 else [])]))
    n_generated = round_half_up(s * n)
    return n - n_generated, n_generated


def needed_generated(human: int, share: float | int, size: int | None) -> int | None:
    """Generated pairs that a share needs; None for all there are.

        g = ⌈s·n⌉,  n = ⌊min(N, H/(1−s))⌋,  N = `size` (default H)

    Where `size` leaves room for every human pair this is s/(1−s)·H. More would be dropped (`over_share`),
    fewer cost human pairs. A share of 1 without a size has no bound.

    Args:
        human: human pairs kept, H.
        share: target share s, in [0, 1].
        size: pairs in the mix, N; None for H.
    """
    if share == 1 and size is None:
        return None
    return _ceil(share * _floor(min(_bounds(human, float(share), size))))


def prompts_needed(generated: int | None, pairs_a_prompt: float | int, prompts: int) -> int:
    """Prompts to sample for so many generated pairs: ⌈SPARE_PROMPTS · g / y⌉, at least 1, at most all.

    Args:
        generated: generated pairs needed, g; None for as many as possible.
        pairs_a_prompt: yield y: generated pairs kept per sampled prompt, >= 0.
        prompts: prompts there are.
    """
    if generated is None or pairs_a_prompt <= 0:
        return prompts
    return min(max(_ceil(SPARE_PROMPTS * generated / pairs_a_prompt), 1), prompts)


def drops_most(kept: int, mixed: int) -> bool:
    """Whether a mix with `mixed` of the `kept` human pairs drops more than half of them.

    Half of an odd number counts with either rounding, so that a share of one half never does.
    """
    return mixed < kept // 2


def training_order(
    ids: Sequence[str] | np.ndarray,
    seed: int,
    margins: Float[np.ndarray, " pair"] | None = None,
    order: str = SHUFFLED,
) -> Int[np.ndarray, " pair"]:
    """Indices of the pairs in training order: seeded, and independent of the input order.

    Pairs are sorted by sha256 of seed and id, so adding or removing a pair keeps the order of the others. A
    curriculum sorts them by margin first: `easy-first` the largest first, as Curry-DPO (arXiv 2403.07230) by
    the difference of ratings; `hard-first` the reverse, a control of ours.

    Args:
        ids: the pairs' ids.
        seed: seed of the hashes.
        margins: ensemble margin of each pair as it is trained on, in nats; only for a curriculum.
        order: one of `ORDERS`.

    Raises:
        ValueError: ids repeat, an unknown order, or a curriculum without finite margins.
    """
    if order not in ORDERS:
        raise ValueError(f"The order {order!r} is unknown; choose one of {', '.join(ORDERS)}.")
    if has_repeats(ordinals(ids)):
        raise ValueError(
            "Some ids repeat, so their order would depend on the input order; drop duplicate pairs first."
        )
    drawn = hashes(f"order:{seed}:", ids)
    if order == SHUFFLED:
        return np.argsort(drawn).astype(np.int64)
    if margins is None or not np.isfinite(margins).all():
        raise ValueError(f"The order {order!r} needs a finite margin of every pair.")
    return np.lexsort((drawn, -margins if order == "easy-first" else margins)).astype(np.int64)


def _left_out(count: int, kept: Int[np.ndarray, " kept"]) -> Bool[np.ndarray, " pair"]:
    """Whether each of `count` pairs is not kept."""
    left = np.ones(count, dtype=bool)
    left[kept] = False
    return left


def _bounds(h: int, s: float, size: int | None) -> list[float | int]:
    """Bounds of the mix's size if there are generated pairs enough."""
    return [h if size is None else size, *([h / (1 - s)] if s < 1 else [])]


def _floor(x: float | int) -> int:
    return int(np.floor(x + 1e-9))  # 7/0.7 must be 10 even if the quotient is slightly smaller


def _ceil(x: float | int) -> int:
    return int(np.ceil(x - 1e-9))  # 0.07 · 100 must be 7 even if the product is slightly larger


def _in_order(
    places: Int[np.ndarray, " pair"], ids: Sequence[str] | np.ndarray, seed: int
) -> Int[np.ndarray, " pair"]:
    """Indices by place; only pairs of equal places, which a rule with an order has none of, are hashed."""
    order = np.argsort(places)
    same = places[order[1:]] == places[order[:-1]]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same)[: order.size])
    if tied.size:
        rows = np.sort(order[tied])
        drawn = hashes(f"tie:{seed}:", np.asarray(ids)[rows])
        order[tied] = rows[np.lexsort((drawn, places[rows]))]
    return order.astype(np.int64)


def _check(
    human: Int[np.ndarray, " human"],
    human_ids: Sequence[str] | np.ndarray,
    generated: Int[np.ndarray, " generated"],
    generated_ids: Sequence[str] | np.ndarray,
    share: float | int,
    size: int | None,
    on_short: str,
) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share is the generated share of the mix and must lie in [0, 1], but is {share}.")
    if size is not None and size < 1:
        raise ValueError(
            f"The mix must have at least one pair, but size = {size}; leave it out for the human count."
        )
    if on_short not in ON_SHORT:
        raise ValueError(f"on_short = {on_short!r} is unknown; choose 'keep-share' or 'fill'.")
    for name, places, ids in (("human", human, human_ids), ("generated", generated, generated_ids)):
        if places.size != len(ids):
            raise ValueError(f"There are {places.size} {name} places but {len(ids)} ids; give one id a pair.")
