"""Run one round, and report on the test set once a run has stopped.

Plain Python; flows/sera.py wraps it in Prefect flows.
"""

from flows import round
from flows.running import manifests, open_run
from flows.running.session import Session
from sera_core import steps
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.config import LimitsConfig
from sera_core.errors import BudgetReached
from tasks.engines.tracking import refuse_missing

PAUSED = ("waiting", "budget")
"""States from which a run may resume, so the test set is not reported yet."""


def run_round(session: Session, number: int) -> str:
    """Do a round's steps and commit its manifest. Returns `open`, a stop reason, `waiting` or `budget`.

    Raises:
        InputError: the configured tracker is not installed here, or a fold has no pairs.
    """
    refuse_missing(session.config.execution.tracking)
    session.round = number
    try:
        return _run_steps(session, number)
    except BudgetReached as reached:
        session.records.record_stop("budget", str(reached))
        return "budget"


def _run_steps(session: Session, number: int) -> str:
    config, past, history, do = session.config, session.past(), session.history, session.do
    sides = session.prepare()
    open_run.check_folds(session.store, config, sides.pairs, "within the limits of tokens")
    made = round.self_review(config, sides, past, number, do, session.look)
    made |= {"data": sides.data, "model": sides.model, "pairs": sides.pairs}
    if session.record_of(made["mixture"]).metric("reason") != "no_pairs":
        made["policy"] = round.align(config, sides, past, number, made, do)
        made |= round.gather_evidence(config, sides, past, number, made["mixture"], made["policy"], do)
        entries = history.entries()
        made["decision"] = round.decide(config, sides, past, number, made, entries, None, do)
        if session.record_of(made["decision"]).metric("ask"):
            answer = open_run.request_review(session, number, made["decision"])
            if answer is None:
                return "waiting"
            made["decision"] = round.decide(config, sides, past, number, made, entries, answer, do)
    made["report"] = do(
        steps.report(number, {role: ref for role, ref in made.items() if role not in ("data", "model")})
    )
    session.records.commit_round(manifests.manifest_of(session, number, made))
    return session.records.state()


def report_test_side(session: Session) -> None:
    """Evaluate the best round's policy on the test set, once the run has stopped."""
    session.meter.limits = LimitsConfig()  # the run has stopped; the test report is not limited
    best = session.history.best
    if best is None or not test_side_is_open(session.records):
        return
    ref = round.test_evidence(session.config, session.prepare(), best.steps["policy"], session.do)
    open_run.record_test_evidence(session, best.round, ref)


def has_work(records: RunStore) -> bool:
    """Whether the run is open, or stopped without its report on the test set."""
    state = records.state()
    return state == "open" or (state not in PAUSED and test_side_is_open(records))


def test_side_is_open(records: RunStore) -> bool:
    """Whether there is a test set on which the best round's policy is not evaluated yet."""
    best = records.history().best
    if best is None or open_run.test_record(records) is not None:
        return False
    return bool(Artifact(records.store, best.steps["pairs"]).record.files["test.parquet"].rows)
