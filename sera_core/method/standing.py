"""The state of a run and its next decision, derived from past decisions only."""

from collections.abc import Sequence
from dataclasses import dataclass

from sera_core.method.convergence import Decision, decide
from sera_core.method.deciding import Judged


@dataclass(frozen=True)
class Standing:
    """The state of a run."""

    promoted: tuple[int, ...]
    """Promoted rounds."""
    line: tuple[int, ...]
    """Promoted rounds that the head descends from, oldest first, the head last."""
    held_in_a_row: int
    """Rounds held since the last promotion or roll-back."""
    rolled_back: bool
    """Whether the run has rolled back."""


def standing(history: Sequence[tuple[str, int | None]]) -> Standing:
    """The state of a run after its rounds.

    Args:
        history: (decision, head after it) of round 0, 1, …

    Raises:
        ValueError: a roll-back to a round that was never head.
    """
    promoted: list[int] = []
    lines: dict[int, tuple[int, ...]] = {}
    line: tuple[int, ...] = ()
    held = 0
    for number, (decision, head) in enumerate(history):
        held = held + 1 if decision == "hold" else 0
        if decision == "promote":
            promoted.append(number)
            line = (*line, number)
            lines[number] = line
        elif decision == "roll_back":
            if head not in lines:
                raise ValueError(f"Round {number} rolled back to round {head}, which never was the head.")
            line = lines[head]
    return Standing(tuple(promoted), line, held, any(decision == "roll_back" for decision, _ in history))


def decide_round(
    judged: Judged,
    stands: Standing,
    *,
    round: int,
    patience: int,
    max_rounds: int,
    reviewer: str | None = None,
    alarm: bool = False,
    on_alarm: str = "ignore",
) -> tuple[Decision, int]:
    """The decision about a judged round (the table of `convergence.decide`), and the head after it.

    A roll-back goes to the best round by the half of the held-out prompts that chooses. Where the head is
    that round already there is nothing to go back to, and the run stops as `degraded`.

    Args:
        judged: the round, judged.
        stands: the run before it.
        round: its number.
        patience, max_rounds, reviewer, alarm, on_alarm: as in `convergence.decide`.
    """
    head = stands.line[-1]
    value = judged.score.value
    decision = decide(
        round=round,
        verdict=judged.verdict,
        accuracy=float("nan") if value is None else value,
        best_accuracy=judged.best.chosen_by,
        held_in_a_row=stands.held_in_a_row,
        patience=patience,
        rolled_back=stands.rolled_back,
        max_rounds=max_rounds,
        reviewer=reviewer,
        alarm=alarm,
        on_alarm=on_alarm,
        head_is_best=judged.best.round == head,
    )
    after = {"promote": round, "roll_back": judged.best.round}.get(decision.decision, head)
    return decision, after
