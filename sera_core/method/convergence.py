"""Convergence signals of a round, the verdict with its reason, and the decision.

The SeRA paper says that convergence should be monitored but gives no rule; the rules and thresholds here are
ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.win_rates import Rate, bootstrap_difference, bootstrap_interval

VERDICTS = ("converged", "improving", "degrading", "still_moving", "not_enough_evidence")
DECISIONS = ("promote", "hold", "roll_back", "stop")
STOP_REASONS = ("converged", "max_rounds", "degraded", "no_pairs", "budget", "reviewer")


@dataclass(frozen=True)
class Signals:
    """Measurements of a round compared with the last head. None: not measured."""

    accuracy: Rate
    """Reward accuracy on held-out human pairs."""
    accuracy_change: Rate | None = None
    """Its paired difference to the last head's."""
    falls: dict[str, Rate] = field(default_factory=dict)
    """Its paired differences to earlier rounds by name (the last head, the best round, round 0), with
    simultaneous intervals; if empty, only `accuracy_change` is used."""
    win_rate: Rate | None = None
    """Win rate over the last head on held-out prompts, by an independent judge."""
    overlap: float | None = None
    """Jaccard overlap of the selected human pairs with the last head's."""
    ks: float | None = None
    """KS distance of the margins to the last head's."""
    sign_changes: float | None = None
    """Share of pairs whose margin changed sign."""
    kl_reference: float | None = None
    """KL to the reference, nats a sequence."""
    kl_previous: float | None = None
    """KL to the last head, nats a sequence."""


@dataclass(frozen=True)
class Verdict:
    """The verdict: one of VERDICTS, the reason in words, and the numbers behind it."""

    converged: bool
    name: str
    reason: str
    evidence: dict


@dataclass(frozen=True)
class Decision:
    """Decision on a round. `stop_reason` is None while the run continues; any decision may have one."""

    decision: str
    reason: str
    stop_reason: str | None = None


def accuracy_falls(
    correct_now: Float[np.ndarray, " heldout"],
    correct_before: Mapping[str, Float[np.ndarray, " heldout"]],
    groups: Int[np.ndarray, " heldout"] | None,
    *,
    seed: int,
    level: float = 0.95,
) -> dict[str, Rate]:
    """Paired change of held-out reward accuracy against each earlier round, with simultaneous intervals.

    With k comparisons each interval has the level 1 − (1 − level)/k (Bonferroni), so that the probability of
    any wrong interval is at most 1 − level.

    Args:
        correct_now: `diagnostics.correctness` of the held-out margins under the policy.
        correct_before: likewise under the policies of earlier rounds, by name, the same pairs in the same
            order.
        groups: number of each pair's prompt; None: each pair stands for itself.
    """
    each = 1 - (1 - level) / max(1, len(correct_before))
    return {
        name: bootstrap_difference(correct_now, before, seed=seed, level=each, groups=groups)
        for name, before in correct_before.items()
    }


def accuracy_signals(
    correct_now: Float[np.ndarray, " heldout"],
    correct_before: Float[np.ndarray, " heldout"] | None,
    *,
    seed: int,
    level: float = 0.95,
    groups: Int[np.ndarray, " heldout"] | None = None,
) -> tuple[Rate, Rate | None]:
    """Held-out reward accuracy and its paired change against the last head, with bootstrap intervals.

    Args:
        correct_now: `diagnostics.correctness` of the held-out margins under the policy.
        correct_before: likewise under the last head, the same pairs in the same order; None in round 0.
        groups: number of each pair's prompt; None: each pair stands for itself.

    Raises:
        ValueError: different numbers of pairs, or a value that is not finite.
    """
    accuracy = bootstrap_interval(correct_now, seed=seed, level=level, groups=groups)
    if correct_before is None:
        return accuracy, None
    return accuracy, bootstrap_difference(correct_now, correct_before, seed=seed, level=level, groups=groups)


