"""SeRA as Prefect flows: all rounds of a run. What a round does reads in flows/round.py.

from flows.sera import sera
sera(config, run="my-run", store="./sera-store")
"""

from functools import wraps

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flows import Flow
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.display import cards, events
from flows.display.deployed import in_deployed_run
from flows.display.logs import library_logs, run_log, show_prefects_lines
from flows.display.progress import reporter
from flows.orchestration.form import FormConfig
from flows.orchestration.limits import device_slot, run_slot
from flows.orchestration.reviews import ask_person
from flows.planning.plan import plan
from flows.running import open_run, run_names
from flows.running.rounds import PAUSED, report_test_side, run_round, test_side_is_open
from flows.running.session import Runner, Session
from sera_core.artifacts.lease import hold
from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import default_store, open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from tasks.step_functions import do_work

show_prefects_lines()  # before Prefect says that a run begins

RESTARTS = 5
"""Restarts of one flow run without a finished round in between, before it gives up."""


@flow(name="sera", flow_run_name="{run}", persist_result=False)
def sera(
    config: FormConfig, run: str = "sera-{data}", store: str | None = None, dry_run: bool = False
) -> State[str]:
    """Self-reviewing alignment, round after round, until it converges or a limit is reached.

    Results in the stop reason, or `waiting` when a person is asked elsewhere. The same name again goes on
    where it stopped; a run that is finished, or whose content was worked through by another one, ends at
    once with `nothing new`.

    Args:
        config: Model, data and settings.
        run: Name of the run; `{date}` and `{data}` (hash of the data's content) are filled in.
        store: Folder or s3://bucket/prefix for the artifacts. Empty: the worker's SERA_STORE.
        dry_run: Publish the plan as an artifact and do nothing.
    """
    store = store or default_store()
    name = run_names.resolve_run_name(run, config)
    if dry_run:
        cards.publish_plan(name, plan(config, name, store))
        return Completed(message="planned; nothing was done", data="planned")
    if "{date}" in run and (before := run_names.find_finished(open_store(store), config)) not in (None, name):
        return Completed(message=f"nothing new: run {before} did exactly this", data="nothing new")
    with run_slot(name):  # opening reads the data: of two triggers at one moment one does
        records = open_run.open_run(config, name, store)
    if is_over(records):
        reason = records.state()
        return Completed(message=f"nothing new: run {name} has stopped ({reason})", data=reason)
    check_restarts(records)
    cards.publish_missing(records)
    state = until_it_stops(records, store)
    return Completed(message=f"run {name}: {state}", data=state)


def is_over(records: RunStore) -> bool:
    """Whether the run has stopped and its last word is said."""
    state = records.state()
    return state == "budget" or (state not in ("open", "waiting") and not test_side_is_open(records))


def check_restarts(records: RunStore) -> None:
    """End a loop of crashes: each finished round pays for more restarts, a round that never ends does not.

    Raises:
        SeraError: this flow run was started too often.
    """
    rounds = records.history().next_round
    if in_deployed_run() and flow_run.run_count > RESTARTS * (rounds + 1):
        raise SeraError(
            f"run {records.run!r}: this flow run was started {flow_run.run_count} times and finished "
            f"{rounds} rounds; its log says what ended it. When that is mended, trigger the run again: it "
            "goes on where it stands"
        )


def until_it_stops(records: RunStore, store: str) -> str:
    """All rounds, asking a person where the run is to; the stop reason, or `waiting`."""
    while True:
        with run_slot(records.run), hold(records.store, records.run, run_log()):
            while records.state() == "open":
                one_round(records, store)
            finish(records, store)
        if not ask_person(records):
            return "waiting"
        if (state := records.state()) != "open":
            return state


def one_round(records: RunStore, store: str) -> None:
    """The open round as a subflow, and the run's index renewed."""
    number = records.history().next_round
    round_flow(records, number)(records.run, store, number)
    cards.publish_index(records)


def finish(records: RunStore, store: str) -> None:
    """The run's last word, once it has stopped: the test side, the event, what a later trigger may find."""
    state = records.state()
    if state in ("open", "waiting"):
        return
    if state not in PAUSED:
        report_test_side(Session(store, records.run, runner(records)))
    run_names.record_finished(records)
    events.run_stopped(records)


def round_flow(records: RunStore, number: int) -> Flow:
    """The round's subflow, under a function name of its own.

    Prefect matches the subflows of a flow run that runs again to the earlier ones by function name and
    count: a rerun that begins with round 2 would be handed the result of round 0. So the name says
    what the round goes on from: its number, the limits in force, whether a review was answered.
    """

    @wraps(work_round)
    def this_round(run: str, store: str, round: int) -> str:
        return work_round(run, store, round)

    asked = records.question(number) is not None
    position = f"{records.run}_{number}_{len(records.configs())}_{'answered' if asked else 'new'}"
    this_round.__qualname__ = "round_" + position.replace(".", "_")
    return flow(name="sera-round", flow_run_name="{run}-round-{round}", persist_result=False)(this_round)


def work_round(run: str, store: str, round: int) -> str:
    """One round, from the head to a decision. Returns `open`, a stop reason, `waiting` or `budget`."""
    records = RunStore(open_store(store), run)
    session = Session(store, run, runner(records))
    state = run_round(session, round)
    if state not in PAUSED:
        manifest = records.rounds()[round]
        cards.publish_round(records, manifest, session.config.review.show_text)
        events.round_completed(manifest, records.store.url)
    return state


def runner(records: RunStore) -> Runner:
    """How a step without a record is done: as a Prefect task named after it."""
    store = records.store.url
    execution = ExecutionConfig.model_validate(records.configs()[-1].config["execution"])

    def run_task(spec: StepSpec) -> StepRecord:
        where = {"run": records.run, "logs": f"sera-logs/{records.run}/round-{spec.fields.get('round')}"}
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
    with library_logs(), reporter(TITLES[spec.step]) as progress:
        return do_work(store, spec, execution, progress, run_log(), device_slot(spec.step, execution))


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
