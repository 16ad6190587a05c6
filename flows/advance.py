"""`sera-advance`: run one more round of one run, or of every open run in the store.

On a schedule it advances all open runs and skips runs that have stopped or wait for a review.
"""

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.display.logs import run_log
from flows.orchestration.limits import run_slot
from flows.sera import finish_run, run_next_round
from sera_core.artifacts.lease import hold
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import default_store, open_store
from sera_core.errors import BusyError, InputError, SeraError


@flow(name="sera-advance", persist_result=False)
def sera_advance(run: str | None = None, store: str | None = None) -> State[dict[str, str]]:
    """Run one more round of a run, or of every open run in the store.

    Results in the state of each run. A review past its deadline is answered with its default.

    Args:
        run: Name of the run. Empty: every open run in the store.
        store: Folder or s3://bucket/prefix with the runs. Empty: the worker's SERA_STORE.
    """
    store = store or default_store()
    opened = open_store(store)
    if run:
        return _completed({run: advance_one(RunStore(opened, run), store)})
    states: dict[str, str] = {}
    failed: list[str] = []
    for name in list_runs(opened):
        try:
            states[name] = advance_one(RunStore(opened, name), store)
        except BusyError:
            states[name] = "busy"
        except Exception as error:  # continue with the other runs; report this one at the end
            get_run_logger().exception("run %s", name)
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if failed:
        raise SeraError("\n".join(["some runs could not be advanced", *failed]))
    return _completed(states)


def _completed(states: dict[str, str]) -> State[dict[str, str]]:
    return Completed(message=", ".join(f"{n}: {s}" for n, s in states.items()) or "no runs", data=states)


def advance_one(records: RunStore, store: str) -> str:
    """Run one round of an open run. Returns the state of the run.

    Raises:
        InputError: no such run.
        BusyError: another flow run is working on it.
    """
    if not records.configs():
        raise InputError(f"run {records.run!r}: not in the store {store}; `sera list` names the runs there")
    if records.state() == "open":
        with run_slot(records.run, wait=5), hold(records.store, records.run, run_log()):
            if records.state() == "open":
                run_next_round(records, store)
                finish_run(records, store)
    return records.state()
