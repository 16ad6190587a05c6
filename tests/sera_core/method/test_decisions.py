import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.convergence import VERDICTS, Verdict
from sera_core.method.decisions import DECISIONS, STOP_REASONS, decide, run_state

light = settings(max_examples=80, deadline=None, derandomize=True)


def decided(name="improving", **how):
    defaults = {
        "round": 2, "score": "held-out accuracy 0.700", "held_in_a_row": 0, "patience": 1,
        "rolled_back": False, "max_rounds": 9,
    }  # fmt: skip
    got = decide(verdict=Verdict(name == "converged", name, "because", {}), **(defaults | how))
    assert got.reason
    return got.decision, got.stop_reason


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("improving", {}, ("promote", None)),
        ("still_moving", {}, ("promote", None)),
        ("not_enough_evidence", {}, ("promote", None)),
        ("converged", {}, ("promote", "converged")),
        ("not_enough_evidence", {"round": 0}, ("promote", None)),
        ("degrading", {"round": 0}, ("promote", None)),
        ("degrading", {}, ("hold", None)),
        ("degrading", {"held_in_a_row": 1}, ("roll_back", None)),
        ("degrading", {"held_in_a_row": 1, "patience": 2}, ("hold", None)),
        ("degrading", {"patience": 0}, ("roll_back", None)),
        ("degrading", {"held_in_a_row": 1, "rolled_back": True}, ("stop", "degraded")),
        ("degrading", {"held_in_a_row": 1, "head_is_best": True}, ("stop", "degraded")),
        ("degrading", {"rolled_back": True}, ("hold", None)),
        ("improving", {"alarm": True}, ("promote", None)),
        ("improving", {"alarm": True, "on_alarm": "hold"}, ("hold", None)),
        ("converged", {"alarm": True, "on_alarm": "hold"}, ("hold", None)),
        ("improving", {"alarm": True, "on_alarm": "hold", "held_in_a_row": 1}, ("roll_back", None)),
        ("improving", {"on_alarm": "hold"}, ("promote", None)),
        ("degrading", {"reviewer": "promote"}, ("promote", None)),
        ("improving", {"reviewer": "hold"}, ("hold", None)),
        ("improving", {"reviewer": "stop"}, ("stop", "reviewer")),
        ("improving", {"reviewer": "roll_back"}, ("roll_back", None)),
        ("improving", {"reviewer": "roll_back", "rolled_back": True}, ("stop", "degraded")),
        ("converged", {"reviewer": "promote"}, ("promote", None)),
        ("improving", {"max_rounds": 3}, ("promote", "max_rounds")),
        ("improving", {"max_rounds": 4}, ("promote", None)),
        ("degrading", {"max_rounds": 3}, ("hold", "max_rounds")),
        ("converged", {"max_rounds": 3}, ("promote", "converged")),
        ("improving", {"max_rounds": 3, "reviewer": "stop"}, ("stop", "reviewer")),
        ("improving", {"round": 0, "max_rounds": 1}, ("promote", "max_rounds")),
    ],
)
def test_the_decision_follows_its_table(name, how, expected):
    assert decided(name, **how) == expected


@light
@given(
    st.sampled_from(VERDICTS), st.integers(0, 6), st.integers(0, 4), st.integers(0, 3), st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.sampled_from(DECISIONS)), st.booleans(),
)  # fmt: skip
def test_the_run_always_ends_and_a_stop_always_has_a_reason(
    name, number, held, patience, rolled, best, said, alarm
):
    decision, stop = decided(
        name, round=number, held_in_a_row=held, patience=patience, rolled_back=rolled, head_is_best=best,
        reviewer=said, alarm=alarm, on_alarm="hold", max_rounds=5,
    )  # fmt: skip
    assert decision in DECISIONS
    assert stop is None or stop in STOP_REASONS
    assert stop is not None or (decision != "stop" and number < 4)
    assert not (decision == "roll_back" and rolled)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"reviewer": "yes"}, "answer one of promote"),
        ({"on_alarm": "stop"}, "'ignore' or 'hold'"),
        ({"patience": -1}, "count from 0"),
        ({"max_rounds": 0}, "from 1"),
    ],
)
def test_a_decision_that_cannot_be_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        decided(**how)


def test_the_state_of_a_run_follows_from_its_decisions():
    history = [("promote", 0), ("promote", 1), ("promote", 2), ("hold", 2), ("roll_back", 1), ("promote", 5)]
    assert run_state(history[:4]).held_in_a_row == 1
    back = run_state(history[:5])
    assert (back.lineage, back.promoted, back.held_in_a_row, back.rolled_back) == ((0, 1), (0, 1, 2), 0, True)
    assert run_state(history).lineage == (0, 1, 5)
    with pytest.raises(ValueError, match="was never the head"):
        run_state([("promote", 0), ("roll_back", 3)])
