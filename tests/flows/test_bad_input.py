"""Bad input: exit code 2, one message saying where and what to do, nothing half-written, no model loaded."""

import importlib.util
import sys

import pytest
import tiny
import tinyrun

from flows.running import open_run
from flows.running.rounds import run_round
from flows.running.session import Session
from sera_core.errors import InputError
from tasks.engines.tracking import refuse_missing


@pytest.fixture
def folder(tmp_path):
    tinyrun.settings(tmp_path)
    return tmp_path


@pytest.fixture
def refused(sera, folder):
    """What `sera run` says when it refuses: on stderr alone, and with nothing written."""

    def written():
        return sorted(path for path in (folder / "store").rglob("*") if path.is_file())

    def message(*args, experiment=None, rows=None):
        if rows is not None:
            tinyrun.write_rows(folder / "pairs.jsonl", rows)
        experiment = experiment or tinyrun.experiment(folder)
        before = written()
        said = sera("run", experiment, "--store", folder / "store", *args, code=2)
        assert said.out == "" and "Traceback" not in said.err
        assert written() == before
        return said.err

    return message


def turn(role, content):
    return {"role": role, "content": content}


def test_a_missing_file_is_named(refused, folder):
    (folder / "pairs.jsonl").unlink()
    experiment = tinyrun.experiment(folder)
    (folder / "pairs.jsonl").unlink()
    assert "pairs.jsonl" in refused(experiment=experiment)


def test_a_missing_experiment_is_named(refused, folder):
    assert "nowhere.toml" in refused(experiment=folder / "nowhere.toml")


@pytest.mark.parametrize(
    ("losses", "smoothing", "message"),
    [
        ('["sft"]', 0, "compares no answers, so there is nothing to review by"),
        ('["sigmoid", "sigmoid"]', 0, "train.losses names a loss twice"),
        ('["robust"]', 0, "the loss robust needs train.label_smoothing above 0"),
        ('["robust", "sigmoid"]', '"consistency"', "the loss robust needs a fixed train.label_smoothing"),
        ('["sigmoid"]', 0.5, 'give a number in [0, 0.5), or "consistency"'),
        ('["sigmoid"]', '"consistent"', 'give a number in [0, 0.5), or "consistency"'),
    ],
)
def test_losses_that_do_not_go_together_are_refused(refused, losses, smoothing, message):
    settings = ("--set", f"train.losses={losses}", "--set", f"train.label_smoothing={smoothing}")
    assert message in refused(*settings)


def test_more_processes_than_a_step_has_pairs_are_refused(refused):
    said = refused("--set", "train.batch=3", "--set", "execution.processes=4")
    assert "execution.processes = 4, but a step of training has 3 pairs" in said


@pytest.mark.parametrize(
    "setting", [("model.dtype", "nf4", "train.method", "lora"), ("train.optimizer", "adamw_8bit")]
)
def test_weights_or_moments_in_blocks_are_not_shared_by_rows(refused, setting):
    given = [f"{name}={value}" for name, value in zip(setting[::2], setting[1::2], strict=True)]
    settings = [*given, "train.batch=4", "execution.processes=2", "execution.shard_weights=true"]
    said = refused(*(word for entry in settings for word in ("--set", entry)))
    assert (
        f'shares weights and moments by rows, but {setting[0]} = "{setting[1]}" keeps them in blocks' in said
    )


def test_anchors_and_a_file_of_candidates_are_refused(refused, folder):
    (folder / "candidates.jsonl").write_text('{"prompt": "?", "response": "a", "rating": 1}\n')
    by = f"file:{folder / 'candidates.jsonl'}"
    experiment = tinyrun.experiment(folder, pairing={"by": by, "rule": "best-anchored"})
    said = refused(experiment=experiment)
    assert 'pairing.rule = "best-anchored" has no effect here' in said and "not with a file" in said


@pytest.mark.parametrize(
    ("loss", "score"), [("sigmoid", "implicit"), ("sigmoid_norm", "avg-implicit"), ("simpo", "simpo")]
)
def test_sft_does_not_change_the_implicit_reward_wherever_it_is_named(folder, loss, score):
    for losses in ([loss], [loss, "sft"], ["sft", loss]):
        config = tinyrun.config(folder, train={"losses": losses})
        assert config.score == score and config.train.needs_reference == (loss != "simpo")


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        (
            '["tokens", "sentence"]',
            "decide.panel.1: the feature 'sentence' is unknown; did you mean 'sentences'?",
        ),
        ('["words", "words"]', "decide.panel names a feature twice"),
        ('["tokens", "os:getenv"]', "SERA_EXTENSIONS=os"),
        ('["words:"]', "code of your own is named as module:function"),
        ('["words"]', 'decide.feature = "tokens" is not in decide.panel'),
    ],
)
def test_a_feature_that_cannot_be_used_is_refused_before_the_model_is_read(refused, folder, panel, message):
    (folder / "policy" / "model.safetensors").unlink()  # reading it would fail with another message
    assert message in refused("--set", f"decide.panel={panel}")


