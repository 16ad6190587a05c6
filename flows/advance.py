"""`sera-advance`: one further round of one run, or of every run of the store that is still open.

On a schedule it works through what is open and leaves alone what has stopped or waits for a person.
"""

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.display.logs import run_log
from flows.orchestration.limits import run_slot
from flows.sera import finish, one_round
from sera_core.artifacts.lease import hold
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import default_store, open_store
from sera_core.errors import BusyError, InputError, SeraError


@flow(name="sera-advance", persist_result=False)
def sera_advance(run: str | None = None, store: str | None = None) -> State[dict[str, str]]:
    """One further round of a run, or of every open run of the store.

    Results in how each run now stands. A question whose deadline has passed is answered with its default.

    Args:
        run: Name of the run. Empty: every open run of the store.
        store: Folder or s3://bucket/prefix with the runs. Empty: the worker's SERA_STORE.
    """
    store = store or default_store()
    opened = open_store(store)
    if run:
        return _told({run: advance_one(RunStore(opened, run), store)})
    states: dict[str, str] = {}
    failed: list[str] = []
    for name in list_runs(opened):
        try:
            states[name] = advance_one(RunStore(opened, name), store)
        except BusyError:
            states[name] = "busy"
        except Exception as error:  # the other runs go on; this one is named at the end
            get_run_logger().exception("run %s", name)
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise SeraError("\n".join(["not every run could be advanced", *failed]))
    return _told(states)


def _told(states: dict[str, str]) -> State[dict[str, str]]:
    return Completed(message=", ".join(f"{n}: {s}" for n, s in states.items()) or "no runs", data=states)


def advance_one(records: RunStore, store: str) -> str:
    """One round of an open run; how the run then stands.

    Raises:
        InputError: no such run.
        BusyError: another flow run works on it.
    """
    if not records.configs():
        raise InputError(f"run {records.run!r}: not in the store {store}; `sera list` names the runs there")
    if records.state() == "open":
        with run_slot(records.run, wait=5), hold(records.store, records.run, run_log()):
            if records.state() == "open":
                one_round(records, store)
                finish(records, store)
    return records.state()
