"""A whole run on the command line, Prefect included: the contract a user and a program rely on."""

import subprocess
import sys
import time

import pytest
import tinyrun
from commandline import process

import sera_core
from flows.display.token_use import SPENT
from sera_core.method.decisions import STOP_REASONS

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three rounds through `sera run`: (folder, experiment, store, seconds)."""
    folder = tmp_path_factory.mktemp("run")
    experiment = tinyrun.experiment(
        folder, data={"test_fraction": 0.2}, execution={"tracking": "tensorboard"}
    )
    done = process("run", experiment, "--store", folder / "store", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, experiment, folder / "store", done


def test_a_run_ends_with_its_rounds_and_the_reason_it_stopped(finished, sera):
    _, _, store, _ = finished
    found = sera("show", "tiny", "--store", store, "--json").json
    assert set(found) == {"run", "config_sha256", "stop_reason", "waiting", "head", "best_round", "rounds"}
    assert found["stop_reason"] in STOP_REASONS
    assert [r["round"] for r in found["rounds"]] == [0, 1, 2]
    assert [r["generated_share"] for r in found["rounds"]] == sorted(
        r["generated_share"] for r in found["rounds"]
    )
    assert found["rounds"][0]["generated_share"] == 0.0 < found["rounds"][1]["generated_share"]
    for r in found["rounds"]:
        assert r["decision"] in ("promote", "hold", "roll_back", "stop")
        assert {"policy", "pairs", "scored", "ledger", "mixture", "report"} <= set(r["artifacts"])
        assert set(r["pairs"]) == {"human", "generated"}
        for artifact in r["artifacts"].values():
            assert set(artifact) == {"uri", "sha256", "bytes", "rows"}
            assert len(artifact["sha256"]) == 64
    assert "responses" in found["rounds"][1]["artifacts"]


def test_the_same_name_again_answers_from_the_store_without_prefect_or_torch(finished):
    _, experiment, store, _ = finished
    probe = (
        "import sys, flows.cli; code = flows.cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'prefect') if m in sys.modules]); sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", probe, "run", str(experiment), "--store", str(store)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")
    assert time.monotonic() - start < 60  # a hang, not a speed, is what this would catch


def test_verify_holds(finished, sera):
    assert sera("verify", "tiny", "--store", finished[2], "--json").json["ok"]


def test_every_scored_token_is_of_one_kind_and_nothing_is_scored_twice(finished, sera):
    """A head and a reference have scored the human pairs before the round that reviews by them."""
    _, _, store, _ = finished
    shown = [r["metrics"] for r in sera("show", "tiny", "--store", store, "--json").json["rounds"]]
    for metrics in shown:
        assert sum(metrics[name] for name in SPENT) == metrics["tokens/scored"]
    assert shown[0]["tokens/reference_human"] > 0 == shown[0]["tokens/reused"]
    for metrics in shown[1:]:
        assert metrics["tokens/reference_human"] == metrics["tokens/policy_human"] == 0
        assert metrics["tokens/policy_generated"] == 0  # the sampler's own values are kept
        assert metrics["tokens/reference_generated"] > 0 < metrics["tokens/probe"]
        assert metrics["tokens/reused"] > 0
    assert shown[1]["tokens/past_generated"] == 0 < shown[2]["tokens/past_generated"]
    table = sera("show", "tiny", "--round", "2", "--store", store).out
    assert "tokens/past_generated" in table and "tokens/reused" in table


def test_python_reads_what_the_command_line_shows(finished):
    _, _, store, _ = finished
    run = sera_core.open_run(str(store), "tiny")
    assert list(run.rounds["round"]) == [0, 1, 2]
    assert len(run[1].pairs()) == run.rounds.loc[1, "human"] + run.rounds.loc[1, "generated"]
    assert set(run[1].ledger()["reason"]) >= {"kept"}
    assert len(run[1].responses()) == 30
    assert len(run[0].responses()) == 0
    pair = run[1].scored()["pair_id"][0]
    assert list(run.history(pair)["round"]) == [0, 1, 2]
    assert repr(run).startswith("<run tiny in ") and "3 rounds, stopped: max_rounds" in repr(run)
    assert repr(run[1]) == f"<round 1 of tiny: {run.rounds.loc[1, 'decision']}>"
    shown = run._repr_html_()
    assert shown.count("<tr") == 4 and "&lt;run tiny" in shown and "<run" not in shown
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(run[2].policy_path()).num_parameters() > 0


def test_every_pair_and_prompt_is_in_the_ledger_once(finished):
    _, _, store, _ = finished
    run = sera_core.open_run(str(store), "tiny")
    for number in range(3):
        ledger = run[number].ledger()
        human = ledger[ledger["origin"] == "human"]
        assert set(human["pair_id"]) == set(run[0].scored()["pair_id"]) and human["pair_id"].is_unique
        generated = ledger[(ledger["origin"] == "generated")]
        assert not generated.duplicated(["prompt_id", "pair_id"]).any()
        assert int(ledger["kept"].sum()) == len(run[number].pairs())
        if number:  # sampled from or not drawn this round: every prompt has its line
            assert set(generated["prompt_id"]) == set(human["prompt_id"])


def test_the_export_is_the_best_rounds_policy_and_never_overwrites(finished, tmp_path, sera):
    _, _, store, _ = finished
    found = sera("show", "tiny", "--store", store, "--json").json
    best = found["rounds"][found["best_round"]]["artifacts"]["policy"]["sha256"]
    command = ("export", "tiny", "--store", store, "--to", tmp_path / "policy")
    assert sera(*command, "--json").json["policy_sha256"] == best
    assert (
        not list((tmp_path / "policy").rglob("*.bin"))
        and (tmp_path / "policy" / "model.safetensors").exists()
    )
    assert "already exists" in sera(*command, code=2).err


def test_list_report_and_plan_tell_of_the_finished_run(finished, tmp_path, sera):
    _, experiment, store, _ = finished
    listed = sera("list", "--store", store, "--json").json
    assert [run["run"] for run in listed["runs"]] == ["tiny"]
    written = sera("report", "tiny", "--out", tmp_path, "--store", store, "--json").json
    assert any(file.endswith("index.html") for file in written["files"])
    for name in ("tiny", "other"):  # steps are shared by all runs
        plan = sera("plan", experiment, "--store", store, "--name", name, "--json").json
        assert {row["status"] for row in plan["steps"]} == {"reuse"} and plan["seconds"] == 0
    of_run = sera("plan", "tiny", "--store", store, "--json").json
    assert of_run["run"] == "tiny" and {row["status"] for row in of_run["steps"]} == {"reuse"}
    changed = sera("plan", "tiny", "--store", store, "--set", "train.beta=0.2", "--json").json
    status = {(row["round"], row["step"]): row["status"] for row in changed["steps"]}
    assert (
        status[0, "review"] == "run" and status[0, "train"] == "depends" and status[None, "render"] == "reuse"
    )
    assert "no such file" in sera("plan", "nothing", "--store", store, code=2).err


def test_a_changed_configuration_under_the_same_name_is_refused_with_the_difference(finished, sera):
    _, experiment, store, _ = finished
    command = ("run", experiment, "--store", store, "--set", "train.beta=0.2")
    assert "train.beta: 0.1 -> 0.2" in sera(*command, code=2).err


def test_the_test_side_is_reported_once_the_run_stopped(finished):
    _, _, store, done = finished
    assert "Test set (used for no decision)" in done.stdout
    assert "the reviewed rounds" in done.stdout or "The reviewed rounds" in done.stdout
    assert len(list((store / "runs" / "tiny").glob("final-*.json"))) == 1


def test_no_pickle_and_no_path_enters_the_store(finished):
    folder, _, store, _ = finished
    names = [p.name for p in store.rglob("*") if p.is_file()]
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    for config in store.rglob("policy/*.json"):
        assert str(folder) not in config.read_text()


def test_training_curves_go_where_tracking_was_asked_to_put_them(finished):
    folder, _, _, _ = finished
    for number in range(3):
        events = list((folder / "sera-logs" / "tiny" / f"round-{number}").rglob("events.out.tfevents.*"))
        assert events and all(file.stat().st_size > 100 for file in events)


def test_the_flow_is_callable_from_python(tmp_path, prefect_server):
    from flows.sera import sera as sera_flow

    config = tinyrun.config(tmp_path, limits={"rounds": 1})
    assert sera_flow(config, run="from-python", store=str(tmp_path / "store")) == "max_rounds"
    assert len(sera_core.open_run(str(tmp_path / "store"), "from-python")) == 1
