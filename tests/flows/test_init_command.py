"""`sera init`: experiments for three kinds of files and two models, which `sera plan` accepts unchanged."""

import json
import tomllib

import pytest
import tiny
import tinyrun

from flows.planning.first_experiment import Seen, as_toml, proposed
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.models.memory_estimate import ModelShape

QUESTION, GOOD, BAD = "How do tides arise?", "The moon pulls the water, twice a day.", "They just do."


def ultrafeedback(number):
    completions = [
        {"response": GOOD, "overall_score": 9.0, "model": "a"},
        {"response": BAD, "overall_score": 2.0, "model": "b"},
    ]
    return {"instruction": f"{number}: {QUESTION}", "completions": completions}


def hh(number):
    asked = f"\n\nHuman: {number}: {QUESTION}\n\nAssistant: "
    return {"chosen": asked + GOOD, "rejected": asked + BAD}


def sharegpt(number):
    return {
        "conversations": [{"from": "human", "value": f"{number}: {QUESTION}"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A chat model of 2,048 positions or more, and a base model of 256 without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    chat, base = (
        tiny.tiny_policy(folder / "chat", positions=4096),
        tiny.tiny_policy(folder / "base", positions=256),
    )
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = base / name
        if path.suffix == ".jinja" and path.exists():
            path.unlink()
        elif path.exists():
            held = json.loads(path.read_text())
            held.pop("chat_template", None)
            path.write_text(json.dumps(held))
    return {"chat": chat, "base": base}


@pytest.mark.parametrize("model", ["chat", "base"])
@pytest.mark.parametrize("kind", [ultrafeedback, hh, sharegpt])
def test_plan_accepts_the_file_unchanged(sera, models, tmp_path, kind, model):
    tinyrun.write_rows(tmp_path / "pairs.jsonl", [kind(number) for number in range(80)])
    out = tmp_path / "mine.toml"
    told = sera(
        "init",
        out,
        "--model",
        models[model],
        "--data",
        tmp_path / "pairs.jsonl",
        "--store",
        tmp_path / "s",
        "--json",
    ).json
    written = tomllib.loads(out.read_text())
    assert written["data"]["train"] == "pairs.jsonl"  # from the experiment's folder
    assert ("chat_template" in written["model"]) == (model == "base")
    assert ("max_prompt_tokens" in written["data"]) == (model == "base")
    assert written["train"] == {"batch": 8} and written["data"]["heldout_fraction"] == 0.35
    assert written["sampling"]["max_tokens"] < 128
    plan = sera("plan", out, "--store", tmp_path / "s", "--json").json
    timeless = {"seconds", "steps"}  # measured anew each time
    assert {name: told["plan"][name] for name in plan.keys() - timeless} == {
        name: plan[name] for name in plan.keys() - timeless
    }
    assert plan["run"] == "mine" and plan["run_now"] > 0


def test_what_is_wrong_in_the_file_is_said_beside_its_setting(sera, models, tmp_path):
    rows = [hh(number) for number in range(40)] + [{"prompt": "?", "chosen": "", "rejected": BAD}]
    data, out = tinyrun.write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "mine.toml"
    said = sera("init", out, "--model", models["chat"], "--data", data, "--store", tmp_path / "s").out
    assert "leaves out rows that cannot be used: 1 empty_answer" in out.read_text()
    assert "data.on_bad_row = drop" in said and f"sera run {out}" in said and "(estimated)" in said
    assert not (tmp_path / "s").exists()
    before = out.read_text()
    assert "already exists" in sera("init", out, "--model", models["chat"], "--data", data, code=2).err
    assert out.read_text() == before


def test_it_asks_in_a_terminal_and_names_the_flag_elsewhere(sera, models, tmp_path, monkeypatch):
    data, out = (
        tinyrun.write_rows(tmp_path / "pairs.jsonl", [hh(n) for n in range(40)]),
        tmp_path / "mine.toml",
    )
    assert "--model is missing" in sera("init", out, "--data", data, code=2).err and not out.exists()
    answers, asked = iter([str(models["chat"]), str(data)]), []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: (asked.append(question), next(answers))[1])
    sera("init", out, "--store", tmp_path / "s")
    assert [question.split()[0] for question in asked] == ["Model", "Preference"] and out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "nowhere at all"], "nowhere at all"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_writes_nothing(sera, models, tmp_path, flags, said):
    data, out = (
        tinyrun.write_rows(tmp_path / "pairs.jsonl", [hh(n) for n in range(4)]),
        tmp_path / "mine.toml",
    )
    told = sera("init", out, "--model", models["chat"], "--data", data, *flags, code=2)
    assert said in told.err and not out.exists()


def seen(**changes):
    """Mistral-7B's size on a machine of 24 GiB."""
    shape = ModelShape(
        parameters=7_241_732_096,
        width=1_900_000,
        widest=60_000,
        cached=65_536,
        vocabulary=32_000,
        boundaries=131_072,
        outside=262_148_096,
    )
    base = {
        "model": "mistralai/Mistral-7B-v0.1", "shape": shape, "positions": 32_768, "has_template": True,
        "data": "pairs.jsonl", "formats": "1,000 rows as preference", "pairs": 1000, "prompts": 1000,
        "unusable": {},
        "prompt_tokens": [200] * 1000, "answer_tokens": [300] * 2000, "device": "cuda", "memory": 24 * 2**30,
        "four_bits": True,
    }  # fmt: skip
    return Seen(**{**base, **changes})


@pytest.mark.parametrize(
    ("gigabytes", "four_bits", "dtype", "method"),
    [
        (640, True, None, None),
        (80, True, "float32", "lora"),
        (40, True, "bfloat16", "lora"),
        (16, True, "nf4", "lora"),
    ],
)
def test_the_most_exact_way_that_fits_is_proposed(gigabytes, four_bits, dtype, method):
    settings = {
        f"{one.section}.{one.name}": one.value
        for one in proposed(seen(memory=gigabytes * 2**30, four_bits=four_bits))
    }
    assert settings.get("train.method") == method
    assert settings.get("model.dtype", "float32") == (dtype or "float32")
    assert settings.get("execution.gradient_checkpointing", False) == (gigabytes == 16)
    assert "data.heldout_fraction" not in settings and "train.batch" not in settings


def test_a_model_that_cannot_be_trained_at_all_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"cannot be trained here.*sera-flow\[qlora\]"):
        proposed(seen(memory=12 * 2**30, four_bits=False))


def test_the_text_is_toml_whatever_the_names_hold():
    name = 'a "quoted" folder \\ ünïcode.jsonl'
    written = tomllib.loads(as_toml(proposed(seen(data=name))))
    assert written["data"]["train"] == name
    SeraConfig.model_validate({**written, "data": {**written["data"], "train": [{"path": "x.jsonl"}]}})