def verdict(
    signals: Signals,
    *,
    min_effect: float = 0.02,
    win_effect: float = 0.05,
    min_overlap: float = 0.8,
    max_ks: float = 0.1,
) -> Verdict:
    """Judge a round against the last head, and for a decline also against the best round and round 0.

    A decline too slow to be significant between two heads can be significant against the best round.
    The first row that applies decides.

    | name                  | when                                                                     |
    |-----------------------|--------------------------------------------------------------------------|
    | `not_enough_evidence` | there is no last head, or no held-out pair                               |
    | `degrading`           | one of the falls' intervals is below 0, or the win rate's below 0.5      |
    | `improving`           | the accuracy change's interval is above 0, or the win rate's above 0.5   |
    | `not_enough_evidence` | one of them is not inside ±min_effect, or 0.5 ± win_effect               |
    | `still_moving`        | no effect, but the selection (overlap) or the margins (KS) changed       |
    | `converged`           | no effect, shown with enough power, and nothing moves                    |

    A win rate, overlap or KS distance that was not measured is ignored; the accuracy is required. The
    interval of an accuracy change is at least ±3/n wide (rule of three: an event not seen in n prompts may
    still have a rate of 3/n), so a few unchanged pairs are no evidence of convergence.

    Args:
        min_effect: the smallest change of accuracy that matters.
        win_effect: the smallest difference of the win rate from 0.5 that matters.
        min_overlap: smallest overlap with which the selection counts as unchanged.
        max_ks: largest KS distance with which the margins count as unchanged.

    Raises:
        ValueError: an effect that is not positive.
    """
    if min_effect <= 0 or win_effect <= 0:
        raise ValueError(
            f"min_effect = {min_effect} and win_effect = {win_effect} must be positive: no finite number of "
            "pairs shows that there is no change at all."
        )
    evidence = asdict(signals) | {
        "thresholds": {
            "min_effect": min_effect, "win_effect": win_effect, "min_overlap": min_overlap, "max_ks": max_ks
        }
    }  # fmt: skip
    name, reason = _judge(signals, min_effect, win_effect, min_overlap, max_ks)
    return Verdict(name == "converged", name, reason, evidence)


def _judge(
    signals: Signals, min_effect: float, win_effect: float, min_overlap: float, max_ks: float
) -> tuple[str, str]:
    change, win = signals.accuracy_change, signals.win_rate
    if change is None or change.n == 0:
        return "not_enough_evidence", "there is no earlier head to compare the held-out accuracy with"
    low, high = _at_least_rule_of_three(change)
    said = f"held-out accuracy changed by {change.value:+.3f} [{low:+.3f}, {high:+.3f}] on {change.n} pairs"
    if win is not None and (win.n == 0 or isnan(win.low)):
        win = None
    won = (
        ""
        if win is None
        else f"; win rate {win.value:.3f} [{win.low:.3f}, {win.high:.3f}] on {win.n} prompts"
    )
    said += won
    fallen = [
        _said(name, fall) for name, fall in signals.falls.items() if _at_least_rule_of_three(fall)[1] < 0
    ]
    if fallen:
        return "degrading", f"held-out accuracy fell {'; '.join(fallen)}{won}"
    if (high < 0 and not signals.falls) or (win is not None and win.high < 0.5):
        return "degrading", said
    if low > 0 or (win is not None and win.low > 0.5):
        return "improving", said
    if not (-min_effect <= low and high <= min_effect):
        return "not_enough_evidence", f"{said}: a change of {min_effect} could not be ruled out"
    if win is not None and not (0.5 - win_effect <= win.low and win.high <= 0.5 + win_effect):
        return "not_enough_evidence", f"{said}: a win rate {win_effect} off 0.5 could not be ruled out"
    if signals.overlap is not None and not signals.overlap >= min_overlap:
        return "still_moving", f"{said}; but the selection overlaps by {signals.overlap:.2f} only"
    if signals.ks is not None and not signals.ks <= max_ks:
        return "still_moving", f"{said}; but the margins moved by a KS distance of {signals.ks:.2f}"
    return "converged", said


def _said(name: str, fall: Rate) -> str:
    low, high = _at_least_rule_of_three(fall)
    return f"against {name} by {fall.value:+.3f} [{low:+.3f}, {high:+.3f}] on {fall.n} pairs"


