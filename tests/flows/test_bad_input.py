"""Bad input: exit code 2, one message saying where and what to do, nothing half-written, no model loaded."""

import importlib.util
import json
import sys

import pytest
import tiny
import tinyrun

from flows.cli import main
from flows.running import open_run
from flows.running.rounds import run_round
from flows.running.session import Session
from sera_core.errors import InputError
from tasks.engines.tracking import refuse_missing


@pytest.fixture
def folder(tmp_path):
    tinyrun.settings(tmp_path)
    return tmp_path


def refused(capsys, folder, *args, experiment=None, rows=None, code=2):
    if rows is not None:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = experiment or tinyrun.experiment(folder)
    before = sorted(str(p) for p in (folder / "store").rglob("*") if p.is_file())
    assert main(["run", str(experiment), "--store", str(folder / "store"), *args]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert sorted(str(p) for p in (folder / "store").rglob("*") if p.is_file()) == before
    return said.err


def turn(role, content):
    return {"role": role, "content": content}


def test_a_missing_file_is_named(capsys, folder):
    (folder / "pairs.jsonl").unlink()
    experiment = tinyrun.experiment(folder)
    (folder / "pairs.jsonl").unlink()
    assert "pairs.jsonl" in refused(capsys, folder, experiment=experiment)


def test_a_missing_experiment_is_named(capsys, folder):
    assert "nowhere.toml" in refused(capsys, folder, experiment=folder / "nowhere.toml")


def test_a_row_that_is_not_json_is_named_by_file_and_line(capsys, folder):
    file = folder / "pairs.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], "{not json", *lines[5:]]) + "\n")
    said = refused(capsys, folder)
    assert "pairs.jsonl" in said and "line 5" in said


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_missing_or_empty_field_is_named_by_row(capsys, folder, field):
    rows = tinyrun.pairs(8)
    rows[2] = {**rows[2], field: ""}
    said = refused(capsys, folder, rows=rows)
    assert field in said and "3" in said


def test_equal_answers_are_refused_when_asked(capsys, folder):
    rows = tinyrun.pairs(8)
    rows[1]["rejected"] = rows[1]["chosen"]
    said = refused(capsys, folder, "--set", "data.on_equal=refuse", rows=rows)
    assert "equal" in said or "same" in said


def test_a_plan_checks_the_rows_as_a_run_would(capsys, folder):
    rows = tinyrun.pairs(8)
    rows[2] = {"question": "a", "good": "b", "bad": "c"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plan", str(tinyrun.experiment(folder)), "--store", str(folder / "store")]) == 2
    assert "3" in capsys.readouterr().err
    assert not (folder / "store").exists()


def test_a_plan_tells_what_the_rows_were_read_as(capsys, folder):
    rows = tinyrun.pairs(8)
    rows[2]["question"] = rows[2].pop("prompt")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["plan", str(tinyrun.experiment(folder)), "--store", str(folder / "store")]
    assert main(command) == 0
    assert "data.train: read 7 rows as preference, 1 rows as orca" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"] == {"train": {"orca": 1, "preference": 7}}


def test_pairs_of_one_prompt_cannot_be_held_out(capsys, folder):
    rows = [{"prompt": "a", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(8)]
    assert "all pairs have the same prompt" in refused(capsys, folder, rows=rows)


def test_roles_out_of_order_are_named(capsys, folder):
    rows = tinyrun.pairs(8)
    rows[0]["prompt"] = [turn("assistant", "a"), turn("user", "b")]
    assert "role" in refused(capsys, folder, rows=rows)


def test_messages_that_diverge_before_the_last_turn_are_refused(capsys, folder):
    rows = tinyrun.pairs(8)
    rows[3] = {
        "chosen": [turn("user", "hello"), turn("assistant", "a"), turn("user", "x"), turn("assistant", "b")],
        "rejected": [
            turn("user", "hello"),
            turn("assistant", "c"),
            turn("user", "x"),
            turn("assistant", "d"),
        ],
    }
    assert "diverges_before_last_turn" in refused(capsys, folder, rows=rows)


def test_an_unknown_key_gets_the_nearest_one_suggested(capsys, folder):
    assert "did you mean train.beta" in refused(capsys, folder, "--set", "train.betta=0.2")


def test_a_value_out_of_range_is_named(capsys, folder):
    said = refused(capsys, folder, "--set", "select.fraction=1.5")
    assert "select.fraction" in said and "1.5" in said


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "", ".."])
def test_a_run_name_with_a_path_in_it_is_refused(capsys, folder, name):
    assert "run name" in refused(capsys, folder, "--name", name) or not name


def test_a_model_without_a_chat_template_is_refused_for_conversations(capsys, folder):
    tiny.tiny_policy(folder / "bare", template=None)
    said = refused(capsys, folder, "--set", f"model.source={folder / 'bare'}")
    assert "chat template" in said and "model.chat_template" in said


def test_named_templates_without_a_default_are_refused_before_anything_is_written(capsys, folder):
    model = tiny.tiny_policy(folder / "named", template=None)
    file = model / "tokenizer_config.json"
    held = '"chat_template": [{"name": "rag", "template": "x"}], '
    file.write_text("{" + held + file.read_text().lstrip().removeprefix("{"))
    said = refused(capsys, folder, "--set", f"model.source={model}")
    assert "(rag)" in said and "model.chat_template" in said


def test_a_template_argument_that_changes_nothing_is_refused_before_anything_is_written(capsys, folder):
    said = refused(capsys, folder, "--set", "model.template_kwargs={enable_thinking = false}")
    assert "enable_thinking" in said and "model.template_kwargs" in said


def test_a_model_folder_that_is_none_is_refused(capsys, folder):
    (folder / "empty").mkdir()
    assert "config.json" in refused(capsys, folder, "--set", f"model.source={folder / 'empty'}")


def test_an_overlap_of_held_out_and_train_is_refused_with_counts(capsys, folder):
    tinyrun.write_rows(folder / "held.jsonl", tinyrun.pairs(4))
    said = refused(capsys, folder, "--set", f'data.heldout="{folder / "held.jsonl"}"')
    assert "4" in said and "on_overlap" in said


def test_an_unknown_run_is_exit_code_2(capsys, folder):
    for command in (
        ["show", "nobody"],
        ["verify", "nobody"],
        ["export", "nobody", "--to", "x"],
        ["review", "nobody"],
    ):
        assert main([*command, "--store", str(folder / "store")]) == 2
        assert "nobody" in capsys.readouterr().err


@pytest.fixture
def no_trackers(monkeypatch):
    """As if none were installed."""
    true = importlib.util.find_spec
    missing = ("wandb", "mlflow", "trackio", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else true(name))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_first_step(
    capsys, folder, no_trackers, tracker
):
    said = refused(capsys, folder, "--set", f"execution.tracking={tracker}")
    assert f"pip install {tracker}" in said and not (folder / "store" / "steps").exists()


def test_a_folder_that_a_tracker_left_is_not_its_package(capsys, folder, monkeypatch):
    (folder / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(InputError, match="pip install trackio"):
        refuse_missing("trackio")


def test_a_round_elsewhere_is_refused_before_its_first_step_too(folder, no_trackers):
    config = tinyrun.config(folder)
    records = open_run.open_run(config, "tiny", str(folder / "store"))
    session = Session(records.store.url, "tiny", lambda spec: pytest.fail(f"{spec.step} was done"))
    session.config = tinyrun.config(folder, execution={"tracking": "wandb"})
    with pytest.raises(InputError, match="pip install wandb"):
        run_round(session, 0)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_plain_file_is_refused_wherever_a_file_is_read(capsys, folder, special, kind):
    experiment = tinyrun.experiment(folder)
    path = special(kind, folder / "strange.jsonl")
    for args in (
        [f"data.train={path}"],
        [f"data.prompts={path}"],
        [f"model.chat_template={path}"],
    ):
        assert f"is a {kind}, not a file" in refused(capsys, folder, "--set", *args, experiment=experiment)
    assert f"is a {kind}, not a file" in refused(capsys, folder, experiment=path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "tokenizer.json", "more.safetensors", "chat_template.jinja"],
)
def test_a_model_folder_with_a_pipe_for_a_file_is_refused(capsys, folder, special, name):
    experiment = tinyrun.experiment(folder)
    (folder / "policy" / name).unlink(missing_ok=True)
    special("pipe", folder / "policy" / name)
    assert f"{name}: this is a pipe, not a file" in refused(capsys, folder, experiment=experiment)
