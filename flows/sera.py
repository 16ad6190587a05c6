"""SeRA as Prefect flows: all rounds of a run. What a round does reads in flows/round.py.

from flows.sera import sera
sera(config, run="my-run", store="./sera-store")
"""

import os

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import opening
from flows.cards import index_card, key_of, round_card
from flows.progress import reporter
from flows.session import Runner, Session
from flows.working import PAUSED, report_test_side, work_through
from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig, SeraConfig
from tasks.work import work_of


@flow(name="sera", flow_run_name="{run}", persist_result=False)
def sera(config: SeraConfig, run: str = "sera", store: str | None = None) -> str:
    """Self-reviewing alignment, round after round, until it converges or a limit is reached.

    Returns the stop reason, or `waiting` when a person is asked. The same name again goes on where it
    stopped.
    """
    store = store or os.environ.get("SERA_STORE", "./sera-store")
    records = opening.open_run(config, run, store)
    while (state := opening.state_of(records)) == "open":
        state = sera_round(run, store, records.history().next_round)
        create_markdown_artifact(index_card(records), key=key_of(run, "index"), description=f"run {run}")
        if state in PAUSED:
            return state
    if state not in PAUSED:
        report_test_side(Session(store, run, runner(store, run)))
    return state


@flow(name="sera-round", flow_run_name="{run}-round-{round}", persist_result=False)
def sera_round(run: str, store: str, round: int) -> str:
    """One round, from the head to a decision. Returns `open`, a stop reason, `waiting` or `budget`."""
    session = Session(store, run, runner(store, run))
    state = work_through(session, round)
    if state not in PAUSED:
        card = round_card(session.records.rounds()[round])
        create_markdown_artifact(
            card, key=key_of(run, f"round-{round}"), description=f"run {run}, round {round}"
        )
    return state


def runner(store: str, run: str) -> Runner:
    """How a step without a record is done: as a Prefect task named after it."""
    execution = ExecutionConfig.model_validate(
        RunStore(open_store(store), run).configs()[-1].config["execution"]
    )

    def run_task(spec: StepSpec) -> StepRecord:
        where = {"run": run, "logs": f"sera-logs/{run}/round-{spec.fields.get('round')}"}
        named = spec.model_copy(update={"where": {**spec.where, **where}})
        return do_step.with_options(name=TITLES[spec.step], task_run_name=TITLES[spec.step])(
            named, store, execution
        )

    return run_task


# Resume rests on the store's records (a step that is done is never a task again), so Prefect's result cache
# stays out.
@task(persist_result=False, cache_policy=NO_CACHE)
def do_step(spec: StepSpec, store: str, execution: ExecutionConfig) -> StepRecord:
    """Do one step: read refs, work, commit the record."""
    with reporter(TITLES[spec.step]) as progress:
        return run_step(open_store(store), spec, work_of(spec.step), execution, progress)


TITLES = {
    "data": "load pairs",
    "model": "import policy",
    "render": "render to token ids",
    "logps": "score responses",
    "review": "review pairs",
    "select": "select pairs",
    "sample": "sample responses",
    "pair": "pair responses",
    "mix": "mix pairs",
    "train": "train policy",
    "evaluate": "evaluate policy",
    "test": "evaluate on the test side",
    "decide": "decide",
    "report": "report",
}
"""Task names, as they stand in the timeline."""
