"""Asking a person in Prefect: a deployed run suspends, holding no process, and goes on from the answer.

Question and answer are records in the store; the form is one way to write the answer, `sera review` another.
"""

from collections.abc import Sequence
from typing import Literal

from prefect import get_run_logger
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from flows.display.cards import key_of
from flows.display.deployed import in_deployed_run
from flows.display.markdown import escape
from sera_core.artifacts.runs import DecisionName, RunStore


class Review(RunInput):
    """The form a person fills in."""

    decision: DecisionName
    note: str = ""


class FirstReview(RunInput):
    """The form as long as no round is promoted: hold or roll_back would leave the run without a head."""

    decision: Literal["promote", "stop"]
    note: str = ""


MEANINGS = {
    "promote": "the round's policy becomes the head",
    "hold": "the head stays, the next round is tried from it",
    "roll_back": "the head goes back to the best round",
    "stop": "the run ends here",
}
"""What each answer does."""


def ask_person(records: RunStore) -> bool:
    """Suspend until the open question is answered in the form; False where a flow run cannot suspend.

    No timeout of Prefect's: it would fail the run. Whoever touches the run after the deadline writes the
    default, and then that stands.
    """
    waiting = records.waiting()
    if waiting is None:
        return True
    if not in_deployed_run():
        return False
    number = waiting["round"]
    question = records.question(number) or {}
    offered = records.decisions()
    form = (Review if "hold" in offered else FirstReview).with_initial_data(
        description=_describe(records.run, number, question, offered),
        decision=question["evidence"]["decision"],
        note="",
    )
    given = suspend_flow_run(wait_for_input=form, key=f"review-{number}")
    assert given is not None  # Prefect fails a run that is resumed without the form
    answer = records.answer_of(number) or records.answer(number, given.decision, given.note, "prefect")
    if answer["decision"] != given.decision:
        get_run_logger().warning(
            "the review of round %s was answered before: %s (%s); that stands",
            number, answer["decision"], answer["who"],
        )  # fmt: skip
    return True


def _describe(run: str, number: int, question: dict, offered: Sequence[str]) -> str:
    evidence = question["evidence"]
    return "\n".join(
        [
            f"## {run}, round {number}: what shall be done with it?",
            "",
            f"The evidence says **{evidence['decision']}**: {escape(str(evidence['reason']))}",
            "",
            f"Convergence: {escape(str(evidence['verdict']))}. "
            f"Alarm: {escape(str(evidence['alarm'] or 'none'))}. "
            f"Unanswered by {question['until']}, `{question['default']}` is taken.",
            "",
            *(f"* {decision}: {MEANINGS[decision]}" for decision in offered),
            *(["", f"[The rounds before it](/artifacts/key/{key_of(run, 'index')})"] if number else []),
        ]
    )