def decide(
    *,
    round: int,
    verdict: Verdict,
    accuracy: float,
    best_accuracy: float | None,
    held_in_a_row: int,
    patience: int,
    rolled_back: bool,
    max_rounds: int,
    reviewer: str | None = None,
    alarm: bool = False,
    on_alarm: str = "ignore",
    head_is_best: bool = False,
) -> Decision:
    """Decide on a round. The first row that applies decides; the last row may add its stop reason.

    | when                                                        | decision    | stop reason           |
    |-------------------------------------------------------------|-------------|-----------------------|
    | a reviewer said so                                          | theirs      | `reviewer` for `stop` |
    | … `roll_back`, for the second time                          | `stop`      | `degraded`            |
    | round 0: without it there is no head                        | `promote`   |                       |
    | degrading, or alarm and `on_alarm = "hold"`, and            |             |                       |
    | … holds in a row with this one <= patience                  | `hold`      |                       |
    | … patience is out, rolled back before or head is the best   | `stop`      | `degraded`            |
    | … patience is out                                           | `roll_back` |                       |
    | converged                                                   | `promote`   | `converged`           |
    | improving, still moving, not enough evidence                | `promote`   |                       |
    | none of the stop reasons above, and it is the last round    | as above    | `max_rounds`          |

    If the head is already the best round, a roll-back would change nothing, so the run stops instead.

    Args:
        round: the round's number, from 0.
        accuracy: its held-out reward accuracy; only for the reason.
        best_accuracy: the best promoted round's; None before there is one.
        held_in_a_row: rounds held directly before this one, back to the last promotion or roll-back.
        patience: number of consecutive holds allowed.
        rolled_back: the run has rolled back before.
        max_rounds: maximum number of rounds, including round 0.
        reviewer: a person's answer, one of DECISIONS.
        alarm: the amplification alarm was raised.
        on_alarm: `ignore` (report only) or `hold`.
        head_is_best: the head is the best round.

    Raises:
        ValueError: an unknown answer or on_alarm, or a number out of its range.
    """
    _check_decide(round, held_in_a_row, patience, max_rounds, reviewer, on_alarm)
    trouble = "the amplification alarm was raised" if alarm and on_alarm == "hold" else ""
    trouble = verdict.reason if verdict.name == "degrading" else trouble
    numbers = f"held-out accuracy {accuracy:.3f}"
    numbers += "" if best_accuracy is None else f", best promoted {best_accuracy:.3f}"

    if reviewer is not None:
        decision = _reviewed(reviewer, rolled_back)
    elif round == 0:
        decision = Decision("promote", f"the first round becomes the head; {numbers}")
    elif trouble and held_in_a_row + 1 <= patience:
        decision = Decision("hold", f"{trouble}; hold {held_in_a_row + 1} of {patience}; {numbers}")
    elif trouble and (rolled_back or head_is_best):
        why = "the run rolled back before" if rolled_back else "the head is the best round already"
        decision = Decision(
            "stop", f"{trouble}; patience of {patience} is out and {why}; {numbers}", "degraded"
        )
    elif trouble:
        decision = Decision("roll_back", f"{trouble}; patience of {patience} is out; {numbers}")
    else:
        stop = "converged" if verdict.converged else None
        decision = Decision("promote", f"{verdict.name}: {verdict.reason}; {numbers}", stop)

    if decision.stop_reason is None and round + 1 >= max_rounds:
        return Decision(
            decision.decision, f"{decision.reason}; the last of {max_rounds} rounds", "max_rounds"
        )
    return decision


def best_round(rounds: Sequence[tuple[int, bool, float]]) -> int | None:
    """The promoted round with the largest held-out reward accuracy (the later one if tied), or None.

    Args:
        rounds: (round, promoted, accuracy) of each; an accuracy of nan is below all others.
    """
    promoted = [
        (-np.inf if isnan(accuracy) else accuracy, number) for number, is_in, accuracy in rounds if is_in
    ]
    return max(promoted)[1] if promoted else None


def _at_least_rule_of_three(change: Rate) -> tuple[float, float]:
    """The change's interval, at least ±3/n wide; a single pair has no interval, so ±3/n is used."""
    least = 3 / change.independent
    low, high = (change.value if isnan(end) else end for end in (change.low, change.high))
    return min(low, change.value - least), max(high, change.value + least)


def _reviewed(reviewer: str, rolled_back: bool) -> Decision:
    if reviewer == "stop":
        return Decision("stop", "the reviewer stopped the run", "reviewer")
    if reviewer == "roll_back" and rolled_back:
        return Decision("stop", "the reviewer rolled back, for the second time in this run", "degraded")
    return Decision(reviewer, f"the reviewer decided {reviewer}")


def _check_decide(
    number: int, held_in_a_row: int, patience: int, max_rounds: int, reviewer: str | None, on_alarm: str
) -> None:
    if min(number, held_in_a_row, patience) < 0 or max_rounds < 1:
        raise ValueError(
            f"round = {number}, held_in_a_row = {held_in_a_row} and patience = {patience} count from 0, and "
            f"max_rounds = {max_rounds} from 1."
        )
    if reviewer is not None and reviewer not in DECISIONS:
        raise ValueError(
            f"The reviewer's answer {reviewer!r} is unknown; answer one of {', '.join(DECISIONS)}."
        )
    if on_alarm not in ("ignore", "hold"):
        raise ValueError(f"on_alarm = {on_alarm!r} is unknown; choose 'ignore' or 'hold'.")