def test_a_row_that_is_not_json_is_named_by_file_and_line(refused, folder):
    file = folder / "pairs.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], "{not json", *lines[5:]]) + "\n")
    said = refused()
    assert "pairs.jsonl" in said and "line 5" in said


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_missing_or_empty_field_is_named_by_row(refused, folder, field):
    rows = tinyrun.pairs(8)
    rows[2] = {**rows[2], field: ""}
    said = refused(rows=rows)
    assert field in said and "3" in said


def test_equal_answers_are_refused_when_asked(refused, folder):
    rows = tinyrun.pairs(8)
    rows[1]["rejected"] = rows[1]["chosen"]
    said = refused("--set", "data.on_equal=refuse", rows=rows)
    assert "equal" in said or "same" in said


def test_a_plan_checks_the_rows_as_a_run_would(sera, folder):
    rows = tinyrun.pairs(8)
    rows[2] = {"question": "a", "good": "b", "bad": "c"}
    tinyrun.write_rows(folder / "pairs.jsonl", rows)
    assert "3" in sera("plan", tinyrun.experiment(folder), "--store", folder / "store", code=2).err
    assert not (folder / "store").exists()


def test_a_plan_tells_what_the_rows_were_read_as(sera, folder):
    rows = tinyrun.pairs(8)
    rows[2]["question"] = rows[2].pop("prompt")
    tinyrun.write_rows(folder / "pairs.jsonl", rows)
    command = ["plan", str(tinyrun.experiment(folder)), "--store", str(folder / "store")]
    assert "data.train: read 7 rows as preference, 1 rows as orca" in sera(*command).out
    assert sera(*command, "--json").json["formats"] == {"train": {"orca": 1, "preference": 7}}


def test_pairs_of_one_prompt_cannot_be_held_out(refused, folder):
    rows = [{"prompt": "a", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(8)]
    assert "all pairs have the same prompt" in refused(rows=rows)


def test_roles_out_of_order_are_named(refused, folder):
    rows = tinyrun.pairs(8)
    rows[0]["prompt"] = [turn("assistant", "a"), turn("user", "b")]
    assert "role" in refused(rows=rows)


def test_messages_that_diverge_before_the_last_turn_are_refused(refused):
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
    assert "diverges_before_last_turn" in refused(rows=rows)


def test_an_unknown_key_gets_the_nearest_one_suggested(refused, folder):
    assert "did you mean train.beta" in refused("--set", "train.betta=0.2")


def test_a_value_out_of_range_is_named(refused, folder):
    said = refused("--set", "select.fraction=1.5")
    assert "select.fraction" in said and "1.5" in said


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "", ".."])
def test_a_run_name_with_a_path_in_it_is_refused(refused, name):
    assert "run name" in refused("--name", name) or not name


def test_a_model_without_a_chat_template_is_refused_for_conversations(refused, folder):
    tiny.tiny_policy(folder / "bare", template=None)
    said = refused("--set", f"model.source={folder / 'bare'}")
    assert "chat template" in said and "model.chat_template" in said


def test_named_templates_without_a_default_are_refused_before_anything_is_written(refused, folder):
    model = tiny.tiny_policy(folder / "named", template=None)
    file = model / "tokenizer_config.json"
    held = '"chat_template": [{"name": "rag", "template": "x"}], '
    file.write_text("{" + held + file.read_text().lstrip().removeprefix("{"))
    said = refused("--set", f"model.source={model}")
    assert "(rag)" in said and "model.chat_template" in said


def test_a_template_argument_that_changes_nothing_is_refused_before_anything_is_written(refused, folder):
    said = refused("--set", "model.template_kwargs={enable_thinking = false}")
    assert "enable_thinking" in said and "model.template_kwargs" in said


def test_a_model_folder_that_is_none_is_refused(refused, folder):
    (folder / "empty").mkdir()
    assert "config.json" in refused("--set", f"model.source={folder / 'empty'}")


def test_an_overlap_of_held_out_and_train_is_refused_with_counts(refused, folder):
    tinyrun.write_rows(folder / "held.jsonl", tinyrun.pairs(4))
    said = refused("--set", f'data.heldout="{folder / "held.jsonl"}"')
    assert "4" in said and "on_overlap" in said


def test_an_unknown_run_is_exit_code_2(sera, folder):
    for command in (
        ["show", "nobody"],
        ["verify", "nobody"],
        ["export", "nobody", "--to", "x"],
        ["review", "nobody"],
    ):
        assert "nobody" in sera(*command, "--store", folder / "store", code=2).err


@pytest.fixture
def no_trackers(monkeypatch):
    """As if none were installed."""
    true = importlib.util.find_spec
    missing = ("wandb", "mlflow", "trackio", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else true(name))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_first_step(
    refused, folder, no_trackers, tracker
):
    said = refused("--set", f"execution.tracking={tracker}")
    assert f"pip install {tracker}" in said and not (folder / "store" / "steps").exists()


def test_a_folder_that_a_tracker_left_is_not_its_package(folder, monkeypatch):
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
def test_what_is_no_plain_file_is_refused_wherever_a_file_is_read(refused, folder, special, kind):
    experiment = tinyrun.experiment(folder)
    path = special(kind, folder / "strange.jsonl")
    for args in (
        [f"data.train={path}"],
        [f"data.prompts={path}"],
        [f"model.chat_template={path}"],
    ):
        assert f"is a {kind}, not a file" in refused("--set", *args, experiment=experiment)
    assert f"is a {kind}, not a file" in refused(experiment=path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "tokenizer.json", "more.safetensors", "chat_template.jinja"],
)
def test_a_model_folder_with_a_pipe_for_a_file_is_refused(refused, folder, special, name):
    experiment = tinyrun.experiment(folder)
    (folder / "policy" / name).unlink(missing_ok=True)
    special("pipe", folder / "policy" / name)
    assert f"{name}: this is a pipe, not a file" in refused(experiment=experiment)
