"""Reviews in Prefect: a deployed run suspends without a process, and resumes with the answer.

Question and answer are records in the store; the answer comes from the form or from `sera review`.
"""

from collections.abc import Sequence
from typing import Literal

from prefect import get_run_logger
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from flows.display.cards import key_of
from flows.display.deployed import in_deployed_run
from flows.display.markdown import escape
from sera_core.artifacts.run_records import DecisionName
from sera_core.artifacts.runs import RunStore


class Review(RunInput):
    """The review form."""

    decision: DecisionName
    note: str = ""


class FirstReview(RunInput):
    """The review form before any round is promoted: hold and roll_back need a head."""

    decision: Literal["promote", "stop"]
    note: str = ""


MEANINGS = {
    "promote": "the round's policy becomes the head",
    "hold": "the head stays, and the next round starts from it",
    "roll_back": "the head goes back to the best round",
    "stop": "the run stops",
}
"""The effect of each decision."""


def ask_person(records: RunStore) -> bool:
    """Suspend until the open review is answered in the form; False if the flow run cannot suspend.

    There is no Prefect timeout, since that would fail the run. After the deadline, the next command or flow
    that opens the run records the default answer.
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
    assert given is not None  # Prefect refuses to resume without the form
    answer = records.answer_of(number) or records.answer(number, given.decision, given.note, "prefect")
    if answer["decision"] != given.decision:
        get_run_logger().warning(
            "round %s was already reviewed: %s (%s); that answer counts",
            number, answer["decision"], answer["who"],
        )  # fmt: skip
    return True


def _describe(run: str, number: int, question: dict, offered: Sequence[str]) -> str:
    evidence = question["evidence"]
    return "\n".join(
        [
            f"## {run}, round {number}: promote it?",
            "",
            f"Suggested decision: **{evidence['decision']}**: {escape(str(evidence['reason']))}",
            "",
            f"Convergence: {escape(str(evidence['verdict']))}. "
            f"Alarm: {escape(str(evidence['alarm'] or 'none'))}. "
            f"Without an answer by {question['until']}, the decision is `{question['default']}`.",
            "",
            *(f"* {decision}: {MEANINGS[decision]}" for decision in offered),
            *(["", f"[Earlier rounds](/artifacts/key/{key_of(run, 'index')})"] if number else []),
        ]
    )
