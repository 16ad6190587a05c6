"""Whatever is killed, cut off or cancelled, the run goes on: nothing lost, at most one step repeated.

A real server on Postgres, a worker and a tiny policy. `make recovery` writes latest.json beside this file.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import places
import pytest
import servers
import tinyrun

import sera_core

pytestmark = pytest.mark.recovery
LATEST = Path(__file__).with_name("latest.json")
ROUNDS = 2
HOLD_SECONDS = 180
"""How long a healthy process holds the interpreter, sending no heartbeat."""


@pytest.fixture(scope="module")
def table() -> Iterator[list[dict[str, Any]]]:
    """The rows of latest.json, written when asked for (SERA_WRITE_RECOVERY=1: `make recovery`)."""
    rows: list[dict[str, Any]] = []
    yield rows
    if os.environ.get("SERA_WRITE_RECOVERY"):
        LATEST.write_text(json.dumps(rows, indent=1) + "\n")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    """Policies of the same run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return tinyrun.policy_shas(
        tinyrun.work(tinyrun.config(folder, limits={"rounds": ROUNDS}), folder / "store")
    )


@dataclass
class Running:
    """A run at work in Prefect, and what its store held when it was disturbed."""

    place: Any
    folder: Path
    run: str
    flow_run: str = ""
    execution: dict[str, Any] = field(default_factory=dict)
    disturbed: float = 0.0
    before: dict[str, bytes] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def parameters(self) -> dict[str, Any]:
        execution = {"checkpoint_steps": 1, "device": "cpu", **self.execution}
        form = tinyrun.form(self.folder, limits={"rounds": ROUNDS}, execution=execution)
        return {"config": form, "run": self.run, "store": str(self.store)}

    def trigger(self) -> "Running":
        self.flow_run = servers.trigger(self.place.environment, "sera/sera", self.parameters)
        return self

    def wait_until_round_1(self) -> None:
        """Round 0 is finished and a step after it is under way."""
        until(lambda: (self.store / f"runs/{self.run}/round-000.json").exists(), 300)
        finished = self.records()
        until(lambda: len(self.records()) > len(finished), 60)

    def wait_until_training(self) -> None:
        """Round 0 trains its policy; round 1 is still to come."""
        until(lambda: any(self.store.glob("steps/train/*/part-*.json")), 300)

    def records(self) -> dict[str, bytes]:
        """Every committed record of the store."""
        found = (*self.store.glob("steps/*/*/*.json"), *self.store.glob("runs/*/*.json"))
        return {str(path.relative_to(self.store)): path.read_bytes() for path in found}

    def disturb(self, how: Callable[[], None]) -> None:
        self.before, self.disturbed = self.records(), time.time()
        how()

    def ended(self, seconds: float = 800) -> None:
        found = servers.wait_for_state(
            self.place.environment, self.flow_run, ("COMPLETED", "FAILED"), seconds
        )
        assert found["state"]["type"] == "COMPLETED", found["state"]

    def row(self, case: str, undisturbed: list[str]) -> dict[str, Any]:
        """The case's line: the same end, records lost, steps repeated, seconds until work went on."""
        after = self.records()
        run = sera_core.open_run(str(self.store), self.run)
        policies = [r.manifest.artifacts["policy"]["sha256"] for r in run]
        later = [
            path.stat().st_mtime - self.disturbed
            for path in self.store.glob("steps/*/*/done.json")
            if path.stat().st_mtime > self.disturbed
        ]
        return {
            "case": case,
            "continued": policies == undisturbed and run.stop_reason == "max_rounds" and bool(later),
            "lost": sum(after.get(name) != data for name, data in self.before.items()),
            "steps_repeated": sum(count - 1 for count in tinyrun.attempts(self.store)),
            "seconds": round(min(later), 1) if later else None,
        }


@pytest.fixture(scope="module", autouse=True)
def lost_machine(tmp_path_factory, undisturbed) -> Iterator[tuple["Running", str]]:
    """A run whose worker and flow were killed, and a healthy busy flow run, on a Prefect of their own.

    Noticing takes minutes of waiting, so it starts before the other tests and is checked after them.
    """
    folder = tmp_path_factory.mktemp("lost")
    with places.place(folder / "prefect") as place:
        run = Running(place, folder, "lost").trigger()
        run.wait_until_round_1()
        run.disturb(place.hands.kill)
        with servers.worker(place.environment, name="other-hands"):
            yield run, hold_the_interpreter(place, HOLD_SECONDS)


