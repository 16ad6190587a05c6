"""Why a run stops, holds, rolls back, waits, and goes on again."""

import pytest
import tinyrun

from flows.cli import main
from flows.display.run_view import show
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("stopping")


def run(shared, name, prefect_server, *sets, **sections):
    experiment = tinyrun.experiment(shared, **sections)
    changes = [word for change in sets for word in ("--set", change)]
    code = main(["run", str(experiment), "--name", name, "--store", str(shared / "store"), *changes])
    assert code == 0
    return show(RunStore(open_store(str(shared / "store")), name))


def test_max_rounds_ends_a_run_and_a_raised_limit_goes_on_without_redoing(shared, prefect_server):
    first = run(shared, "rounds", prefect_server, limits={"rounds": 1})
    assert first["stop_reason"] == "max_rounds" and len(first["rounds"]) == 1
    more = run(shared, "rounds", prefect_server, limits={"rounds": 2})
    assert more["stop_reason"] == "max_rounds" and len(more["rounds"]) == 2
    assert more["rounds"][0] == first["rounds"][0]


@pytest.mark.parametrize(("limit", "value"), [("tokens", 3000), ("hours", 1e-7)])
def test_a_budget_ends_the_run_after_the_step_that_crosses_it(shared, prefect_server, limit, value):
    name = f"budget-{limit}"
    stopped = run(shared, name, prefect_server, f"seed={len(limit)}", limits={"rounds": 2, limit: value})
    assert stopped["stop_reason"] == "budget" and len(stopped["rounds"]) < 2
    again = run(shared, name, prefect_server, f"seed={len(limit)}", limits={"rounds": 2, limit: value})
    assert again == stopped
    raised = run(shared, name, prefect_server, f"seed={len(limit)}", limits={"rounds": 2})
    assert raised["stop_reason"] == "max_rounds" and len(raised["rounds"]) == 2


def test_no_pairs_stops_when_nothing_generated_is_left(shared, prefect_server):
    found = run(shared, "nopairs", prefect_server, select_generated={"min_margin": 1e9})
    last = found["rounds"][-1]
    assert found["stop_reason"] == "no_pairs" and last["decision"] == "stop"
    assert last["pairs"] == {"human": 0, "generated": 0} and "policy" not in last["artifacts"]
    assert {"ledger", "mixture", "report"} <= set(last["artifacts"])


def test_a_converged_run_stops_before_its_last_round(shared, prefect_server):
    found = run(
        shared, "converged", prefect_server,
        train={"learning_rate": 1e-9}, limits={"rounds": 5}, mix={"shares": [0.0]},
        select={"min_margin": float("-inf")}, decide={"min_effect": 0.9, "min_overlap": 0.0, "max_ks": 1.0},
    )  # fmt: skip
    assert found["stop_reason"] == "converged" and len(found["rounds"]) == 3  # shown over two heads
    assert found["rounds"][-1]["decision"] == "promote"


def test_a_review_waits_and_the_answer_decides(shared, prefect_server, sera):
    waiting = run(shared, "review", prefect_server, decide={"review": "always"}, limits={"rounds": 4})
    assert waiting["waiting"]["round"] == 0 and waiting["stop_reason"] is None and not waiting["rounds"]
    store = str(shared / "store")
    question = sera("review", "review", "--store", store, "--json").json["question"]
    assert question["evidence"]["decision"] == "promote"
    for refused in ("hold", "roll_back"):  # they would leave the run without a head
        told = sera("review", "review", "--decision", refused, "--store", store, code=2).err
        assert refused in told and "without a head; answer promote or stop" in told
    assert "--decision promote|stop --note" in sera("review", "review", "--store", store).out
    answers = ["promote", "hold", "roll_back", "stop"]
    for number, answer in enumerate(answers):
        sera("review", "review", "--decision", answer, "--note", "seen", "--store", store)
        found = run(shared, "review", prefect_server, decide={"review": "always"}, limits={"rounds": 4})
        assert [r["decision"] for r in found["rounds"]] == answers[: number + 1]
    assert found["stop_reason"] == "reviewer" and found["head"] == 0 == found["best_round"]
    sera("review", "review", "--decision", "stop", "--store", store, code=2)


def test_a_second_roll_back_stops_as_degraded(shared, prefect_server, sera):
    settings = {"decide": {"review": "always"}, "limits": {"rounds": 9}, "mix": {"shares": [0.0]}}
    run(shared, "degraded", prefect_server, **settings)
    for answer in ("promote", "roll_back", "roll_back"):
        sera("review", "degraded", "--decision", answer, "--store", shared / "store")
        found = run(shared, "degraded", prefect_server, **settings)
    assert found["stop_reason"] == "degraded"


def test_the_deadline_writes_the_configured_answer(shared, prefect_server):
    decide = {"review": "always", "review_hours": 1e-9, "review_default": "stop"}
    run(shared, "deadline", prefect_server, decide=decide)
    found = run(shared, "deadline", prefect_server, decide=decide)
    assert found["stop_reason"] == "reviewer"
    assert found["rounds"][0]["decision"] == "stop"


def test_falling_accuracy_is_held_and_then_stops_at_the_best_round(shared, prefect_server):
    """Round 0 learns from mostly right labels; the rule `bottom` then trains on the turned ones alone."""
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in tinyrun.pairs(24, seed=3)
    ]
    train = tinyrun.write_rows(shared / "turned.jsonl", [*tinyrun.pairs(48), *turned])
    heldout = tinyrun.write_rows(shared / "held.jsonl", tinyrun.pairs(12, seed=9))
    found = run(
        shared, "falling", prefect_server,
        data={"train": [{"path": str(train)}], "heldout": [{"path": str(heldout)}], "on_overlap": "keep"},
        select={"rule": "bottom", "fraction": 0.3}, mix={"shares": [0.0]},
        train={"learning_rate": 5e-3, "epochs": 3}, limits={"rounds": 5, "patience": 1},
    )  # fmt: skip
    assert [r["decision"] for r in found["rounds"]] == ["promote", "hold", "stop"]
    assert found["stop_reason"] == "degraded"
    assert found["best_round"] == found["head"] == 0
