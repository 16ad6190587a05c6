"""SeRA as Prefect flows: all rounds of a run. The steps of one round are in flows/round.py.

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
from flows.display.logs import escape_prefect_logs, library_logs, run_log
from flows.display.progress import reporter
from flows.display.step_titles import TITLES
from flows.orchestration.form import FormConfig, RunName, StoreName
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
from tasks.engines.child_process import keep_process
from tasks.step_functions import do_work

escape_prefect_logs()  # before Prefect logs the start of a run

RESTARTS = 5
"""Restarts of a flow run allowed per round."""


@flow(name="sera", flow_run_name="{run}", persist_result=False)
def sera(
    config: FormConfig, run: RunName = "sera-{data}", store: StoreName = "", dry_run: bool = False
) -> State[str]:
    """Align a policy in self-reviewed rounds until it converges or reaches a limit.

    Results in the stop reason, or `waiting` if a review is answered elsewhere. Rerunning a name resumes the
    run. A finished run, or one identical to a finished run, ends at once with `nothing new`.

    Args:
        config: As it is, Submit runs the demo: about ten minutes on two cores.
        run: Name of the run, in place of Run Name above; `{date}` and `{data}` (a hash of it) are filled in.
        store: Folder or s3://bucket/prefix for the artifacts. Empty: the worker's SERA_STORE.
        dry_run: Only publish the plan as an artifact.
    """
    store = store or default_store()
    name = run_names.resolve_run_name(run, config)
    if dry_run:
        cards.publish_plan(name, plan(config, name, store))
        return Completed(message="plan published; nothing was run", data="planned")
    if "{date}" in run and (before := run_names.find_finished(open_store(store), config)) not in (None, name):
        return Completed(message=f"nothing new: run {before} is identical and finished", data="nothing new")
    with run_slot(name):  # two simultaneous triggers must not both read the data
        records = open_run.open_run(config, name, store)
    if is_finished(records):
        reason = records.state()
        return Completed(message=f"nothing new: run {name} has stopped ({reason})", data=reason)
    check_restarts(f"run {name!r}", records.history().next_round)
    cards.publish_missing(records)
    state = run_until_stopped(records, store)
    return Completed(message=f"run {name}: {state}", data=state)


def is_finished(records: RunStore) -> bool:
    """Whether the run has stopped and its test report is written."""
    state = records.state()
    return state == "budget" or (state not in ("open", "waiting") and not test_side_is_open(records))


def check_restarts(what: str, rounds: int) -> None:
    """Stop a crash loop: a flow run may restart RESTARTS times per finished round.

    Args:
        what: what the flow run works on.
        rounds: rounds that are finished.

    Raises:
        SeraError: this flow run was started too often.
    """
    if in_deployed_run() and flow_run.run_count > RESTARTS * (rounds + 1):
        raise SeraError(
            f"{what}: this flow run was started {flow_run.run_count} times and finished "
            f"{rounds} rounds; see its log for the cause. Fix it and trigger the run again: it "
            "resumes where it stopped"
        )


def run_until_stopped(records: RunStore, store: str) -> str:
    """Run all rounds, with a review where configured. Returns the stop reason, or `waiting`."""
    while True:
        with run_slot(records.run), hold(records.store, records.run, run_log()), keep_process():
            while records.state() == "open":
                run_next_round(records, store)
            finish_run(records, store)
        if not ask_person(records):
            return "waiting"
        if (state := records.state()) != "open":
            return state


def run_next_round(records: RunStore, store: str) -> None:
    """Run the open round as a subflow and update the run's index."""
    number = records.history().next_round
    round_flow(records, number)(records.run, store, number)
    cards.publish_index(records)


def finish_run(records: RunStore, store: str) -> None:
    """Finish a stopped run: evaluate on the test set, record it as finished, emit the event."""
    state = records.state()
    if state in ("open", "waiting"):
        return
    if state not in PAUSED:
        report_test_side(Session(store, records.run, task_runner(records)))
    run_names.record_finished(records)
    events.run_stopped(records)


def round_flow(records: RunStore, number: int) -> Flow:
    """The round's subflow, with a unique function name.

    When a flow run restarts, Prefect matches its subflows to earlier ones by function name and count: a
    restart at round 2 would get the result of round 0. So the name contains the round's number, the
    configuration's version and whether a review was answered.
    """

    @wraps(run_and_publish)
    def this_round(run: str, store: str, round: int) -> str:
        return run_and_publish(run, store, round)

    asked = records.question(number) is not None
    position = f"{records.run}_{number}_{len(records.configs())}_{'answered' if asked else 'new'}"
    this_round.__qualname__ = "round_" + position.replace(".", "_")
    return flow(name="sera-round", flow_run_name="{run}-round-{round}", persist_result=False)(this_round)


def run_and_publish(run: str, store: str, round: int) -> str:
    """Run one round and publish it. Returns `open`, a stop reason, `waiting` or `budget`."""
    records = RunStore(open_store(store), run)
    session = Session(store, run, task_runner(records))
    state = run_round(session, round)
    if state not in PAUSED:
        manifest = records.rounds()[round]
        cards.publish_round(records, manifest, session.config.review.show_text)
        events.round_completed(manifest, records.store.url)
    return state


def task_runner(records: RunStore) -> Runner:
    """A runner that does each step as a Prefect task named after the step."""
    store = records.store.url
    execution = ExecutionConfig.model_validate(records.configs()[-1].config["execution"])

    def run_task(spec: StepSpec) -> StepRecord:
        logs = f"sera-logs/{records.run}/{_logged_as(spec)}"
        named = spec.model_copy(update={"where": {**spec.where, "logs": logs}})
        return do_step.with_options(name=TITLES[spec.step], task_run_name=TITLES[spec.step])(
            named, store, execution
        )

    return run_task


def _logged_as(spec: StepSpec) -> str:
    """Folder of a step's training curves."""
    fold = f"-fold-{spec.fields['fold']['out']}" if "fold" in spec.fields else ""
    return "sft" if spec.step == "sft" else f"round-{spec.fields.get('round')}{fold}"


# Runs resume from the store's records, so Prefect's result cache is off.
@task(persist_result=False, cache_policy=NO_CACHE)
def do_step(spec: StepSpec, store: str, execution: ExecutionConfig) -> StepRecord:
    """Do one step and commit its record."""
    with library_logs(), reporter(TITLES[spec.step]) as progress:
        return do_work(store, spec, execution, progress, run_log(), device_slot(spec.step, execution))