def until(condition: Callable[[], bool], seconds: float, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(pause)


def kill_flows(place) -> None:
    """SIGKILL every process that the worker has started; the worker lives."""
    for pid in servers.processes_under(place.hands.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def set_state(place, flow_run: str, kind: str, name: str | None = None) -> None:
    """What the buttons of the UI do."""
    body = {"state": {"type": kind, "name": name}, "force": False}
    servers.api(place.environment, f"/flow_runs/{flow_run}/set_state", body)


def hold_the_interpreter(place, seconds: int) -> str:
    """Trigger a healthy flow, named like a run's, that sends no heartbeat for so long."""
    flow = servers.api(place.environment, "/flows/", {"name": "sera"})
    servers.api(
        place.environment,
        "/deployments/",
        {"name": "busy", "flow_id": flow["id"], "entrypoint": "busy_flow.busy", "work_pool_name": "sera"},
    )
    return servers.trigger(place.environment, "sera/busy", {"seconds": seconds})


def slots(place, limit: str) -> int:
    try:
        return servers.api(place.environment, f"/v2/concurrency_limits/{limit}")["active_slots"]
    except OSError:  # not made yet
        return 0


def check(table: list[dict[str, Any]], row: dict[str, Any]) -> None:
    table.append(row)
    assert row["continued"] and row["lost"] == 0 and row["steps_repeated"] <= 1, row


def test_a_killed_worker_costs_nothing(own_place, tmp_path, table, undisturbed):
    run = Running(own_place, tmp_path, "orphan").trigger()
    run.wait_until_round_1()
    run.disturb(lambda: own_place.hands.kill(children=False))
    own_place.hands.start()
    run.ended()
    check(table, run.row("worker killed, its flow process alive", undisturbed))


def test_a_restarted_server_is_waited_for(own_place, tmp_path, table, undisturbed):
    run = Running(own_place, tmp_path, "restarted").trigger()
    run.wait_until_round_1()
    run.disturb(own_place.server.kill)
    time.sleep(5)
    own_place.server.start()
    run.ended()
    check(table, run.row("server killed and restarted", undisturbed))


def test_cancel_ends_every_process_and_a_new_trigger_goes_on(own_place, tmp_path, table, undisturbed):
    run = Running(own_place, tmp_path, "cancelled", execution={"child": "always"}).trigger()
    run.wait_until_training()  # a cancel takes seconds, in which a whole round can be done
    at_work = servers.processes_under(own_place.hands.pid)
    assert at_work
    run.disturb(lambda: set_state(own_place, run.flow_run, "CANCELLING"))
    until(lambda: not servers.processes_under(own_place.hands.pid).keys() & at_work.keys(), 30, 0.2)
    servers.wait_for_state(own_place.environment, run.flow_run, ("CANCELLED",), 180)
    until(lambda: slots(own_place, "sera-run-cancelled") == 0, 120, 0.5)
    assert len(sera_core.open_run(str(run.store), run.run)) < ROUNDS  # it was not done yet
    run.execution = {}  # changes no result, and is faster than a process for each step
    run.trigger().ended()
    check(table, run.row("cancelled, triggered again", undisturbed))


def test_retry_of_a_failed_run_goes_on_where_it_failed(own_place, tmp_path, table, undisturbed):
    limit = "sera-not-made-yet"
    run = Running(own_place, tmp_path, "failed", execution={"limit": limit}).trigger()
    found = servers.wait_for_state(own_place.environment, run.flow_run, seconds=300)
    assert found["state"]["type"] == "FAILED"  # the first step that uses the device asks for the limit

    def mend() -> None:
        body = {"name": limit, "limit": 1, "active": True}
        servers.api(own_place.environment, "/v2/concurrency_limits/", body)
        set_state(own_place, run.flow_run, "SCHEDULED", "AwaitingRetry")

    run.disturb(mend)
    run.ended()
    check(table, run.row("failed, retried", undisturbed))


def test_a_killed_flow_process_goes_on_by_itself_and_the_slot_that_its_step_held_is_freed(
    own_place, tmp_path, table, undisturbed
):
    run = Running(own_place, tmp_path, "leaked", execution={"limit": "sera-device"}).trigger()
    run.wait_until_round_1()
    until(lambda: slots(own_place, "sera-device") > 0, 60)
    run.disturb(lambda: kill_flows(own_place))
    until(lambda: slots(own_place, "sera-device") == 0, 120, 0.5)  # whoever it is freed by
    run.ended()
    row = run.row("flow process killed while holding a slot of the device", undisturbed)
    check(table, row)
    assert row["seconds"] < 120


def test_a_lost_database_loses_no_run(own_place, tmp_path, table, undisturbed):
    run = Running(own_place, tmp_path, "forgotten").trigger()
    run.wait_until_round_1()
    with servers.postgres() as empty:

        def lose() -> None:
            own_place.server.kill()
            kill_flows(own_place)
            own_place.hands.stop()

        run.disturb(lose)
        own_place.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = empty.url
        own_place.server.start()
        servers.sera(own_place.environment, "deploy", "--store", str(tmp_path / "store"))
        own_place.hands.start()
        run.trigger().ended()
        check(table, run.row("database lost, triggered again", undisturbed))
        own_place.hands.stop()
        own_place.server.stop()


def test_a_lost_machine_is_noticed_and_a_busy_healthy_one_is_not(lost_machine, table, undisturbed):
    """Worker and flow are gone, nobody reports it: the missing heartbeat does. Meanwhile a healthy run holds
    its interpreter for minutes, so that it sends no heartbeat either, and is left alone.
    """
    run, healthy = lost_machine
    run.ended()
    found = servers.wait_for_state(run.place.environment, healthy, seconds=HOLD_SECONDS + 120)
    assert found["state"]["type"] == "COMPLETED" and found["run_count"] == 1, found["state"]
    check(table, run.row("machine lost (worker and flow)", undisturbed))
