"""The decision on a round from its verdict, and the state of a run from its past decisions."""

from collections.abc import Sequence
from dataclasses import dataclass

from sera_core.method.convergence import Comparison, Verdict, score_words

DECISIONS = ("promote", "hold", "roll_back", "stop")
STOP_REASONS = ("converged", "max_rounds", "degraded", "no_pairs", "budget", "reviewer")


@dataclass(frozen=True)
class Decision:
    """Decision on a round. `stop_reason` is None while the run continues; any decision may have one."""

    decision: str
    reason: str
    stop_reason: str | None = None


def decide(
    *,
    round: int,
    verdict: Verdict,
    score: str,
    held_in_a_row: int,
    patience: int,
    rolled_back: bool,
    max_rounds: int,
    reviewer: str | None = None,
    alarm: bool = False,
    on_alarm: str = "ignore",
    lost: str = "",
    head_is_best: bool = False,
) -> Decision:
    """Decide on a round. The first row that applies decides; the last row may add its stop reason.

    | when                                                        | decision    | stop reason           |
    |-------------------------------------------------------------|-------------|-----------------------|
    | a reviewer said so                                          | theirs      | `reviewer` for `stop` |
    | … `roll_back`, for the second time                          | `stop`      | `degraded`            |
    | round 0: without it there is no head                        | `promote`   |                       |
    | degrading, a lost capability, or alarm and                  |             |                       |
    | `on_alarm = "hold"`, and                                    |             |                       |
    | … holds in a row with this one <= patience                  | `hold`      |                       |
    | … patience is out, rolled back before or head is the best   | `stop`      | `degraded`            |
    | … patience is out                                           | `roll_back` |                       |
    | converged                                                   | `promote`   | `converged`           |
    | improving, still moving, not enough evidence                | `promote`   |                       |
    | none of the stop reasons above, and it is the last round    | as above    | `max_rounds`          |

    If the head is already the best round, a roll-back would change nothing, so the run stops instead.

    Args:
        round: the round's number, from 0.
        verdict: of `convergence.compare_round`.
        score: its score in words; only for the reason.
        held_in_a_row: rounds held directly before this one, back to the last promotion or roll-back.
        patience: number of consecutive holds allowed.
        rolled_back: the run has rolled back before.
        max_rounds: maximum number of rounds, including round 0.
        reviewer: a person's answer, one of DECISIONS.
        alarm: the amplification alarm was raised.
        on_alarm: `ignore` (report only) or `hold`.
        lost: capabilities lost against the start policy (`capabilities.lost`); empty if none is.
        head_is_best: the head is the best round.

    Raises:
        ValueError: an unknown answer or on_alarm, or a number out of its range.
    """
    _check_decide(round, held_in_a_row, patience, max_rounds, reviewer, on_alarm)
    trouble = "the amplification alarm was raised" if alarm and on_alarm == "hold" else ""
    trouble = verdict.reason if verdict.name == "degrading" else lost or trouble

    if reviewer is not None:
        decision = _reviewed(reviewer, rolled_back)
    elif round == 0:
        decision = Decision("promote", f"the first round becomes the head; {score}")
    elif trouble and held_in_a_row + 1 <= patience:
        decision = Decision("hold", f"{trouble}; hold {held_in_a_row + 1} of {patience}; {score}")
    elif trouble and (rolled_back or head_is_best):
        why = "the run rolled back before" if rolled_back else "the head is the best round already"
        decision = Decision(
            "stop", f"{trouble}; patience of {patience} is out and {why}; {score}", "degraded"
        )
    elif trouble:
        decision = Decision("roll_back", f"{trouble}; patience of {patience} is out; {score}")
    else:
        stop = "converged" if verdict.converged else None
        decision = Decision("promote", f"{verdict.name}: {verdict.reason}; {score}", stop)

    if decision.stop_reason is None and round + 1 >= max_rounds:
        return Decision(
            decision.decision, f"{decision.reason}; the last of {max_rounds} rounds", "max_rounds"
        )
    return decision


@dataclass(frozen=True)
class RunState:
    """The state of a run."""

    promoted: tuple[int, ...]
    """Promoted rounds."""
    lineage: tuple[int, ...]
    """Promoted rounds that the head descends from, oldest first; the head is the last."""
    held_in_a_row: int
    """Rounds held since the last promotion or roll-back."""
    rolled_back: bool
    """Whether the run has rolled back."""


def run_state(history: Sequence[tuple[str, int | None]]) -> RunState:
    """The state of a run after its rounds.

    Args:
        history: (decision, head after it) of round 0, 1, …

    Raises:
        ValueError: a roll-back to a round that was never head.
    """
    promoted: list[int] = []
    lineage_of: dict[int, tuple[int, ...]] = {}
    lineage: tuple[int, ...] = ()
    held = 0
    for number, (decision, head) in enumerate(history):
        held = held + 1 if decision == "hold" else 0
        if decision == "promote":
            promoted.append(number)
            lineage = lineage_of[number] = (*lineage, number)
        elif decision == "roll_back":
            if head not in lineage_of:
                raise ValueError(f"Round {number} rolled back to round {head}, which was never the head.")
            lineage = lineage_of[head]
    return RunState(tuple(promoted), lineage, held, any(decision == "roll_back" for decision, _ in history))


def decide_round(
    comparison: Comparison,
    state: RunState,
    *,
    round: int,
    patience: int,
    max_rounds: int,
    reviewer: str | None = None,
    alarm: bool = False,
    on_alarm: str = "ignore",
    lost: str = "",
) -> tuple[Decision, int]:
    """Decide on a round that was compared (table of `decide`). Returns the decision and the head after it.

    A roll-back goes to the best round, chosen by half of the held-out prompts. If the head is already that
    round, the run stops as `degraded`.

    Args:
        comparison: the round against all promoted rounds.
        state: the run's state before the round.
        round, patience, max_rounds, reviewer, alarm, on_alarm, lost: as in `decide`.
    """
    head = state.lineage[-1]
    decision = decide(
        round=round,
        verdict=comparison.verdict,
        score=score_words(comparison.quantity, comparison.score),
        held_in_a_row=state.held_in_a_row,
        patience=patience,
        rolled_back=state.rolled_back,
        max_rounds=max_rounds,
        reviewer=reviewer,
        alarm=alarm,
        on_alarm=on_alarm,
        lost=lost,
        head_is_best=comparison.best.round == head,
    )
    after = {"promote": round, "roll_back": comparison.best.round}.get(decision.decision, head)
    return decision, after


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
