"""Runs driven from Prefect: triggers, names, the schedule's flow, reviews. A real server and worker."""

import json
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import servers
import tinyrun
from commandline import process
from prefect.settings import PREFECT_API_URL, temporary_settings
from raycluster import cluster

import sera_core
from flows.orchestration.limits import make_limit
from flows.store_tools.garbage import collect
from sera_core.artifacts.store import open_store

pytestmark = pytest.mark.flow


def trigger(place, deployment: str = "sera/sera", **parameters) -> str:
    return servers.trigger(place.environment, deployment, parameters)


def ended(place, flow_run: str) -> dict:
    found = servers.wait_for_state(place.environment, flow_run, seconds=400)
    assert found["state"]["type"] == "COMPLETED", found["state"]["message"]
    return found


def artifacts(place, run: str) -> dict[str, dict]:
    every = servers.api(place.environment, "/artifacts/latest/filter", {"limit": 200})
    return {a["key"]: a for a in every if (a["key"] or "").startswith(f"{run}-")}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment of two rounds, as a file."""
    folder = tmp_path_factory.mktemp("experiment")
    return tinyrun.experiment(folder, limits={"rounds": 2}, evaluate={"prompts": 0})


@pytest.fixture(scope="module")
def from_the_form(place, experiment):
    """The form filled in as the file says, the store, and the flow run that did it."""
    overrides = tomllib.loads(experiment.read_text())
    form = {
        "model": overrides["model"].pop("source"),
        "data": overrides["data"].pop("train")[0]["path"],
        "rounds": overrides["limits"].pop("rounds"),
        "preset": "full",
        "overrides": overrides,
    }
    store = str(experiment.parent / "pool")
    return form, store, ended(place, trigger(place, config=form, run="tiny-{date}-{data}", store=store))


def test_a_run_from_the_form_names_itself_shows_its_rounds_and_is_not_done_twice(place, from_the_form):
    form, store, first = from_the_form
    run = first["name"]
    assert run.startswith(f"tiny-{datetime.now(UTC):%Y}-") and "{" not in run
    assert sera_core.open_run(store, run).stop_reason == "max_rounds"
    rounds = servers.api(place.environment, "/flow_runs/filter", {"limit": 200})
    names = [r["name"] for r in rounds if r["name"].startswith(f"{run}-round")]
    assert sorted(names) == [f"{run}-round-0", f"{run}-round-1"]  # one bar a round
    key = run.lower()
    assert {f"{key}-index", f"{key}-round-0", f"{key}-round-1"} <= set(artifacts(place, key))

    again = ended(place, trigger(place, config=form, run="other-{date}-{data}", store=store))
    assert f"nothing new: run {run} is identical and finished" in again["state"]["message"]
    same = ended(place, trigger(place, config=form, run=run, store=store))
    assert "nothing new" in same["state"]["message"]
    assert [path.name for path in Path(store, "runs").iterdir()] == [run]


def test_one_experiment_is_the_same_run_on_a_laptop_on_a_ray_cluster_and_in_a_pool(
    place, experiment, from_the_form
):
    """Configuration, key of every step and, with one thread each, bytes of every policy."""
    _, pool, first = from_the_form
    run, folder = first["name"], experiment.parent
    done = process("run", experiment, "--name", run, "--store", folder / "laptop")
    assert done.returncode == 0, done.stderr
    with cluster(1) as nodes:
        settings = ("distribute=ray", "replicas=1", f"address={nodes.address}")
        on_ray = [word for setting in settings for word in ("--set", f"execution.{setting}")]
        servers.sera(
            place.environment, "run", str(experiment), "--name", run, "--store", str(folder / "ray"), *on_ray
        )
    shown, steps, where = {}, {}, {}
    for store in (str(folder / "laptop"), str(folder / "ray"), pool):
        told = json.loads(process("show", run, "--store", store, "--json").stdout)
        policies = [round["artifacts"]["policy"]["sha256"] for round in told["rounds"]]
        shown[store] = (told["config_sha256"], told["stop_reason"], policies)
        lineage = json.loads(process("lineage", run, "--round", "1", "--store", store, "--json").stdout)
        steps[store] = {(step["step"], step["key"], step["digest"]) for step in lineage["steps"]}
        where[store] = {
            step["step"] for step in lineage["steps"] if step["environment"].get("distribute") == "ray"
        }
    assert len(set(shown[pool][2])) == 2
    assert shown[str(folder / "laptop")] == shown[str(folder / "ray")] == shown[pool]
    assert steps[str(folder / "laptop")] == steps[str(folder / "ray")] == steps[pool]
    assert list(where.values()) == [set(), {"sample", "logps"}, set()]


def test_a_dry_run_publishes_the_plan_and_does_nothing(place, tmp_path):
    store = tmp_path / "store"
    form = tinyrun.form(tmp_path)
    ended(place, trigger(place, config=form, run="dry", store=str(store), dry_run=True))
    assert "train" in artifacts(place, "dry")["dry-plan"]["data"]
    assert not (store / "runs").exists()


def test_the_schedules_flow_advances_two_open_runs_by_a_round_and_leaves_a_stopped_one_alone(place, tmp_path):
    store = tmp_path / "store"
    tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), store, "stopped")
    for run in ("left", "right"):
        tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), store, run)
        more = tinyrun.config(tmp_path, limits={"rounds": 3})
        tinyrun.open_run.open_run(more, run, str(store))  # re-opened: two rounds more
    told = ended(place, trigger(place, "sera-advance/sera-advance", store=str(store)))
    assert "left: open" in told["state"]["message"] and "right: open" in told["state"]["message"]
    counts = {run: len(sera_core.open_run(str(store), run)) for run in ("left", "right", "stopped")}
    assert counts == {"left": 2, "right": 2, "stopped": 1}
    ended(place, trigger(place, "sera-advance/sera-advance", store=str(store), run="left"))
    assert sera_core.open_run(str(store), "left").stop_reason == "max_rounds"
    assert len(sera_core.open_run(str(store), "right")) == 2


def test_two_triggers_of_one_run_do_not_both_work_on_it(place, tmp_path):
    store = tmp_path / "store"
    form = tinyrun.form(tmp_path, limits={"rounds": 2})
    both = [trigger(place, config=form, run="twice", store=str(store)) for _ in range(2)]
    for flow_run in both:
        ended(place, flow_run)
    assert len(sera_core.open_run(str(store), "twice")) == 2
    assert max(tinyrun.attempts(store)) == 1


def test_the_limit_of_a_run_is_made_once_by_eight_that_need_it_in_the_same_moment(place):
    def make(name: str) -> None:
        with temporary_settings({PREFECT_API_URL: place.environment["PREFECT_API_URL"]}):
            make_limit(name)

    with ThreadPoolExecutor(8) as pool:
        for name in ("one", "two", "three"):
            list(pool.map(make, [name] * 8))
    assert servers.api(place.environment, "/v2/concurrency_limits/three")["limit"] == 1


def test_a_review_suspends_the_run_without_a_process_and_the_answer_takes_it_on(place, tmp_path):
    store = str(tmp_path / "store")
    form = tinyrun.form(tmp_path, limits={"rounds": 2}, decide={"review": "always", "min_pairs": 4})
    flow_run = trigger(place, config=form, run="asked", store=store)
    found = servers.wait_for_state(place.environment, flow_run, ("Suspended", *servers.FINAL), 400)
    assert found["state"]["name"] == "Suspended"
    deadline = time.monotonic() + 120
    while servers.processes_under(place.hands.pid):  # nothing waits with it
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for number, decision in enumerate(("promote", "hold")):
        assert found["state"]["name"] == "Suspended", found["state"]
        keys = found["state"]["state_details"]["run_input_keyset"]
        assert f"review-{number}" in keys["response"]
        asked = json.dumps(servers.api(place.environment, f"/flow_runs/{flow_run}/input/{keys['schema']}"))
        assert ("hold" in asked, "roll_back" in asked) == ((False, False) if number == 0 else (True, True))
        body = {"run_input": {"decision": decision, "note": f"seen {number}"}}
        servers.api(place.environment, f"/flow_runs/{flow_run}/resume", body)
        found = servers.wait_for_state(place.environment, flow_run, ("Suspended", *servers.FINAL), 400)
    assert found["state"]["type"] == "COMPLETED"
    run = sera_core.open_run(store, "asked")
    assert list(run.rounds["decision"]) == ["promote", "hold"] and run.stop_reason == "max_rounds"


def test_a_deadline_that_passed_is_answered_by_the_schedule(place, tmp_path):
    store = tmp_path / "store"
    config = tinyrun.config(
        tmp_path,
        limits={"rounds": 1},
        decide={"review": "always", "review_hours": 1e-6, "review_default": "stop", "min_pairs": 4},
    )
    records = tinyrun.work(config, store, "late")
    if records.history().next_round == 0:  # the question was still young when the work ended
        time.sleep(1)
        ended(place, trigger(place, "sera-advance/sera-advance", store=str(store)))
    assert [r.decision for r in records.rounds()] == ["stop"]


def test_an_unknown_setting_and_a_wrong_value_are_refused_by_name(place, tmp_path):
    form = tinyrun.form(tmp_path)
    unsound = {**form, "overrides": {"data.heldout_fraction": 0.6, "data.test_fraction": 0.6}}
    refused = trigger(place, config=unsound, run="bad", store=str(tmp_path / "s"))
    for wrong in (
        {"overrides": {"train": {"betta": 1}}},
        {"overrides": {"select.fraction": 2}},
        {"rounds": 0},
    ):
        with pytest.raises(OSError, match=r"409|422"):
            trigger(place, config={**form, **wrong}, run="bad", store=str(tmp_path / "s"))
    found = servers.wait_for_state(place.environment, refused, seconds=200)
    assert found["state"]["type"] == "FAILED"
    assert "config.overrides: data.heldout_fraction and data.test_fraction" in found["state"]["message"]


def test_a_comparison_is_triggered_shown_and_resumed_and_its_run_is_judged(place, tmp_path):
    store = tmp_path / "store"
    form = tinyrun.form(tmp_path, limits={"rounds": 2})
    parameters = {"config": form, "name": "arms", "arms": ["sera", "dpo"], "seeds": [0], "store": str(store)}
    parameters |= {"judge": "word-count"}
    told = ended(place, trigger(place, "sera-compare/sera-compare", **parameters))
    assert told["name"] == "arms" and "2 arms, 1 seed" in told["state"]["message"]
    card = artifacts(place, "arms")["arms-comparison"]["data"]
    assert "dpo against sera: balanced accuracy" in card.replace("\\", "") and "| dpo |" in card
    assert "## By a judge" in card and "| sera | dpo |" in card
    assert {"arms-sera-0-index", "arms-dpo-0-round-1"} <= set(artifacts(place, "arms"))
    before = {path: path.stat().st_mtime_ns for path in store.glob("steps/*/*/done.json")}
    ended(place, trigger(place, "sera-compare/sera-compare", **parameters))
    assert {path: path.stat().st_mtime_ns for path in store.glob("steps/*/*/done.json")} == before

    ask = {"run": "arms-sera-0", "judge": "word-count", "round": 1, "store": str(store)}
    told = ended(place, trigger(place, "sera-evaluate/sera-evaluate", **ask))
    assert (
        "round 1 against round 0 of arms-sera-0, judge word-count (not calibrated" in told["state"]["message"]
    )
    assert "win rate" in artifacts(place, "arms")["arms-sera-0-judge-word-count"]["data"]
    shown = servers.sera(
        place.environment,
        "evaluate",
        "arms-sera-0",
        "--judge",
        "word-count",
        "--round",
        "1",
        "--store",
        str(store),
    )
    verdicts = artifacts(place, "arms")["arms-sera-0-judge-word-count"]["data"]
    assert shown.splitlines()[1] in verdicts  # the same verdicts, from the store


@pytest.mark.parametrize(
    ("deployment", "parameters", "message"),
    [
        ("sera-compare", {"arms": ["sera", "dpoo"]}, "did you mean dpo"),
        ("sera-compare", {"seeds": []}, "at least one seed"),
        ("sera-evaluate", {"run": "nowhere", "judge": "word-count"}, "not in the store"),
        ("sera-evaluate", {"run": "nowhere", "judge": "word-count", "limit": 0}, "must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_or_judged_fails_with_its_reason(
    place, tmp_path, deployment, parameters, message
):
    if deployment == "sera-compare":
        parameters = {"config": tinyrun.form(tmp_path, limits={"rounds": 2}), **parameters}
    store = tmp_path / "store"
    flow_run = trigger(place, f"{deployment}/{deployment}", store=str(store), **parameters)
    found = servers.wait_for_state(place.environment, flow_run, seconds=200)
    assert found["state"]["type"] == "FAILED" and message in found["state"]["message"]
    assert not (store / "runs").exists()


def test_the_collecting_deployment_lists_what_may_go_and_takes_nothing_unasked(place, tmp_path):
    store = tmp_path / "store"
    tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), store, "kept")
    before = sorted(path for path in store.rglob("*") if path.is_file())
    told = ended(place, trigger(place, "sera-gc/sera-gc", store=str(store), older_than="0s"))
    found = collect(open_store(str(store)), False, 0)
    expected = f"unreferenced: {len(found['items'])} items, {found['bytes']:,} bytes"
    assert expected in told["state"]["message"]
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before
