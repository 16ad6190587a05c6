"""`sera doctor EXPERIMENT.toml`: what would stop an experiment is found before it starts."""

import json
import shutil
from importlib.util import find_spec

import pytest
import tinyrun

from flows.commands import doctor, doctor_experiment

NAMES = [
    "settings", "store", "model", "template", "data", "code", "engine", "extras", "plan", "memory", "disk",
    "accelerator", "prefect", "telemetry",
]  # fmt: skip


@pytest.fixture
def checks(sera, tmp_path, monkeypatch):
    """Runs the command and gives its checks by name."""
    monkeypatch.setattr(doctor, "check_prefect", lambda: doctor.Check("prefect", "ok", "not tried here"))

    def run(experiment, code, *flags):
        said = sera("doctor", experiment, "--store", tmp_path / "store", "--json", *flags, code=code).json
        assert [check["name"] for check in said["checks"]] == NAMES
        return {check["name"]: check for check in said["checks"]}

    return run


def test_a_good_experiment_fails_no_check_and_nothing_is_left(tmp_path, checks):
    found = checks(tinyrun.experiment(tmp_path), 0)
    assert {check["status"] for name, check in found.items() if name != "plan"} == {"ok"}, found
    assert "32 rows as preference, the first with prompt, chosen, rejected" in found["data"]["detail"]
    assert "58 to do" in found["plan"]["detail"]
    assert "needs about" in found["memory"]["detail"] and "7 MB" in found["disk"]["detail"]
    assert not (tmp_path / "store").exists()


def test_a_row_that_cannot_be_used_and_a_model_without_a_template_are_named(tmp_path, checks):
    experiment = tinyrun.experiment(tmp_path)
    (tmp_path / "policy" / "chat_template.jinja").unlink()
    rows = tinyrun.pairs(4)
    rows[2]["chosen"][0]["content"] = " "
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    found = checks(experiment, 1)
    assert "pairs.jsonl line 3" in found["data"]["detail"] and found["data"]["status"] == "failed"
    assert "no chat template" in found["template"]["detail"]
    assert found["plan"]["status"] == "failed"
    assert found["memory"]["status"] == found["disk"]["status"] == "warning"
    assert checks(experiment, 1, "--set", "model.chat_template=chatml")["template"]["status"] == "ok"


def test_code_that_is_not_allowed_here_fails_and_the_rest_is_checked_all_the_same(tmp_path, checks):
    found = checks(tinyrun.experiment(tmp_path, select={"rule": "my_rules:middle"}), 1)
    assert "SERA_EXTENSIONS=my_rules" in found["code"]["detail"]
    assert found["settings"]["status"] == found["code"]["status"] == "failed"
    assert found["data"]["status"] == found["template"]["status"] == "ok"


def test_packages_that_are_missing_are_named_with_the_line_that_installs_them(tmp_path, checks, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    absent = ("wandb", "bitsandbytes")
    monkeypatch.setattr(
        doctor_experiment, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    found = checks(
        tinyrun.experiment(
            tmp_path,
            sampling={"engine": "vllm"},
            train={"optimizer": "adamw_8bit"},
            execution={"tracking": "wandb"},
        ),
        1,
    )
    assert found["extras"]["remedy"] == "pip install wandb; pip install 'sera-flow[qlora]'"
    assert "train.optimizer = 'adamw_8bit'" in found["extras"]["detail"]
    assert found["engine"]["status"] == "failed" and "sera-flow[vllm]" in found["engine"]["remedy"]


def test_a_plan_that_needs_more_than_there_is_fails(tmp_path, checks, monkeypatch):
    monkeypatch.setattr(doctor_experiment, "device_memory", lambda device: (2**28, 2**20))
    usage = shutil._ntuple_diskusage(2**30, 2**30 - 1000, 1000)
    monkeypatch.setattr(doctor_experiment.shutil, "disk_usage", lambda place: usage)
    found = checks(tinyrun.experiment(tmp_path), 1)
    assert found["memory"]["status"] == found["disk"]["status"] == "failed"
    monkeypatch.setattr(doctor_experiment, "device_memory", lambda device: (2**40, 2**20))
    assert checks(tmp_path / "tiny.toml", 1)["memory"]["status"] == "warning"  # free some and it fits


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.toml"], "no such file"),
        (["tiny.toml", "--model", "x"], "leave --model out"),
        (["--set", "a.b=1"], "name its file too"),
        (["tiny.toml", "--set", "train.betta=1"], "did you mean train.beta"),
    ],
)
def test_what_is_no_experiment_is_bad_input(tmp_path, sera, monkeypatch, words, says):
    tinyrun.experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert says in sera("doctor", *words, code=2).err


def test_text_ends_with_the_count_of_failures(tmp_path, sera, monkeypatch):
    for name in ("store", "accelerator", "prefect", "telemetry"):
        done = doctor.Check(name, "ok", "fine")
        monkeypatch.setattr(doctor, f"check_{name}", lambda *_, done=done: done)
    experiment = tinyrun.experiment(tmp_path, model={"source": str(tmp_path / "policy")})
    shutil.rmtree(tmp_path / "policy")
    out = sera("doctor", experiment, "--store", tmp_path, code=1).out
    assert "failed   model" in out and json.dumps(str(tmp_path / "policy"))[1:-1] in out
    assert "14 checks: 1 failed, 4 warnings" in out
